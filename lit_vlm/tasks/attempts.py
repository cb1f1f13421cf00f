"""Starting a stage again, in the same process or as a job of Slurm, where that mends what ended it."""

from __future__ import annotations

import gc
from collections.abc import Callable
from itertools import count
from pathlib import Path

import lightning as L
import torch

from callbacks import Heartbeat
from lit_vlm.config import Run
from lit_vlm.data.datamodule import DataModule
from lit_vlm.data.micro_batches import Entered
from lit_vlm.data.plan.ledger import Ledger
from lit_vlm.engine.agreement import Agreement
from lit_vlm.engine.budget import halve_budget, is_out_of_memory
from lit_vlm.engine.exits import RESTART, RollBack
from lit_vlm.engine.slurm import own_job
from lit_vlm.engine.watch_thread import Note
from lit_vlm.stages import Stage
from lit_vlm.tasks.terminal import say
from lit_vlm.types import counted

MOST_ENTERED = 20  # records that turned bad, for each of which a job starts again; more is a disk that fails


class Again(Exception):
    """Start again, from the last checkpoint."""


class GoOnWithout(L.Callback):
    """After a record turned bad while training, the job of Slurm goes back into the queue: the next start leaves it out.

    Args:
        max_share: of the training records; more that turned bad are for a person to look at.
    """

    def __init__(self, run_dir: Path, datamodule: DataModule, max_share: float) -> None:
        self.run_dir, self.datamodule, self.max_share = run_dir, datamodule, max_share

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        job, index, ledger = own_job(), self.datamodule.index, self.datamodule.ledger
        if job is None or not isinstance(exception, Entered) or index is None or ledger is None:
            return
        entered = len(Ledger.read(ledger.path))  # by all ranks
        if entered <= min(MOST_ENTERED, max(1, self.max_share * len(index))):
            Note(RESTART, str(exception), []).leave_together(self.run_dir, job)


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
    """Train. `Again` after a rollback, on all ranks, and when the only device ran out of memory.

    Raises:
        UserError: half the micro-batch budget would not help.
    """
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    callbacks.insert(0, Agreement(run.config, datamodule))
    # what was begun is saved by then, and the other ranks have not heard of a failure
    place = next((place for place, found in enumerate(callbacks) if isinstance(found, Heartbeat)), len(callbacks))
    callbacks.insert(place, GoOnWithout(run.dir, datamodule, run.config.data.max_quarantined))
    try:
        trainer.fit(stage, datamodule)
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
