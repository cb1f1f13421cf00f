"""One device or DDP: every rank holds the whole state, and rank 0 writes it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from lit_vlm.engine.shards.base import Kind, Piece
from lit_vlm.types import UserError


class Whole:
    """All of each parameter that trains, and of AdamW's moments.

    Args:
        model: its names are the state's.
        optimizer: AdamW or Adam, or SGD without momentum.
        rank: 0 writes.

    Raises:
        UserError: the optimizer keeps another state than that.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, rank: int = 0) -> None:
        self.optimizer, self.rank = optimizer, rank
        self.parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
        self.has_moments = isinstance(optimizer, torch.optim.Adam)  # AdamW derives from it
        plain = isinstance(optimizer, torch.optim.SGD) and not any(g["momentum"] for g in optimizer.param_groups)
        if not self.has_moments and not plain:
            raise UserError(
                f"Checkpoints hold AdamW's state, and the optimizer is {type(optimizer).__name__}. Use AdamW, or take the "
                "Checkpoint callback away."
            )
        if self.has_moments:
            self._make_moments()

    @property
    def writes(self) -> bool:
        return self.rank == 0

    def pieces(self) -> Iterator[Piece]:
        for name, parameter in self.parameters.items():
            shape = tuple(parameter.shape)
            yield Piece(name, Kind.weight, shape, 0, _flat(parameter.data))
            if self.has_moments:
                state = self.optimizer.state[parameter]
                for kind in (Kind.exp_avg, Kind.exp_avg_sq):
                    yield Piece(name, kind, shape, 0, _flat(state[kind.value]))

    def loaded(self, step: int) -> None:
        for parameter in self.parameters.values() if self.has_moments else ():
            self.optimizer.state[parameter]["step"].fill_(float(step))

    def _make_moments(self) -> None:
        """As AdamW makes them in its first step, so that there is one layout from the start."""
        defaults = self.optimizer.defaults
        on_device = defaults.get("fused") or defaults.get("capturable")
        for parameter in self.parameters.values():
            state = self.optimizer.state[parameter]
            if not state:
                state["step"] = torch.zeros((), device=parameter.device if on_device else "cpu")
                for kind in (Kind.exp_avg, Kind.exp_avg_sq):
                    state[kind.value] = torch.zeros_like(parameter, memory_format=torch.preserve_format)


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """[n], a view."""
    return tensor.detach().view(-1)
