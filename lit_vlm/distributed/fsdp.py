"""FSDP2 strategy for Lightning: PyTorch's `fully_shard`, with models that are loaded in shards.

Each rank holds some rows of every weight, of its gradient and of its moments (`Shard(0)`). A layer's weights are
gathered while the layer computes. `hsdp` shards within groups of ranks, and each group has a full copy.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from lit_vlm.compat.lightning import set_mesh_shape
from lit_vlm.compat.torch import allocate_on_device, get_local_rows, initialize_fsdp
from lit_vlm.distributed.sharded_state import FSDPShardedState, reshard
from lit_vlm.model.skeleton import defer_weights, read_initial_values
from lit_vlm.types import UserError

if TYPE_CHECKING:
    from lit_vlm.model.classes import VisionLanguageModel

DEFAULT_TIMEOUT = timedelta(minutes=30)


class FSDP2Strategy(ModelParallelStrategy):
    """Strategy fsdp2 (one group of all ranks) or hsdp (groups of `shard_size` ranks), on GPUs or CPU processes.

    The stage builds its models without weights. The models are sharded and then loaded from their files, so no rank ever
    holds a full model. A model that was built already is sharded as it is.

    Under `bf16-mixed` each rank's rows of trainable weights are float32, and so are the sums of gradients. The weights that
    are gathered for computing are bfloat16. Frozen weights from files are stored in bfloat16: they would be gathered in it
    anyway, and an export reads their files. Frozen weights of a model that was built already keep their dtype, because
    there is no other copy of them.

    Args:
        hybrid: True for hsdp, with a full copy in each group of ranks.
        shard_size: ranks in a group; None: the ranks of one machine.
        timeout: maximum time that ranks wait for each other.
    """

    loads_in_shards = True

    def __init__(
        self,
        *,
        hybrid: bool = False,
        shard_size: int | None = None,
        timeout: timedelta = DEFAULT_TIMEOUT,
        **options: Any,
    ) -> None:
        super().__init__(data_parallel_size=1, tensor_parallel_size=1, timeout=timeout, **options)
        self.hybrid, self.shard_size = hybrid, shard_size

    def setup_environment(self) -> None:
        set_mesh_shape(self, data_parallel=self.world_size, tensor_parallel=1)  # only Lightning's samplers use it
        groups = self._count_groups()
        super().setup_environment()
        kind = self.root_device.type
        if self.hybrid:
            shape = (groups, self.world_size // groups)
            self.mesh: DeviceMesh = init_device_mesh(kind, shape, mesh_dim_names=("replicate", "shard"))
        else:
            self.mesh = init_device_mesh(kind, (self.world_size,), mesh_dim_names=("shard",))

    def _count_groups(self) -> int:
        if not self.hybrid:
            return 1
        size = self.shard_size or self.num_processes
        if self.world_size % size:
            setting = f"trainer.shard_size={size}" if self.shard_size else f"the {size} devices of a machine"
            raise UserError(
                f"trainer.strategy=hsdp: {self.world_size} devices cannot be divided into groups of {size} ({setting}). "
                f"Set trainer.shard_size to a divisor of {self.world_size}, or use trainer.strategy=fsdp2."
            )
        return self.world_size // size

    # ---- the models

    @contextlib.contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Wrap the stage's `configure_model`: afterwards its models are sharded and their weights are loaded."""
        with defer_weights():
            yield
        assert self.lightning_module is not None
        for model in get_stage_models(self.lightning_module):
            if not isinstance(model, FSDPModule):
                apply_fsdp(model, self.mesh, self.precision_plugin.precision)
                load_local_weights(model, self.root_device)

    @contextlib.contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Disable the all-reduce between groups for all micro-batches of a step except the last (gradient accumulation).

        Within a group gradients are reduced in every micro-batch, because full gradients would not fit in memory.
        """
        modules = [
            m for model in get_stage_models(self.lightning_module) for m in model.modules() if isinstance(m, FSDPModule)
        ]
        for module in modules if self.hybrid else []:
            module.set_requires_all_reduce(False, recurse=False)
        try:
            yield
        finally:
            for module in modules if self.hybrid else []:
                module.set_requires_all_reduce(True, recurse=False)

    # ---- state, gradients, weights

    def gather_all_units(self, model: nn.Module) -> None:
        """Gather all weights and keep them, so that ranks may run different numbers of passes without gradients.

        All ranks must call it at the same point, and `shard_all_units` before the next step.
        """
        initialize_fsdp(model)
        for unit in model.modules():
            if isinstance(unit, FSDPModule):
                unit.set_reshard_after_forward(False, recurse=False)
                unit.unshard()

    def shard_all_units(self, model: nn.Module) -> None:
        """Free gathered weights, and gather each unit's only while it computes."""
        for unit in model.modules():
            if isinstance(unit, FSDPModule) and unit is not model:  # the root keeps its weights until the backward pass
                unit.set_reshard_after_forward(True, recurse=False)
        reshard(model)

    def get_sharded_state(self, module: Any) -> FSDPShardedState:
        """Return this rank's part of the state of `module.model`, once training is set up."""
        return FSDPShardedState(module.model, self.optimizers[0], self.global_rank)

    def gradient_sums(self, model: nn.Module) -> dict[str, float]:
        """Sum the absolute values of each existing gradient over all ranks. Every rank must call it."""
        named_gradients = [
            (name, parameter.grad) for name, parameter in model.named_parameters() if parameter.grad is not None
        ]
        sums = [gradient.to_local().float().abs().sum() for _, gradient in named_gradients]  # type: ignore[attr-defined]
        total = self.reduce(torch.stack(sums), reduce_op="sum").tolist() if sums else []
        return {name: value for (name, _), value in zip(named_gradients, total, strict=True)}

    def whole_weights(self, model: nn.Module) -> Callable[[str], Tensor]:
        """Return a function that gathers the full tensor of a parameter by its name, on every rank.

        All ranks must call it for the same names in the same order.
        """
        reshard(model)
        weights: dict[str, Any] = dict(model.named_parameters())
        return lambda name: weights[name].full_tensor()


