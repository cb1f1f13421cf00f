"""Replicated state on one device or under DDP: every rank holds the full state, and rank 0 writes it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from lit_vlm.engine.shards.base import MOMENTS, StateKind, TensorShard, get_adam_state
from lit_vlm.types import UserError


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
