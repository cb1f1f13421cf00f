"""Sharded state under DeepSpeed's ZeRO-2 and ZeRO-3: slices of flattened parameters, in flat float32 master weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lit_vlm.engine.shards.base import MOMENTS, Kind, Piece, adam_state


@dataclass(frozen=True, slots=True)
class Share:
    """Elements [start, start + length) of a flattened parameter, stored at `offset` of the flat master tensor of their group."""

    name: str
    parameter: nn.Parameter
    shape: tuple[int, ...]
    start: int
    length: int
    group: int
    offset: int


class ZeroShards:
    """State of a model under DeepSpeed; see `ShardedState`.

    Args:
        optimizer: DeepSpeed's ZeRO optimizer, stage 2 or 3.
    """

    writes = True  # no two ranks hold the same element

    def __init__(self, model: nn.Module, optimizer: Any) -> None:
        self.optimizer = optimizer
        self.partitions_weights = hasattr(optimizer, "fp32_partitioned_groups_flat")  # ZeRO-3
        self.shares = list(self._shares(model))

    @property
    def masters(self) -> list[Tensor]:
        """Flat float32 master weights that this rank updates, one tensor for each parameter group."""
        if self.partitions_weights:
            return self.optimizer.fp32_partitioned_groups_flat
        return self.optimizer.single_partition_of_fp32_groups

    def pieces(self) -> Iterator[Piece]:
        """Yield this rank's slices of the master weights, then those of the moments."""
        for part in self.shares:
            yield self._piece(part, Kind.weight, self.masters[part.group])
        for part in self.shares:
            state = self._state(part.group)
            for kind in MOMENTS:
                if kind in state:
                    yield self._piece(part, kind, state[kind])

    def loaded(self, step: int) -> None:
        """Set the optimizer's step count, and copy the master weights to the compute weights."""
        for group, _ in enumerate(self.masters):
            state = self._state(group)
            if "step" in state:
                state["step"].fill_(step)
        self._compute_with_masters()

    @torch.no_grad()
    def start_from(self, values: Callable[[Piece], Tensor]) -> None:
        """Set the master weights of this rank to the values [n] that `get_values` returns for each weight shard."""
        for shard in self.pieces():
            if shard.kind is Kind.weight:
                shard.values.copy_(values(shard))
        self._compute_with_masters()

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Yield name and gradient [length] of each slice. Valid between the last backward of a step and its update."""
        for part in self.shares:
            if self.partitions_weights:  # the public method would copy a host gradient to the GPU
                gradient, _ = self.optimizer._get_fp32_grad_state_partition(part.parameter, release_swap_buffers=True)
                yield part.name, gradient[: part.length]
            else:
                parameter: Any = part.parameter
                yield part.name, parameter._hp_mapping.get_lp_grad_fragment(parameter._index_in_param_group).flatten()

    @torch.no_grad()
    def _compute_with_masters(self) -> None:
        """Copy the master weights to the compute weights. All ranks must call it."""
        if not self.partitions_weights:
            self.optimizer.update_lp_params()
            return
        for group, _ in enumerate(self.masters):
            self.optimizer._reassign_or_swap_out_partitioned_parameters(group)
        persistent = self.optimizer.persistent_parameters
        if persistent:
            persistent[0].partition(persistent)  # `all_gather` skips parameters that are gathered already
            persistent[0].all_gather(persistent)

    def _state(self, group: int) -> dict[str, Any]:
        """Return the optimizer state of a group's master tensor; empty for an optimizer without moments."""
        inner_optimizer, master = self.optimizer.optimizer, self.masters[group]
        return (
            adam_state(inner_optimizer, master)
            if "betas" in inner_optimizer.defaults
            else inner_optimizer.state[master]
        )

    def _piece(self, share: Share, kind: Kind, flat: Tensor) -> Piece:
        values = flat.detach()[share.offset : share.offset + share.length]
        return Piece(share.name, kind, share.shape, share.start, values)

    def _shares(self, model: nn.Module) -> Iterator[Share]:
        find_slice = self._of_zero3 if self.partitions_weights else self._of_zero2
        for name, parameter in model.named_parameters():
            part = find_slice(name, parameter) if parameter.requires_grad else None
            if part is not None and part.length > 0:
                yield part

    def _of_zero2(self, name: str, parameter: Any) -> Share | None:
        mapping = parameter._hp_mapping  # None: this rank updates nothing of it
        if mapping is None:
            return None
        parameter_address, master_address = mapping.lp_fragment_address, mapping.hp_fragment_address
        shape = tuple(parameter.shape)
        return Share(
            name,
            parameter,
            shape,
            parameter_address.start,
            parameter_address.numel,
            mapping.param_group_index,
            master_address.start,
        )

    def _of_zero3(self, name: str, parameter: Any) -> Share:
        group, offset, padded_length = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)]
        start = padded_length * parameter.ds_zero_partition_rank
        length = min(padded_length, parameter.ds_numel - start)  # the last ranks' slices end in padding
        return Share(name, parameter, tuple(parameter.ds_shape), start, length, group, offset)
