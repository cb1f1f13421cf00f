"""Flags that ranks exchange once per optimizer step, so that all ranks take the same decision at the same place.

If one rank alone acted on an event (a non-finite loss, a signal, a due checkpoint), the others would wait in a
collective for ever. So a rank only adds to a flag. One all-reduce of a few numbers before the update sums the flags over
all ranks, and every rank acts on the sums:

    get_shared_flags(trainer).add(StepFlag.save)            # any rank, at any time, also in a signal handler
    if get_shared_flags(trainer).get(StepFlag.save): ...    # all ranks, in on_train_batch_end of a step's last micro-batch

`callbacks.Exchange` (and its subclass `Guard`) calls `sync`.
"""

from __future__ import annotations

from enum import StrEnum
from weakref import WeakKeyDictionary

import lightning as L
import torch


class Word(StrEnum):
    """Flags of an optimizer step, in the order of the all-reduce. Add new flags here."""

    bad_loss = "bad_loss"  # number of micro-batches with a non-finite loss
    gradient = "gradient"  # sum of squares of the step's gradient; non-finite if one element is non-finite
    save = "save"  # a checkpoint is requested
    unsaved = "unsaved"  # a checkpoint could not be written
    leave = "leave"  # save after this step and end the run
    requeue = "requeue"  # the same, and the scheduler restarts the run
    interrupt = "interrupt"  # the same, without a restart: a person stopped the run
    stop = "stop"  # the same, and the run counts as finished: early stopping by a sweep


class Consensus:
    """Flags of this rank, and their sums over all ranks. With one rank nothing is sent."""

    def __init__(self) -> None:
        self._told: list[tuple[Word, float]] = []  # append and slicing are safe in signal handlers
        self._heard = dict.fromkeys(Word, 0.0)

    def tell(self, word: Word, value: float = 1.0) -> None:
        """Add to this rank's value for the next sync. It takes no lock and does not wait, so a signal handler may call it."""
        self._told.append((word, value))

    def heard(self, word: Word) -> float:
        """Return the sum over all ranks at the last sync; 0 before the first one."""
        return self._heard[word]

    def exchange(self, trainer: L.Trainer) -> None:
        """Sum the flags over all ranks by one all-reduce.

        All ranks call it at the same place, once per optimizer step, before the update. It waits for the slowest rank.
        """
        pending = self._told[:]
        del self._told[: len(pending)]
        sums = dict.fromkeys(Word, 0.0)
        for flag, value in pending:
            sums[flag] += value
        if trainer.world_size > 1:
            numbers = torch.tensor(list(sums.values()), dtype=torch.float64, device=trainer.strategy.root_device)
            torch.distributed.all_reduce(numbers)
            sums = dict(zip(Word, numbers.tolist(), strict=True))
        self._heard = sums


_known: WeakKeyDictionary[L.Trainer, Consensus] = WeakKeyDictionary()


def consensus_of(trainer: L.Trainer) -> Consensus:
    """Return the flags of this trainer on this rank; created at the first call."""
    return _known.setdefault(trainer, Consensus())


def is_last_micro_step(trainer: L.Trainer) -> bool:
    """Return True if the current micro-batch is the last one before the update (gradient accumulation)."""
    return (trainer.fit_loop.epoch_loop.batch_idx + 1) % trainer.accumulate_grad_batches == 0