def get_stage_models(module: Any) -> list[VisionLanguageModel]:
    """Return the models of a stage: the trained model and, for DPO, the reference model."""
    return [model for name in ("model", "reference") if (model := getattr(module, name, None)) is not None]


def apply_fsdp(model: VisionLanguageModel, mesh: DeviceMesh, precision: str) -> None:
    """Apply `fully_shard` to each layer of vision tower and language model, to an untied embedding, and to the rest with the head.

    The vision tower and the language model as modules are not sharded: `fully_shard` renames the class, and transformers
    looks up by the class name which layer outputs to record.
    """
    is_mixed = precision == "bf16-mixed"
    # Do not cast inputs: under autocast they have their dtypes already, and `Segments` must stay the same object
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if is_mixed else None,
        reduce_dtype=torch.float32 if is_mixed else None,
        cast_forward_inputs=False,
    )
    if is_mixed:
        for parameter in model.parameters():
            if parameter.is_meta and not parameter.requires_grad:
                parameter.data = parameter.data.to(torch.bfloat16)
    for unit in list_shard_units(model):
        fully_shard(unit, mesh=mesh, mp_policy=policy)
    trains = any(parameter.requires_grad for parameter in model.parameters())
    # a trained model keeps its head gathered, because its backward pass comes next; a reference model has none
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=None if trains else True)
    if hasattr(model, "generate"):
        register_fsdp_forward_method(model, "generate")


def list_shard_units(model: Any) -> list[nn.Module]:
    """List the modules that are sharded one by one; the rest of the model is one unit."""
    if hasattr(model, "list_shard_units"):  # a model with layers that share modules
        return model.list_shard_units()  # type: ignore[no-any-return]
    units = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not isinstance(model, PreTrainedModel):
        return units
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is not None and embedding.weight is not head.weight:  # a tied embedding belongs to the last unit only
        units.append(embedding)
    return units


@torch.no_grad()
def load_local_weights(model: VisionLanguageModel, device: torch.device) -> None:
    """Allocate this rank's rows of a model skeleton, and load their values from the files, weight by weight.

    In addition, it needs memory for this rank's rows of one weight at a time.
    """
    uninitialized = {name for name, parameter in model.named_parameters() if parameter.is_meta}
    allocate_on_device(model, device)
    for name, parameter in model.named_parameters():
        if name in uninitialized:
            local_rows, start = get_local_rows(parameter)
            values = read_initial_values(model, name, parameter.shape, start, start + local_rows.numel())
            local_rows.copy_(values.view_as(local_rows))
