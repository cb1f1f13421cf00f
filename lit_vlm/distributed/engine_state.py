"""Sharded state under FSDP2 and hsdp (rows of each weight and of its moments), and under ZeRO (slices of flat tensors)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lit_vlm.compat import deepspeed
from lit_vlm.compat.deepspeed import ParameterSlice
from lit_vlm.compat.torch import get_local_rows
from lit_vlm.distributed.sharded_state import MOMENTS, StateKind, TensorShard, get_adam_state


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


def reshard(model: nn.Module) -> None:
    """Free gathered weights, so that parameters are local rows again: the root keeps gathered weights until a backward pass."""
    for unit in model.modules():
        if isinstance(unit, FSDPModule):
            unit.reshard()


class ZeroShardedState:
    """State of a model under DeepSpeed; see `ShardedState`.

    Args:
        optimizer: DeepSpeed's ZeRO optimizer, stage 2 or 3.
    """

    is_writer = True  # no two ranks hold the same element

    def __init__(self, model: nn.Module, optimizer: Any) -> None:
        self.optimizer = optimizer
        self.slices = list(deepspeed.find_slices(optimizer, model))

    @property
    def master_weights(self) -> list[Tensor]:
        """Flat float32 master weights that this rank updates, one tensor for each parameter group."""
        return deepspeed.get_master_weights(self.optimizer)

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
        deepspeed.copy_masters_to_weights(self.optimizer)

    @torch.no_grad()
    def set_master_weights(self, get_values: Callable[[TensorShard], Tensor]) -> None:
        """Set the master weights of this rank to the values [n] that `get_values` returns for each weight shard."""
        for shard in self.iter_shards():
            if shard.kind is StateKind.weight:
                shard.values.copy_(get_values(shard))
        deepspeed.copy_masters_to_weights(self.optimizer)

    def iter_gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Yield name and gradient [length] of each slice. Valid between the last backward of a step and its update."""
        for part in self.slices:
            yield part.name, deepspeed.get_slice_gradient(self.optimizer, part)

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
