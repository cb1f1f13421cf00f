"""Protocol of the sharded state, which every strategy implements."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lit_vlm.types import UserError


class StateKind(StrEnum):
    """Kind of a state tensor: weight or AdamW moment."""

    weight = "weight"  # the float32 master weight if there is one, else the weight itself
    exp_avg = "exp_avg"  # AdamW's first moment
    exp_avg_sq = "exp_avg_sq"  # its second


MOMENTS = (StateKind.exp_avg, StateKind.exp_avg_sq)


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
    """

    name: str
    kind: StateKind
    shape: tuple[int, ...]
    start: int
    values: Tensor


class ShardedState(Protocol):
    """Part of the trainable state that this rank holds. Frozen parameters are not part of it: they are read from their source."""

    def iter_shards(self) -> Iterator[TensorShard]:
        """Yield every shard that this rank holds, in a fixed order. Moments are included before the first step, too."""
        ...

    @property
    def is_writer(self) -> bool:
        """True if this rank writes its shards to a checkpoint. Over all writers, each element occurs exactly once."""
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
        model: its parameter names are the names of the state.
        optimizer: AdamW or Adam, or SGD without momentum.
        rank: this rank; rank 0 writes.

    Raises:
        UserError: the optimizer has other state, which a checkpoint cannot store.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, rank: int = 0) -> None:
        self.optimizer, self.rank = optimizer, rank
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

    def sync_after_load(self, step: int) -> None:
        """Set the optimizer's step count."""
        for parameter in self.parameters.values() if self.has_moments else ():
            get_adam_state(self.optimizer, parameter)["step"].fill_(float(step))


def _flatten(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor as a flat view [n]."""
    return tensor.detach().view(-1)
