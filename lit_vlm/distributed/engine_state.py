"""Sharded state of each strategy: under FSDP2 and hsdp rows of each weight and of its moments, under ZeRO slices."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from lit_vlm.distributed.sharded_state import (
    MOMENTS,
    ReplicatedState,
    ShardedState,
    StateKind,
    TensorShard,
    get_adam_state,
)


def get_sharded_state(trainer: L.Trainer) -> ShardedState:
    """Return this rank's part of the trainable state. Call it once the strategy has set up model and optimizer."""
    module: Any = trainer.lightning_module
    model, optimizer = getattr(module, "model", module), trainer.optimizers[0]
    if isinstance(trainer.strategy, DeepSpeedStrategy):
        return ZeroShardedState(model, optimizer)
    if isinstance(trainer.strategy, ModelParallelStrategy):
        return FSDPShardedState(model, optimizer)
    return ReplicatedState(model, optimizer, trainer.global_rank)


class FSDPShardedState:
    """State of a model that `fully_shard` sharded; see `ShardedState`.

    A weight with fewer rows than ranks leaves some ranks without rows; such a rank has no shard of it.

    Args:
        optimizer: AdamW or Adam. For any other optimizer the state has weights only.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer
        self.has_moments = isinstance(optimizer, torch.optim.Adam)

    @property
    def is_writer(self) -> bool:
        """True in the first group under hsdp, because all groups hold copies; always true under fsdp2."""
        mesh = next(iter(self._get_trainable_weights().values())).device_mesh
        return "replicate" not in (mesh.mesh_dim_names or ()) or mesh.get_local_rank("replicate") == 0

    def iter_shards(self) -> Iterator[TensorShard]:
        """Yield this rank's rows of each weight and of its moments."""
        for name, parameter in self._get_trainable_weights().items():
            shape = tuple(parameter.shape)
            rows, start = get_local_rows(parameter)
            if not rows.numel():
                continue
            yield TensorShard(name, StateKind.weight, shape, start, rows.view(-1))
            for kind in MOMENTS if self.has_moments else ():
                moment = get_adam_state(self.optimizer, parameter)[kind.value]
                yield TensorShard(name, kind, shape, start, get_local_rows(moment)[0].view(-1))

    def sync_after_load(self, step: int) -> None:
        """Set the optimizer's step count.

        The weights need no update: a forward pass may have left gathered copies, but `_get_trainable_weights` has freed
        them by `reshard`.
        """
        for parameter in self._get_trainable_weights().values() if self.has_moments else ():
            get_adam_state(self.optimizer, parameter)["step"].fill_(float(step))

    def _get_trainable_weights(self) -> dict[str, DTensor]:
        reshard(self.model)
        return {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}  # type: ignore[misc]


def get_local_rows(tensor: DTensor) -> tuple[Tensor, int]:
    """Return this rank's rows of a sharded tensor, as a live view, and the offset of their first element.

    The offset counts elements of the flattened full tensor.
    """
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    width = tensor.shape[1:].numel()
    return cast(DTensor, tensor.detach()).to_local(), offset[0] * width


def reshard(model: nn.Module) -> None:
    """Free gathered weights, so that parameters are local rows again: the root keeps gathered weights until a backward pass."""
    for unit in model.modules():
        if isinstance(unit, FSDPModule):
            unit.reshard()


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


