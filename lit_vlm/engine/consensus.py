"""What ranks tell each other once per optimizer step, so that all decide alike and at the same place.

A number that one rank alone would act on (a loss that is not finite, a signal, a checkpoint that is due) would leave the
others waiting in a collective. So a rank only tells it; one all-reduce of a few numbers before the update adds up what
was told, and every rank acts on the sum:

    consensus_of(trainer).tell(Word.save)               # any rank, at any time, in a signal handler as well
    if consensus_of(trainer).heard(Word.save): ...      # all ranks, in on_train_batch_end of a step's last micro-batch

`callbacks.Exchange` (and `Guard`, which is one) does the exchange.
"""

from __future__ import annotations

from enum import StrEnum
from weakref import WeakKeyDictionary

import lightning as L
import torch


class Word(StrEnum):
    """What may be told. A word of one's own needs its place here: the ranks exchange the words in this order."""

    bad_loss = "bad_loss"  # micro-batches whose loss is not finite
    gradient = "gradient"  # the sum of the squares of the step's gradient; not finite when one of it is not
    save = "save"  # a checkpoint is wanted
    unsaved = "unsaved"  # a checkpoint could not be written
    leave = "leave"  # the run is to end after this step, saved
    requeue = "requeue"  # and to be started again by the scheduler
    interrupt = "interrupt"  # and not to be started again: a person stopped it
    stop = "stop"  # and counts as done: a sweep has seen enough of it


class Consensus:
    """One rank's side of it. On one rank nothing is sent, and what is heard is what was told."""

    def __init__(self) -> None:
        self._told: list[tuple[Word, float]] = []  # a list, for append and slicing are not torn by a signal handler
        self._heard = dict.fromkeys(Word, 0.0)

    def tell(self, word: Word, value: float = 1.0) -> None:
        """Add to what this rank says in the next exchange. Takes no lock and waits for nothing: signal handlers may."""
        self._told.append((word, value))

    def heard(self, word: Word) -> float:
        """The sum over all ranks as of the last exchange; 0 before the first."""
        return self._heard[word]

    def exchange(self, trainer: L.Trainer) -> None:
        """All ranks at the same place: once per optimizer step, before the update. Waits for the slowest rank."""
        said = self._told[:]
        del self._told[: len(said)]
        sums = dict.fromkeys(Word, 0.0)
        for word, value in said:
            sums[word] += value
        if trainer.world_size > 1:
            numbers = torch.tensor(list(sums.values()), dtype=torch.float64, device=trainer.strategy.root_device)
            torch.distributed.all_reduce(numbers)
            sums = dict(zip(Word, numbers.tolist(), strict=True))
        self._heard = sums


_known: WeakKeyDictionary[L.Trainer, Consensus] = WeakKeyDictionary()


def consensus_of(trainer: L.Trainer) -> Consensus:
    """The one of this trainer, on this rank."""
    return _known.setdefault(trainer, Consensus())


def is_last_micro_step(trainer: L.Trainer) -> bool:
    """Whether the micro-batch in work is the last before the update."""
    return (trainer.fit_loop.epoch_loop.batch_idx + 1) % trainer.accumulate_grad_batches == 0
