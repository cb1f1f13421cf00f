"""Private parts of DeepSpeed and of Lightning's strategy for it: where the ZeRO optimizers keep weights and gradients."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class ParameterSlice:
    """Elements [start, start + length) of a flattened parameter, stored at `offset` of the flat master tensor of their group."""

    name: str
    parameter: nn.Parameter
    shape: tuple[int, ...]
    start: int
    length: int
    group: int
    offset: int


@dataclass(frozen=True, slots=True)
class OwnPart:
    """This rank's elements [start, start + n) of a flattened parameter that ZeRO-3 partitions, as a live view `values` [n]."""

    shape: tuple[int, ...]
    start: int
    values: Tensor


def is_stage_3(optimizer: Any) -> bool:
    """Return True if a ZeRO optimizer partitions the weights."""
    return hasattr(optimizer, "fp32_partitioned_groups_flat")


def get_master_weights(optimizer: Any) -> list[Tensor]:
    """Return the flat float32 master weights that this rank updates, one tensor for each parameter group."""
    return (
        optimizer.fp32_partitioned_groups_flat if is_stage_3(optimizer) else optimizer.single_partition_of_fp32_groups
    )


def find_slices(optimizer: Any, model: nn.Module) -> Iterator[ParameterSlice]:
    """Find the slices of trainable parameters that this rank updates."""
    find_slice = _find_slice_of_stage_3 if is_stage_3(optimizer) else _find_slice_of_stage_2
    for name, parameter in model.named_parameters():
        part = find_slice(optimizer, name, parameter) if parameter.requires_grad else None
        if part is not None and part.length > 0:
            yield part


def _find_slice_of_stage_2(optimizer: Any, name: str, parameter: Any) -> ParameterSlice | None:
    mapping = parameter._hp_mapping  # None: this rank updates nothing of it
    if mapping is None:
        return None
    address, master_address = mapping.lp_fragment_address, mapping.hp_fragment_address
    shape, group = tuple(parameter.shape), mapping.param_group_index
    return ParameterSlice(name, parameter, shape, address.start, address.numel, group, master_address.start)


def _find_slice_of_stage_3(optimizer: Any, name: str, parameter: Any) -> ParameterSlice:
    group, offset, padded_length = optimizer.grad_position[optimizer.get_param_id(parameter)]
    start = padded_length * parameter.ds_zero_partition_rank
    length = min(padded_length, parameter.ds_numel - start)  # the last ranks' slices end in padding
    return ParameterSlice(name, parameter, tuple(parameter.ds_shape), start, length, group, offset)


def get_slice_gradient(optimizer: Any, part: ParameterSlice) -> Tensor:
    """Return the gradient [length] of a slice. Valid between the last backward of a step and its update."""
    parameter: Any = part.parameter
    if is_stage_3(optimizer):  # the public method would copy a host gradient to the GPU
        gradient, _ = optimizer._get_fp32_grad_state_partition(parameter, release_swap_buffers=True)
        return gradient[: part.length]
    return parameter._hp_mapping.get_lp_grad_fragment(parameter._index_in_param_group).flatten()


@torch.no_grad()
def list_held_values(parameter: Any) -> list[Tensor]:
    """List live views of all that this rank holds of a trained parameter: weight, partition, and part of the float32 master."""
    if hasattr(parameter, "ds_tensor"):
        from deepspeed.utils import safe_get_local_fp32_param

        gathered = [parameter.data] if parameter.ds_status.name == "AVAILABLE" else []
        return [*gathered, parameter.ds_tensor, safe_get_local_fp32_param(parameter)]
    mapping = parameter._hp_mapping  # None: this rank updates nothing of it
    return [parameter.data] if mapping is None else [parameter.data, mapping.get_hp_fragment()]


def find_own_part(parameter: Any) -> OwnPart | None:
    """Find this rank's part of a parameter, without padding; None: the parameter is whole on each rank."""
    if not hasattr(parameter, "ds_tensor"):
        return None
    start = parameter.ds_tensor.numel() * parameter.ds_zero_partition_rank
    length = max(0, min(parameter.ds_tensor.numel(), parameter.ds_numel - start))
    return OwnPart(tuple(parameter.ds_shape), start, parameter.ds_tensor.detach()[:length])


def gather_again(parameters: Iterable[Any]) -> None:
    """Gather again what is gathered of partitioned parameters, after their partitions were changed. All ranks must call it."""
    gathered = [one for one in parameters if hasattr(one, "ds_tensor") and one.ds_status.name == "AVAILABLE"]
    if gathered:
        gathered[0].partition(gathered)
        gathered[0].all_gather(gathered)


