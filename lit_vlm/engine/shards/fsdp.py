"""What a rank holds under FSDP2 and hsdp: some rows of each weight and of its moments."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from lit_vlm.engine.shards.base import MOMENTS, Kind, Piece, adam_state


class FSDPShards:
    """Shards of a `model` that `fully_shard` shared out; see `Shards`.

    A rank whose turn comes after the last row holds nothing of a weight, and has no piece of it.

    Args:
        optimizer: AdamW or Adam; of another one there are only weights.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer
        self.has_moments = isinstance(optimizer, torch.optim.Adam)

    @property
    def writes(self) -> bool:
        """Under hsdp the groups hold copies; the first one writes."""
        mesh = next(iter(self._trained().values())).device_mesh
        return "replicate" not in (mesh.mesh_dim_names or ()) or mesh.get_local_rank("replicate") == 0

    def pieces(self) -> Iterator[Piece]:
        for name, parameter in self._trained().items():
            shape = tuple(parameter.shape)
            rows, start = rows_of(parameter)
            if not rows.numel():
                continue
            yield Piece(name, Kind.weight, shape, start, rows.view(-1))
            for kind in MOMENTS if self.has_moments else ():
                moment = adam_state(self.optimizer, parameter)[kind.value]
                yield Piece(name, kind, shape, start, rows_of(moment)[0].view(-1))

    def loaded(self, step: int) -> None:
        """Gathered weights are copies that a forward pass may have left behind; `_trained` put the rows in their place."""
        for parameter in self._trained().values() if self.has_moments else ():
            adam_state(self.optimizer, parameter)["step"].fill_(float(step))

    def _trained(self) -> dict[str, DTensor]:
        reshard(self.model)
        return {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}  # type: ignore[misc]


def rows_of(tensor: DTensor) -> tuple[Tensor, int]:
    """This rank's rows of a sharded tensor, a live view, and the number of their first element in the flattened tensor."""
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    width = tensor.shape[1:].numel()
    return cast(DTensor, tensor.detach()).to_local(), offset[0] * width


def reshard(model: nn.Module) -> None:
    """Put the rows in place of gathered weights: the root keeps those of its last forward pass until a backward one."""
    for unit in model.modules():
        if isinstance(unit, FSDPModule):
            unit.reshard()
