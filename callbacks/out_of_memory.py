"""A device that runs out of memory: the run goes on with half the micro-batch budget, and the same samples per step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L

from lit_vlm.engine.budget import halve_budget, is_out_of_memory
from lit_vlm.engine.exits import RESTART
from lit_vlm.engine.slurm import own_job
from lit_vlm.engine.watch import Doing, pulse_of
from lit_vlm.engine.watch_thread import Note
from lit_vlm.types import UserError, counted


class OutOfMemory(L.Callback):
    """What a rank does when it runs out of memory, before the exception goes on.

    On one device the state of the step before is saved where the update has not begun, and `tasks/train.py` starts again
    in the same process. With several, the other ranks wait in a collective that this one will never enter: it leaves
    budget.json and a word that all are to leave with exit status RESTART; the next start goes on from the last checkpoint.
    A Slurm job is requeued for it.
    """

    def __init__(self, run_dir: Path, max_oom_retries: int = 3) -> None:
        self.run_dir, self.max_oom_retries = Path(run_dir), max_oom_retries

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if not is_out_of_memory(exception):
            return
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        where = pulse_of(trainer).work
        if trainer.world_size == 1:
            if where.doing not in (Doing.starting, Doing.optimizer):  # else the weights may be half updated
                save_step_before(trainer, pl_module)
            return
        try:
            half = halve_budget(self.run_dir, datamodule, self.max_oom_retries)
        except UserError as error:
            Note(1, str(error), []).leave_together(self.run_dir)
        message = (
            f"Rank {trainer.global_rank} ran out of memory, {where.doing} of step {where.step + 1:,}. The next start goes on "
            f"from the last checkpoint with at most {half.tokens:,} tokens and {counted(half.tiles, 'tile')} in a micro-batch; all "
            f"ranks leave with exit status {RESTART}."
        )
        Note(RESTART, message, []).leave_together(self.run_dir, own_job())


def save_step_before(trainer: L.Trainer, pl_module: L.LightningModule) -> None:
    """Save the state that a step found which will not be finished."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        if hasattr(callback, "save_now"):
            pl_module.zero_grad(set_to_none=True)
            callback.save_now(trainer, pl_module, wait=True)