@torch.no_grad()
def restore_float32(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Give frozen parameters and buffers the float32 values of before DeepSpeed rounded them to the compute dtype.

    A partitioned parameter gets this rank's part of them.
    """
    for name, tensor in tensors.items():
        whole: Any = tensor
        held = getattr(whole, "ds_tensor", whole)
        if held.dtype == values[name].dtype:
            continue
        if held is whole:
            whole.data = values[name].to(whole.device)
            continue
        size, start = whole.ds_tensor.numel(), whole.ds_tensor.numel() * whole.ds_zero_partition_rank
        part = values[name].flatten()[start : start + size].to(whole.ds_tensor.device)
        whole.ds_tensor.data = nn.functional.pad(part, (0, size - len(part)))
        whole.data = torch.empty(0, dtype=part.dtype, device=whole.device)


class GatheredModel:
    """A model whose partitioned weights are gathered, and stay so until `release`. All ranks must make it, and release it.

    Meanwhile DeepSpeed's hooks are off: ranks may run different modules, and read weights outside of the modules that own them.
    Only the engine's own forward pass must not run.
    """

    def __init__(self, model: nn.Module) -> None:
        self.parameters: list[Any] = [one for one in model.parameters() if hasattr(one, "ds_tensor")]
        with torch.inference_mode(False):  # small parameters stay gathered, and training needs tensors that it can save
            self.parameters[0].all_gather(self.parameters)
        self.hooks = [
            (hooks, dict(hooks))
            for module in model.modules()
            for hooks in (module._forward_pre_hooks, module._forward_hooks)
        ]
        for hooks, _ in self.hooks:
            for key in [key for key, hook in hooks.items() if _is_deepspeed_hook(hook)]:
                del hooks[key]

    def release(self) -> None:
        """Free the weights, but for small ones, which stay gathered always, and let DeepSpeed gather them again."""
        for hooks, before in self.hooks:
            hooks.clear()
            hooks.update(before)
        freed = [one for one in self.parameters if not one.ds_persist]
        if freed:
            freed[0].partition(freed)


@torch.no_grad()
def copy_masters_to_weights(optimizer: Any) -> None:
    """Copy the master weights to the compute weights. All ranks must call it."""
    if not is_stage_3(optimizer):
        optimizer.update_lp_params()
        return
    for group, _ in enumerate(get_master_weights(optimizer)):
        optimizer._reassign_or_swap_out_partitioned_parameters(group)
    persistent = optimizer.persistent_parameters
    if persistent:
        persistent[0].partition(persistent)  # `all_gather` skips parameters that are gathered already
        persistent[0].all_gather(persistent)


class ParameterPartitioner:
    """Partitioning of parameters by ZeRO-3, one at a time.

    Args:
        config: DeepSpeed's configuration.
        dtype: compute dtype of the weights.
    """

    def __init__(self, config: dict[str, Any], dtype: torch.dtype) -> None:
        import deepspeed

        # not entered as a context: torch stays unpatched
        self._converter = deepspeed.zero.Init(config_dict_or_path=config, dtype=dtype)

    def partition(self, parameter: Any) -> tuple[Tensor, int]:
        """Partition a parameter. Returns this rank's slice as a live view, padded, and the offset of its first element."""
        self._converter._convert_to_deepspeed_param(parameter)
        parameter.partition()
        return parameter.ds_tensor, parameter.ds_tensor.numel() * parameter.ds_zero_partition_rank


def get_zero_engine(model: Any) -> Any:
    """Return DeepSpeed's engine if a strategy's model is one whose ZeRO optimizer holds the gradients, else None."""
    return model if hasattr(getattr(model, "optimizer", None), "averaged_gradients") else None


def skip_next_update(engine: Any) -> None:
    """Skip one step under ZeRO: DeepSpeed skips a step with an overflow, so report an overflow for one step."""
    zero = engine.optimizer

    def mark_overflow(*_: Any, **__: Any) -> None:
        zero.overflow = True

    patches = {
        "check_grad_overflow": True,
        "check_overflow": mark_overflow,
        "_overflow_check_and_loss_scale_update": mark_overflow,
    }

    def step(closure: Any = None) -> None:
        del zero.step  # restores the method of the class
        before = {name: zero.__dict__[name] for name in patches if name in zero.__dict__}
        zero.__dict__.update(patches)
        try:
            zero.step()
        finally:
            for name in patches:
                del zero.__dict__[name]
            zero.__dict__.update(before)
        if engine.lr_scheduler is not None:  # the learning-rate schedule follows the step number
            engine.lr_scheduler.step()

    zero.step = step


class BaseZeroStrategy(DeepSpeedStrategy):
    """Lightning's DeepSpeed strategy, also on CPU processes with gloo, without the parts that do not fit here."""

    def setup_environment(self) -> None:
        DDPStrategy.setup_environment(self)  # Lightning's own method refuses CPUs

    def setup_distributed(self) -> None:
        if self.root_device.type == "cuda":
            return super().setup_distributed()
        import deepspeed

        # an extension for inference, which is compiled at once and prints to the terminal
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    @property
    def root_device(self) -> torch.device:
        device = super().root_device
        return torch.device("cpu", 0) if device.type == "cpu" else device  # DeepSpeed needs an index

    @property
    def compute_dtype(self) -> torch.dtype:
        """Type in which the model computes, from the Trainer's precision."""
        return self.precision_plugin._desired_dtype

    def complete_config(self) -> None:
        """Add the Trainer's precision and batch size to DeepSpeed's configuration, once."""
        self._init_config_if_needed()

    def _initialize_deepspeed_inference(self, model: nn.Module) -> None:
        """Keep the model's own forward hooks: Lightning removes all hooks, because an earlier fit may have left DeepSpeed's."""
        own_hooks = {
            module: [hook for hook in module._forward_hooks.values() if not _is_deepspeed_hook(hook)]
            for module in model.modules()
        }
        super()._initialize_deepspeed_inference(model)
        for module, hooks in own_hooks.items():
            for hook in hooks:
                module.register_forward_hook(hook)


def _is_deepspeed_hook(hook: Any) -> bool:
    function = getattr(hook, "func", hook)  # the function of a partial
    return str(getattr(function, "__module__", "")).startswith("deepspeed")
