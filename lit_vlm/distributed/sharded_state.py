"""Part of the trainable state that a rank holds, with one interface for all strategies: replicated, FSDP2 and hsdp, ZeRO."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, Protocol

import lightning as L
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lit_vlm.compat import deepspeed
from lit_vlm.compat.deepspeed import ParameterSlice
from lit_vlm.compat.torch import get_local_rows
from lit_vlm.types import UserError


class StateKind(StrEnum):
    """Kind of a state tensor: weight or AdamW moment."""

    weight = "weight"  # the float32 master weight if there is one, else the weight itself
    exp_avg = "exp_avg"  # AdamW's first moment
    exp_avg_sq = "exp_avg_sq"  # its second
    buffer = "buffer"  # state that no optimizer updates, such as a momentum encoder


MOMENTS = (StateKind.exp_avg, StateKind.exp_avg_sq)


def get_state_without_gradient(model: nn.Module) -> dict[str, Any]:
    """Return what training changes without a gradient, by name: momentum encoders and queues of a model that has some."""
    return getattr(model, "state_without_gradient", {})


def get_adam_state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Any]:
    """Return AdamW's state of a parameter: `step`, `exp_avg`, `exp_avg_sq`.

    Before the first step the state is created as AdamW would create it, so the layout is the same from the start.
    """
    state, defaults = optimizer.state[parameter], optimizer.defaults
    if not state:
        on_device = defaults.get("fused") or defaults.get("capturable")
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device if on_device else "cpu")
        for kind in MOMENTS:
            state[kind.value] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    return state


@dataclass(frozen=True, slots=True)
class TensorShard:
    """Interval of one state tensor that this rank holds.

    Attributes:
        name: name of the parameter in `stage.model`, e.g. "model.multi_modal_projector.linear_1.weight".
        shape: shape of the full tensor.
        start: first element of the interval in the flattened tensor; the interval ends before `start + len(values)`.
        values: [n], a live view: a copy into it changes the state.
        is_replica: another rank writes these elements to a checkpoint; this one only reads them.
    """

    name: str
    kind: StateKind
    shape: tuple[int, ...]
    start: int
    values: Tensor
    is_replica: bool = False


class ShardedState(Protocol):
    """Part of the trainable state that this rank holds. Frozen parameters are not part of it: they are read from their source."""

    def iter_shards(self) -> Iterator[TensorShard]:
        """Yield every shard that this rank holds, in a fixed order. Moments are included before the first step, too."""
        ...

    @property
    def is_writer(self) -> bool:
        """True if this rank writes its shards to a checkpoint, but for replicas. Over all writers, each element occurs once."""
        ...

    def sync_after_load(self, step: int) -> None:
        """Update the compute weights and the optimizer's step count after values were copied into the shards.

        Args:
            step: number of optimizer updates in the loaded state.
        """
        ...


class ReplicatedState:
    """Full trainable parameters and AdamW moments, the same on every rank.

    Args:
        model: its parameter names are the names of the state. What training changes besides, the same on every rank, is in
            its attribute `state_without_gradient`: name -> tensor.
        optimizer: AdamW or Adam, or SGD without momentum.
        rank: this rank; rank 0 writes.

    Raises:
        UserError: the optimizer has other state, which a checkpoint cannot store.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, rank: int = 0) -> None:
        self.optimizer, self.rank = optimizer, rank
        self.buffers = get_state_without_gradient(model)
        self.parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
        self.has_moments = isinstance(optimizer, torch.optim.Adam)  # AdamW derives from it
        is_plain_sgd = isinstance(optimizer, torch.optim.SGD) and not any(g["momentum"] for g in optimizer.param_groups)
        if not self.has_moments and not is_plain_sgd:
            raise UserError(
                f"Checkpoints hold AdamW's state, and the optimizer is {type(optimizer).__name__}. Use AdamW, or take the "
                "Checkpoint callback away."
            )

    @property
    def is_writer(self) -> bool:
        """True on rank 0."""
        return self.rank == 0

    def iter_shards(self) -> Iterator[TensorShard]:
        """Yield every parameter and its moments, each as one full interval."""
        for name, parameter in self.parameters.items():
            shape = tuple(parameter.shape)
            yield TensorShard(name, StateKind.weight, shape, 0, _flatten(parameter.data))
            if self.has_moments:
                state = get_adam_state(self.optimizer, parameter)
                for kind in MOMENTS:
                    yield TensorShard(name, kind, shape, 0, _flatten(state[kind.value]))
        for name, value in self.buffers.items():
            yield TensorShard(name, StateKind.buffer, tuple(value.shape), 0, _flatten(value))

    def sync_after_load(self, step: int) -> None:
        """Set the optimizer's step count."""
        for parameter in self.parameters.values() if self.has_moments else ():
            get_adam_state(self.optimizer, parameter)["step"].fill_(float(step))


