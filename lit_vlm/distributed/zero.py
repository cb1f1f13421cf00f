"""Loads weights into model skeletons (`model/skeleton.py`) under ZeRO, so that a process holds no more than its part."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from lit_vlm.compat.deepspeed import (
    BaseZeroStrategy,
    GatheredModel,
    ParameterPartitioner,
    restore_float32,
)
from lit_vlm.compat.lightning import should_accumulate
from lit_vlm.distributed.fsdp import get_stage_models
from lit_vlm.distributed.sharded_state import TensorShard, ZeroShardedState, get_state_without_gradient
from lit_vlm.model.hub import set_deepspeed_accelerator
from lit_vlm.model.skeleton import defer_weights, move_buffers, read_initial_values, replace_parameters


def load_full_weights(model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Load every weight completely, in the compute dtype (ZeRO-2)."""

    def make_parameter(name: str, old: nn.Parameter) -> nn.Parameter:
        values = read_initial_values(model, name, old.shape, 0, old.numel()) if old.is_meta else old.detach()
        return nn.Parameter(values.view(old.shape).to(device, dtype), requires_grad=old.requires_grad)

    replace_parameters(model, make_parameter)
    move_buffers(model, device)


def load_partitioned_weights(
    model: nn.Module, config: dict[str, Any], dtype: torch.dtype, device: torch.device
) -> None:
    """Load this rank's slice of each weight from its file (ZeRO-3).

    In addition to the slices, it needs memory for one uninitialised full weight at a time.

    Args:
        config: DeepSpeed's configuration.
        dtype: compute dtype of the weights.
    """
    partitioner = ParameterPartitioner(config, dtype)

    def make_parameter(name: str, old: nn.Parameter) -> nn.Parameter:
        values = torch.empty(old.shape, dtype=dtype, device=device) if old.is_meta else old.detach().to(device, dtype)
        new = nn.Parameter(values, requires_grad=old.requires_grad)
        del values
        own_slice, offset = partitioner.partition(new)
        if old.is_meta:
            start = min(offset, old.numel())
            stop = min(start + own_slice.numel(), old.numel())
            own_slice[: stop - start].copy_(read_initial_values(model, name, old.shape, start, stop))
            own_slice[stop - start :].zero_()
        return new

    replace_parameters(model, make_parameter)
    move_buffers(model, device)


BUCKET_SIZE = 50_000_000  # elements for one reduce or gather call
PERSISTENCE_THRESHOLD = (
    10_000  # elements; ZeRO-3 does not partition smaller weights: biases and norms, of models up to 72B
)


