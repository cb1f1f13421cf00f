"""Out-of-memory callback: the run resumes with half the micro-batch token limit and the same samples per step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L

from lit_vlm.cluster.slurm import get_own_job
from lit_vlm.fault_tolerance.exit_status import RESTART
from lit_vlm.fault_tolerance.oom import halve_budget, is_out_of_memory
from lit_vlm.fault_tolerance.watchdog import Activity, get_progress
from lit_vlm.fault_tolerance.watchdog_thread import ExitNotice
from lit_vlm.formatting import format_count
from lit_vlm.types import UserError


class OutOfMemory(L.Callback):
    """Handles an out-of-memory error (OOM) of this rank before the exception propagates.

    On one device, the state after the previous step is saved unless the update has started, and `tasks/train.py` restarts
    training in the same process. On several devices, the other ranks wait in a collective that this rank never enters. So
    this rank writes budget.json and an exit notice, all ranks exit with status RESTART, and the next start resumes from the
    last checkpoint. A Slurm job is requeued for this.

    Args:
        run_dir: run folder.
        max_oom_retries: maximum number of times that the limit is halved.
    """

    def __init__(self, run_dir: Path, max_oom_retries: int = 3) -> None:
        self.run_dir, self.max_oom_retries = Path(run_dir), max_oom_retries

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if not is_out_of_memory(exception):
            return
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        state = get_progress(trainer).state
        if trainer.world_size == 1:
            if state.doing not in (Activity.starting, Activity.optimizer):  # else weights may be half updated
                save_previous_step(trainer, pl_module)
            return
        try:
            halved = halve_budget(self.run_dir, datamodule, self.max_oom_retries)
        except UserError as error:
            ExitNotice(1, str(error), []).stop_all_ranks(self.run_dir)
        message = (
            f"Rank {trainer.global_rank} ran out of memory, {state.doing} of step {state.step + 1:,}. The next start resumes "
            f"from the last checkpoint with at most {halved.tokens:,} tokens and {format_count(halved.tiles, 'tile')} in a micro-batch; all "
            f"ranks leave with exit status {RESTART}."
        )
        ExitNotice(RESTART, message, []).stop_all_ranks(self.run_dir, get_own_job())


def save_previous_step(trainer: L.Trainer, pl_module: L.LightningModule) -> None:
    """Save the state from before the current step, which will not be finished."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        if hasattr(callback, "save_now"):
            pl_module.zero_grad(set_to_none=True)
            callback.save_now(trainer, pl_module, wait=True)
