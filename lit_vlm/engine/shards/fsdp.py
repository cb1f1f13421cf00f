"""Sharded state under FSDP2 and hsdp: a rank holds some rows of each weight and of its moments."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from lit_vlm.engine.shards.base import MOMENTS, StateKind, TensorShard, get_adam_state


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
