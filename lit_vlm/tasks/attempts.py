"""Starting a stage again in the same process, where that mends what ended it."""

from __future__ import annotations

import gc
from collections.abc import Callable
from itertools import count

import lightning as L
import torch

from lit_vlm.config import Run
from lit_vlm.data.datamodule import DataModule
from lit_vlm.engine.agreement import Agreement
from lit_vlm.engine.budget import halve_budget, is_out_of_memory
from lit_vlm.engine.exits import RollBack
from lit_vlm.stages import Stage
from lit_vlm.tasks.terminal import say


class Again(Exception):
    """Start again, from the last checkpoint."""


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
    trainer.callbacks.insert(0, Agreement(run.config, datamodule))  # type: ignore[attr-defined]
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
            f"{run.name}: out of memory; goes on with at most {half.tokens:,} tokens and {half.tiles:,} tiles in a "
            "micro-batch, and the same samples in each step"
        )
        raise Again from None
