"""The protocol that a strategy's shards keep."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

import torch
from torch import Tensor


class Kind(StrEnum):
    """What a tensor of the state is."""

    weight = "weight"  # the float32 master where there is one, else the weight itself
    exp_avg = "exp_avg"  # AdamW's first moment
    exp_avg_sq = "exp_avg_sq"  # its second


MOMENTS = (Kind.exp_avg, Kind.exp_avg_sq)


def adam_state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Any]:
    """AdamW's state of a parameter, made as AdamW would in its first step where it has not stepped yet: so there is one
    layout from the start."""
    state, defaults = optimizer.state[parameter], optimizer.defaults
    if not state:
        on_device = defaults.get("fused") or defaults.get("capturable")
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device if on_device else "cpu")
        for kind in MOMENTS:
            state[kind.value] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    return state


@dataclass(frozen=True, slots=True)
class Piece:
    """An interval of one tensor of the state.

    Attributes:
        name: the parameter's name in `stage.model`, e.g. "model.multi_modal_projector.linear_1.weight".
        shape: of the whole tensor.
        start: the first element of the interval in the flattened tensor; it ends before `start + len(values)`.
        values: [n], a live view: what is copied into it is in the state.
    """

    name: str
    kind: Kind
    shape: tuple[int, ...]
    start: int
    values: Tensor


class Shards(Protocol):
    """This rank's share of what trains. Frozen parameters are not part of it: they are read from where they came from."""

    def pieces(self) -> Iterator[Piece]:
        """Every interval that this rank holds, in an order that does not change; moments are there before the first step, too."""
        ...

    @property
    def writes(self) -> bool:
        """Whether this rank's pieces go to a checkpoint: over the ranks that write, each element is there exactly once."""
        ...

    def loaded(self, step: int) -> None:
        """Called once values were copied into the pieces: brings the weights that compute, and the optimizer's own count
        of steps, in line with them."""
        ...