class ZeroStrategy(BaseZeroStrategy):
    """ZeRO-2 or ZeRO-3 on GPUs, and on CPU processes with gloo.

    `bf16-mixed` computes in bfloat16 and keeps masters and moments in float32; gradients are summed over micro-batches and
    ranks in float32. DeepSpeed clips the gradients, with the value of `Trainer(gradient_clip_val=)`.

    Args:
        stage: 2 partitions gradients and optimizer state, 3 partitions the weights as well.
        offload: with stage 3, keep all partitioned state in host memory.
        timeout: timeout of every collective call.
        bucket_size: elements for one reduce or gather call.
        persistence_threshold: see `PERSISTENCE_THRESHOLD`.
    """

    handles_gradient_accumulation = False  # Lightning does it: see the top of this file
    loads_in_shards = True

    def __init__(
        self,
        stage: int = 3,
        *,
        offload: bool = False,
        timeout: timedelta = timedelta(minutes=30),
        bucket_size: int = BUCKET_SIZE,
        persistence_threshold: int = PERSISTENCE_THRESHOLD,
        **options: Any,
    ) -> None:
        set_deepspeed_accelerator()
        config = build_zero_config(
            stage, offload=offload, bucket_size=bucket_size, persistence_threshold=persistence_threshold
        )
        super().__init__(config=config, timeout=timeout, logging_level=logging.ERROR, **options)
        self._sharded_state: ZeroShardedState | None = None  # cached, because every step reads it
        self._gathered: GatheredModel | None = None
        self._initialized_models: list[nn.Module] = []  # models that were initialised here and have not trained yet

    # ---- processes

    def setup_distributed(self) -> None:
        warnings.filterwarnings("ignore", message=".*(all_gather_into|reduce_scatter)_tensor` is deprecated.*")
        super().setup_distributed()

    # ---- the models

    @contextlib.contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Wrap the stage's `configure_model`: it builds model skeletons, then this rank's part of the weights is loaded."""
        self.complete_config()
        self._use_float32_gradient_sums()
        with defer_weights():
            yield
        dtype, device = self.compute_dtype, self.root_device
        for model in get_stage_models(self.lightning_module):
            if not any(parameter.is_meta for parameter in model.parameters()):
                continue  # built already, with all weights
            if self.zero_stage_3:
                load_partitioned_weights(model, self.config, dtype, device)
            else:
                load_full_weights(model, dtype, device)
            self._initialized_models.append(model)

    def setup(self, trainer: L.Trainer) -> None:
        self.complete_config()
        self._use_float32_gradient_sums()
        module = trainer.lightning_module
        model = get_trained_model(module)
        masters = self._get_initial_masters(model) if trainer.training else None
        unrounded = {name: value.detach().clone() for name, value in get_state_without_gradient(model).items()}
        self._sharded_state = None
        super().setup(trainer)
        restore_float32(get_state_without_gradient(model), unrounded)
        for child in module.children():  # metrics: DeepSpeed does not move them if the model is partitioned
            if child not in get_stage_models(module):
                child.to(self.root_device)
        if masters:
            self.get_sharded_state(module).set_master_weights(masters)

    def _use_float32_gradient_sums(self) -> None:
        """Sum gradients over micro-batches and ranks in float32 if the compute dtype is bfloat16."""
        if self.config.get("bf16", {}).get("enabled"):
            self.config |= {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}

    def _get_initial_masters(self, model: nn.Module) -> Callable[[TensorShard], Tensor] | None:
        """Return a function that gives the float32 values of a shard, for weights whose compute dtype is another.

        Without it DeepSpeed would make the master weights from rounded values. None if only rounded values exist.
        """
        if "mixed" not in self.precision_plugin.precision:
            return None
        if model in self._initialized_models:
            self._initialized_models.remove(model)
            return lambda shard: read_initial_values(
                model, shard.name, torch.Size(shard.shape), shard.start, shard.start + len(shard.values)
            )
        weights = {name: weight.detach() for name, weight in model.named_parameters() if weight.requires_grad}
        if any(weight.dtype != torch.float32 or not weight.numel() for weight in weights.values()):
            return None
        return lambda shard: weights[shard.name].flatten()[shard.start : shard.start + len(shard.values)]

    def get_sharded_state(self, module: L.LightningModule) -> ZeroShardedState:
        """Return this rank's part of the state of `module.model`, once training is set up."""
        return ZeroShardedState(get_trained_model(module), self.deepspeed_engine.optimizer, self.global_rank)

    def gather_all_units(self, model: nn.Module) -> None:
        """Gather all weights and keep them, so that ranks may run different numbers of passes without gradients.

        All ranks must call it at the same point, and `shard_all_units` before the next step.
        """
        if self.zero_stage_3 and self._gathered is None:
            self._gathered = GatheredModel(model)

    def shard_all_units(self, model: nn.Module) -> None:
        """Free gathered weights, and gather each module's only while it computes."""
        if self._gathered is not None:
            self._gathered.release()
            self._gathered = None

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        if self._gathered is None:
            return super().validation_step(*args, **kwargs)
        with self.precision_plugin.val_step_context():  # not through the engine, which compares the passes of the ranks
            return self.lightning_module.validation_step(*args, **kwargs)

    def whole_weights(self, model: nn.Module) -> Callable[[str], Tensor]:
        """Return a function that gathers all values of a parameter by its name, on every rank.

        It returns the float32 master weight of a trainable parameter. All ranks must call it for the same names in the
        same order.
        """
        from deepspeed.runtime.zero import GatheredParameters
        from deepspeed.utils import safe_get_full_fp32_param

        self.shard_all_units(model)
        weights: dict[str, Any] = dict(model.named_parameters())

        @torch.no_grad()
        def gather_weight(name: str) -> Tensor:
            weight = weights[name]
            if weight.requires_grad:
                return safe_get_full_fp32_param(weight).detach()
            with GatheredParameters([weight], enabled=hasattr(weight, "ds_id")):
                return weight.detach().clone()

        return gather_weight

    # ---- a step

    def block_backward_sync(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()  # ZeRO reduces the gradients of each micro-batch into its slices and sums those

    def pre_backward(self, closure_loss: Tensor) -> None:
        accumulates = should_accumulate(self.lightning_module.trainer)
        self.deepspeed_engine.set_gradient_accumulation_boundary(not accumulates)

    def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Tensor:
        return super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)

    def local_gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Return this rank's slice of each parameter's gradient, summed over ranks and micro-batches and not yet clipped.

        Valid between the last backward of a step and its update, for example in `on_before_optimizer_step`.
        `parameter.grad` is always None.
        """
        if self._sharded_state is None:
            self._sharded_state = self.get_sharded_state(self.lightning_module)
        return self._sharded_state.iter_gradients()

    def gradient_sums(self, model: nn.Module) -> dict[str, float]:
        """Sum the absolute gradient values of each trainable parameter over all ranks. Every rank must call it."""
        names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        sums = dict.fromkeys(names, torch.zeros((), device=self.root_device))
        sums |= {name: gradient.abs().sum().float().to(self.root_device) for name, gradient in self.local_gradients()}
        total = self.reduce(torch.stack([sums[name] for name in names]), reduce_op="sum")
        return dict(zip(names, total.tolist(), strict=True))


def build_zero_config(stage: int, *, offload: bool, bucket_size: int, persistence_threshold: int) -> dict[str, Any]:
    """Build DeepSpeed's configuration. Lightning adds precision, clipping and gradient accumulation."""
    zero_options: dict[str, Any] = {
        "stage": stage,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "reduce_bucket_size": bucket_size,
        "allgather_bucket_size": bucket_size,
    }
    if stage == 3:
        zero_options |= {
            "stage3_prefetch_bucket_size": bucket_size,
            "stage3_param_persistence_threshold": persistence_threshold,
        }
        if offload:
            host_options = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
            zero_options |= {"offload_optimizer": host_options, "offload_param": host_options}
    return {
        "zero_optimization": zero_options,
        "zero_allow_untested_optimizer": True,  # AdamW with our own parameter groups; tests compare it with a single process
        "zero_force_ds_cpu_optimizer": False,
        "train_micro_batch_size_per_gpu": 1,  # for DeepSpeed's throughput log; without it Lightning builds a loader to get it
    }


def get_trained_model(module: L.LightningModule) -> nn.Module:
    """Return the module that is trained and saved: the `model` of a stage, or any other module itself."""
    model = getattr(module, "model", None)
    return model if isinstance(model, nn.Module) else module