class ZeroShardedState:
    """State of a model under DeepSpeed; see `ShardedState`.

    Args:
        optimizer: DeepSpeed's ZeRO optimizer, stage 2 or 3.
    """

    is_writer = True  # no two ranks hold the same element

    def __init__(self, model: nn.Module, optimizer: Any) -> None:
        self.optimizer = optimizer
        self.partitions_weights = hasattr(optimizer, "fp32_partitioned_groups_flat")  # ZeRO-3
        self.slices = list(self._find_slices(model))

    @property
    def master_weights(self) -> list[Tensor]:
        """Flat float32 master weights that this rank updates, one tensor for each parameter group."""
        if self.partitions_weights:
            return self.optimizer.fp32_partitioned_groups_flat
        return self.optimizer.single_partition_of_fp32_groups

    def iter_shards(self) -> Iterator[TensorShard]:
        """Yield this rank's slices of the master weights, then those of the moments."""
        for part in self.slices:
            yield self._make_shard(part, StateKind.weight, self.master_weights[part.group])
        for part in self.slices:
            state = self._get_optimizer_state(part.group)
            for kind in MOMENTS:
                if kind in state:
                    yield self._make_shard(part, kind, state[kind])

    def sync_after_load(self, step: int) -> None:
        """Set the optimizer's step count, and copy the master weights to the compute weights."""
        for group, _ in enumerate(self.master_weights):
            state = self._get_optimizer_state(group)
            if "step" in state:
                state["step"].fill_(step)
        self._copy_masters_to_weights()

    @torch.no_grad()
    def set_master_weights(self, get_values: Callable[[TensorShard], Tensor]) -> None:
        """Set the master weights of this rank to the values [n] that `get_values` returns for each weight shard."""
        for shard in self.iter_shards():
            if shard.kind is StateKind.weight:
                shard.values.copy_(get_values(shard))
        self._copy_masters_to_weights()

    def iter_gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Yield name and gradient [length] of each slice. Valid between the last backward of a step and its update."""
        for part in self.slices:
            if self.partitions_weights:  # the public method would copy a host gradient to the GPU
                gradient, _ = self.optimizer._get_fp32_grad_state_partition(part.parameter, release_swap_buffers=True)
                yield part.name, gradient[: part.length]
            else:
                parameter: Any = part.parameter
                yield part.name, parameter._hp_mapping.get_lp_grad_fragment(parameter._index_in_param_group).flatten()

    @torch.no_grad()
    def _copy_masters_to_weights(self) -> None:
        """Copy the master weights to the compute weights. All ranks must call it."""
        if not self.partitions_weights:
            self.optimizer.update_lp_params()
            return
        for group, _ in enumerate(self.master_weights):
            self.optimizer._reassign_or_swap_out_partitioned_parameters(group)
        persistent = self.optimizer.persistent_parameters
        if persistent:
            persistent[0].partition(persistent)  # `all_gather` skips parameters that are gathered already
            persistent[0].all_gather(persistent)

    def _get_optimizer_state(self, group: int) -> dict[str, Any]:
        """Return the optimizer state of a group's master tensor; empty for an optimizer without moments."""
        inner_optimizer, master = self.optimizer.optimizer, self.master_weights[group]
        return (
            get_adam_state(inner_optimizer, master)
            if "betas" in inner_optimizer.defaults
            else inner_optimizer.state[master]
        )

    def _make_shard(self, part: ParameterSlice, kind: StateKind, flat: Tensor) -> TensorShard:
        values = flat.detach()[part.offset : part.offset + part.length]
        return TensorShard(part.name, kind, part.shape, part.start, values)

    def _find_slices(self, model: nn.Module) -> Iterator[ParameterSlice]:
        find_slice = self._find_zero3_slice if self.partitions_weights else self._find_zero2_slice
        for name, parameter in model.named_parameters():
            part = find_slice(name, parameter) if parameter.requires_grad else None
            if part is not None and part.length > 0:
                yield part

    def _find_zero2_slice(self, name: str, parameter: Any) -> ParameterSlice | None:
        mapping = parameter._hp_mapping  # None: this rank updates nothing of it
        if mapping is None:
            return None
        parameter_address, master_address = mapping.lp_fragment_address, mapping.hp_fragment_address
        shape = tuple(parameter.shape)
        return ParameterSlice(
            name,
            parameter,
            shape,
            parameter_address.start,
            parameter_address.numel,
            mapping.param_group_index,
            master_address.start,
        )

    def _find_zero3_slice(self, name: str, parameter: Any) -> ParameterSlice:
        group, offset, padded_length = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)]
        start = padded_length * parameter.ds_zero_partition_rank
        length = min(padded_length, parameter.ds_numel - start)  # the last ranks' slices end in padding
        return ParameterSlice(name, parameter, tuple(parameter.ds_shape), start, length, group, offset)
