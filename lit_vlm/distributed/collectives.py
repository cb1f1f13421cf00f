"""Exchange between ranks: gather values and errors, and the flags by which all ranks take the same decision in a step.

If one rank alone acted on an event (a non-finite loss, a signal, a due checkpoint), the others would wait in a
collective for ever. So a rank only adds to a flag. One all-reduce of a few numbers before the update sums the flags over
all ranks, and every rank acts on the sums:

    get_shared_flags(trainer).add(StepFlag.save)            # any rank, at any time, also in a signal handler
    if get_shared_flags(trainer).get(StepFlag.save): ...    # all ranks, in on_train_batch_end of a step's last micro-batch

`callbacks.Exchange` (and its subclass `Guard`) calls `sync`.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any
from weakref import WeakKeyDictionary

import lightning as L
import torch

from lit_vlm.types import UserError


class StepFlag(StrEnum):
    """Flags of an optimizer step, in the order of the all-reduce. Add new flags here."""

    nonfinite_losses = "bad_loss"  # number of micro-batches with a non-finite loss
    grad_square_sum = "gradient"  # sum of squares of the step's gradient; non-finite if one element is non-finite
    save = "save"  # a checkpoint is requested
    save_failed = "unsaved"  # a checkpoint could not be written
    save_and_stop = "leave"  # save after this step and end the run
    requeue = "requeue"  # the same, and the scheduler restarts the run
    interrupt = "interrupt"  # the same, without a restart: a person stopped the run
    early_stop = "stop"  # the same, and the run counts as finished: early stopping by a sweep


class SharedFlags:
    """Flags of this rank, and their sums over all ranks. With one rank nothing is sent."""

    def __init__(self) -> None:
        self._pending: list[tuple[StepFlag, float]] = []  # append and slicing are safe in signal handlers
        self._sums = dict.fromkeys(StepFlag, 0.0)

    def add(self, flag: StepFlag, value: float = 1.0) -> None:
        """Add to this rank's value for the next sync. It takes no lock and does not wait, so a signal handler may call it."""
        self._pending.append((flag, value))

    def get(self, flag: StepFlag) -> float:
        """Return the sum over all ranks at the last sync; 0 before the first one."""
        return self._sums[flag]

    def sync(self, trainer: L.Trainer) -> None:
        """Sum the flags over all ranks by one all-reduce.

        All ranks call it at the same place, once per optimizer step, before the update. It waits for the slowest rank.
        """
        pending = self._pending[:]
        del self._pending[: len(pending)]
        sums = dict.fromkeys(StepFlag, 0.0)
        for flag, value in pending:
            sums[flag] += value
        self._sums = dict(zip(StepFlag, sum_over_ranks(trainer, list(sums.values())), strict=True))


_flags_by_trainer: WeakKeyDictionary[L.Trainer, SharedFlags] = WeakKeyDictionary()


def get_shared_flags(trainer: L.Trainer) -> SharedFlags:
    """Return the flags of this trainer on this rank; created at the first call."""
    return _flags_by_trainer.setdefault(trainer, SharedFlags())


def sum_over_ranks(trainer: L.Trainer, numbers: list[float]) -> list[float]:
    """Sum each number over all ranks, in float64. All ranks must call it at the same point."""
    if trainer.world_size == 1:
        return numbers
    tensor = torch.tensor(numbers, dtype=torch.float64, device=trainer.strategy.root_device)
    torch.distributed.all_reduce(tensor)
    return tensor.tolist()


def gather_objects(value: Any, world_size: int) -> list[Any]:
    """Gather one object from every rank, in the order of the ranks. All ranks must call it at the same point."""
    if world_size == 1:
        return [value]
    values = [None] * world_size
    torch.distributed.all_gather_object(values, value)
    return values


def make_rank_zero_error(trainer: L.Trainer, message: str) -> UserError:
    """Make the error that all ranks raise. Rank 0 has the message; the others exit with the same status and no message."""
    return UserError(message if trainer.is_global_zero else "")
