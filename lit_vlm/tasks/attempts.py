"""Starting a stage again, in the same process or as a job of Slurm, where that mends what ended it."""

from __future__ import annotations

import gc
from collections.abc import Callable
from itertools import count

import lightning as L
import torch

from callbacks import Heartbeat
from callbacks.out_of_memory import save_step_before
from lit_vlm.config import Run
from lit_vlm.config.schema import OnBadRecord
from lit_vlm.data.datamodule import DataModule
from lit_vlm.data.micro_batches import Entered
from lit_vlm.data.plan.ledger import Ledger
from lit_vlm.engine.agreement import Agreement
from lit_vlm.engine.budget import halve_budget, is_out_of_memory
from lit_vlm.engine.exits import RESTART, RollBack
from lit_vlm.engine.slurm import own_job
from lit_vlm.engine.watch import Doing, pulse_of
from lit_vlm.engine.watch_thread import Note
from lit_vlm.stages import Stage
from lit_vlm.tasks.terminal import say
from lit_vlm.types import UserError, counted

MOST_ENTERED = 20  # records that turned bad, for each of which a job starts again; more is a disk that fails


class Again(Exception):
    """Start again, from the last checkpoint."""


class GoOnWithout(L.Callback):
    """After a record turned bad while training, go on without it.

    One process under data.on_bad_record=quarantine saves the state of the step before, and `fit_or_again` starts again. Any
    other job of Slurm goes back into the queue; the next start leaves the record out.
    """

    def __init__(self, run: Run, datamodule: DataModule) -> None:
        self.run, self.datamodule = run, datamodule

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if not isinstance(exception, Entered):
            return
        job, (entered, most) = own_job(), self.count_entered()
        if self.resumes_alone(trainer):
            if entered <= most and pulse_of(trainer).work.doing not in (Doing.starting, Doing.optimizer):
                save_step_before(trainer, pl_module)
        elif job is not None and entered <= min(MOST_ENTERED, most):
            Note(RESTART, str(exception), []).leave_together(self.run.dir, job)

    def resumes_alone(self, trainer: L.Trainer) -> bool:
        return trainer.world_size == 1 and self.run.config.data.on_bad_record is OnBadRecord.quarantine

    def count_entered(self) -> tuple[int, float]:
        """Records that turned bad, found by all ranks, and how many may; more are for a person to look at."""
        index, ledger = self.datamodule.index, self.datamodule.ledger
        assert index is not None and ledger is not None  # something was entered
        return len(Ledger.read(ledger.path)), max(1, self.run.config.data.max_quarantined * len(index))


def until_done(attempt: Callable[[bool], None]) -> None:
    """Call it until it does not say `Again`; it is told whether it did."""
    for number in count():
        try:
            return attempt(number > 0)
        except Again:
            pass  # only once the exception is gone, and the frames that it holds, is their memory free
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def fit_or_again(trainer: L.Trainer, stage: Stage, datamodule: DataModule, run: Run) -> None:
    """Train. `Again` after a rollback, on all ranks; and where there is one alone, when its device ran out of memory or a
    record turned bad that may be set aside.

    Raises:
        UserError: half the micro-batch budget would not help; more records turned bad than may be set aside.
    """
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    callbacks.insert(0, Agreement(run.config, datamodule))
    # what was begun is saved by then, and the other ranks have not heard of a failure
    place = next((place for place, found in enumerate(callbacks) if isinstance(found, Heartbeat)), len(callbacks))
    go_on_without = GoOnWithout(run, datamodule)
    callbacks.insert(place, go_on_without)
    try:
        trainer.fit(stage, datamodule)
    except Entered as error:
        if not go_on_without.resumes_alone(trainer):
            raise
        entered, most = go_on_without.count_entered()
        if entered > most:
            raise UserError(
                f"{error} They are {entered:,} by now, more than data.max_quarantined="
                f"{run.config.data.max_quarantined:g} of the training records."
            ) from None
        say(f"{run.name}: {error.finding} It is entered in {error.ledger}, and the run goes on without it.")
        raise Again from None
    except RollBack as back:
        say(f"{run.name}: {back}")
        raise Again from None
    except RuntimeError as error:
        if trainer.world_size > 1 or not is_out_of_memory(error):
            raise
        half = halve_budget(run.dir, datamodule, run.config.guard.max_oom_retries)
        say(
            f"{run.name}: out of memory; goes on with at most {half.tokens:,} tokens and {counted(half.tiles, 'tile')} in a "
            "micro-batch, and the same samples in each step"
        )
        raise Again from None