def _flatten(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor as a flat view [n]."""
    return tensor.detach().view(-1)


class FSDPShardedState:
    """State of a model that `fully_shard` sharded; see `ShardedState`.

    A weight with fewer rows than ranks leaves some ranks without rows; such a rank has no shard of it.

    Args:
        model: see `ReplicatedState`; of its state without gradient, parameters are sharded and buffers are whole on each rank.
        optimizer: AdamW or Adam. For any other optimizer the state has weights only.
        rank: this rank; rank 0 writes what is whole on each rank.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, rank: int = 0) -> None:
        self.model, self.optimizer, self.rank = model, optimizer, rank
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
        yield from self._iter_buffers()

    def _iter_buffers(self) -> Iterator[TensorShard]:
        for name, value in get_state_without_gradient(self.model).items():
            is_whole = not isinstance(value, DTensor)
            rows, start = (value.detach(), 0) if is_whole else get_local_rows(value)
            if rows.numel():
                shard = TensorShard(name, StateKind.buffer, tuple(value.shape), start, rows.view(-1))
                yield replace(shard, is_replica=is_whole and self.rank != 0)

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
        model: see `ReplicatedState`; of its state without gradient, ZeRO-3 partitions the parameters, and the rest is whole.
        optimizer: DeepSpeed's ZeRO optimizer, stage 2 or 3.
        rank: this rank; rank 0 writes what is whole on each rank.
    """

    is_writer = True  # no two ranks hold the same element, but for replicas

    def __init__(self, model: nn.Module, optimizer: Any, rank: int = 0) -> None:
        self.optimizer, self.rank = optimizer, rank
        self.buffers = get_state_without_gradient(model)
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
        for name, value in self.buffers.items():
            held = deepspeed.find_own_part(value)
            if held is None:
                yield TensorShard(name, StateKind.buffer, tuple(value.shape), 0, _flatten(value), self.rank != 0)
            elif held.values.numel():
                yield TensorShard(name, StateKind.buffer, held.shape, held.start, held.values)

    def sync_after_load(self, step: int) -> None:
        """Set the optimizer's step count, and copy the master weights to the compute weights."""
        for group, _ in enumerate(self.master_weights):
            state = self._get_optimizer_state(group)
            if "step" in state:
                state["step"].fill_(step)
        deepspeed.copy_masters_to_weights(self.optimizer)
        deepspeed.gather_again(self.buffers.values())

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


def get_sharded_state(trainer: L.Trainer) -> ShardedState:
    """Return this rank's part of the trainable state. Call it once the strategy has set up model and optimizer."""
    module: Any = trainer.lightning_module
    model, optimizer = getattr(module, "model", module), trainer.optimizers[0]
    if isinstance(trainer.strategy, DeepSpeedStrategy):
        return ZeroShardedState(model, optimizer, trainer.global_rank)
    if isinstance(trainer.strategy, ModelParallelStrategy):
        return FSDPShardedState(model, optimizer, trainer.global_rank)
    return ReplicatedState(model, optimizer, trainer.global_rank)
