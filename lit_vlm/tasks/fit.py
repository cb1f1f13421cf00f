"""Fit of a stage, with the restarts that repair a failure in the same process or as a Slurm job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L

from callbacks import Heartbeat
from callbacks.out_of_memory import save_previous_step
from lit_vlm.cluster.slurm import get_own_job
from lit_vlm.config.choices import OnBadRecord
from lit_vlm.config.schema import DataConfig
from lit_vlm.data.datamodule import DataModule
from lit_vlm.data.micro_batches import RecordLoggedError
from lit_vlm.data.quarantine import Ledger
from lit_vlm.fault_tolerance.exit_status import RESTART, RollbackRequest
from lit_vlm.fault_tolerance.oom import halve_budget, is_out_of_memory
from lit_vlm.fault_tolerance.rank_check import RankConsistencyCheck
from lit_vlm.fault_tolerance.watchdog import Activity, get_progress
from lit_vlm.fault_tolerance.watchdog_thread import ExitNotice
from lit_vlm.formatting import format_count
from lit_vlm.stages import Stage
from lit_vlm.tasks.open_run import RunPlace
from lit_vlm.tasks.restarts import Restart
from lit_vlm.types import UserError

MAX_CORRUPT_RECORDS = 20  # each corrupt record restarts the job once; more of them means a failing disk


class SkipBadRecord(L.Callback):
    """Callback that skips a record which became corrupt during training.

    A single process with data.on_bad_record=quarantine saves the state of the previous step, and `run_fit` requests a
    restart. Any other Slurm job is requeued. The next start skips the record.

    Args:
        data: policy for bad records, and the maximum share of the training records that may be corrupt.
    """

    def __init__(self, run_dir: Path, datamodule: DataModule, data: DataConfig) -> None:
        self.run_dir, self.datamodule, self.data = run_dir, datamodule, data

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if not isinstance(exception, RecordLoggedError):
            return
        job, (num_corrupt, max_corrupt) = get_own_job(), self.count_corrupt_records()
        if self.can_restart_in_process(trainer):
            if num_corrupt <= max_corrupt and get_progress(trainer).state.doing not in (
                Activity.starting,
                Activity.optimizer,
            ):
                save_previous_step(trainer, pl_module)
        elif job is not None and num_corrupt <= min(MAX_CORRUPT_RECORDS, max_corrupt):
            ExitNotice(RESTART, str(exception), []).stop_all_ranks(self.run_dir, job)

    def can_restart_in_process(self, trainer: L.Trainer) -> bool:
        """Return whether this process restarts the stage by itself: one rank, and quarantine is on."""
        return trainer.world_size == 1 and self.data.on_bad_record is OnBadRecord.quarantine

    def count_corrupt_records(self) -> tuple[int, float]:
        """Count the corrupt records that all ranks found.

        Returns:
            Their number, and the maximum at which training still resumes. Above it, a person must look at the data.
        """
        index, ledger = self.datamodule.index, self.datamodule.ledger
        assert index is not None and ledger is not None  # a record was written to the ledger
        return len(Ledger.read(ledger.path)), max(1, self.data.max_quarantined * len(index))


def run_fit(
    trainer: L.Trainer,
    stage: Stage,
    datamodule: DataModule,
    place: RunPlace,
    settings: dict[str, Any],
    *,
    data: DataConfig,
    max_oom_retries: int,
) -> None:
    """Run `trainer.fit`; request a restart where that repairs the failure.

    Args:
        settings: all settings of the run; the ranks compare them before the first step.
        max_oom_retries: guard.max_oom_retries.

    Raises:
        Restart: after a rollback, on all ranks. With one rank also after out of memory, and after a corrupt record that may
            be put into quarantine.
        UserError: half the micro-batch budget would not help, or more records are corrupt than the quarantine may hold.
    """
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    callbacks.insert(0, RankConsistencyCheck(settings, datamodule))
    # at this place the state is already saved, and the other ranks have not been notified of a failure yet
    position = next(
        (position for position, callback in enumerate(callbacks) if isinstance(callback, Heartbeat)), len(callbacks)
    )
    skip_bad_record = SkipBadRecord(place.dir, datamodule, data)
    callbacks.insert(position, skip_bad_record)
    try:
        trainer.fit(stage, datamodule)
    except RecordLoggedError as error:
        if not skip_bad_record.can_restart_in_process(trainer):
            raise
        num_corrupt, max_corrupt = skip_bad_record.count_corrupt_records()
        if num_corrupt > max_corrupt:
            raise UserError(
                f"{error} They are {num_corrupt:,} by now, more than data.max_quarantined="
                f"{data.max_quarantined:g} of the training records."
            ) from None
        place.say(f"{error.finding} It is entered in {error.ledger}, and the run continues without it.")
        raise Restart from None
    except RollbackRequest as back:
        place.say(str(back))
        raise Restart from None
    except RuntimeError as error:
        if trainer.world_size > 1 or not is_out_of_memory(error):
            raise
        budget = halve_budget(place.dir, datamodule, max_oom_retries)
        place.say(
            f"out of memory; resumes with at most {budget.tokens:,} tokens and {format_count(budget.tiles, 'tile')} in a "
            "micro-batch, and the same samples in each step"
        )
        raise Restart from None
