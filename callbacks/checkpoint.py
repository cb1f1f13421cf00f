"""Checkpoint callback: saves the state of an unfinished run, and resumes from it at the next start."""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lightning as L
from torch import Tensor

from lit_vlm.checkpoint.folder import CheckpointFolder
from lit_vlm.checkpoint.index import CheckpointIndex, RunFingerprint, SampleHash, compute_plan_digest
from lit_vlm.checkpoint.resume import AUTO, FoundCheckpoint, find_resume_checkpoint, load_tensors
from lit_vlm.checkpoint.write import CheckpointWriter
from lit_vlm.compat.lightning import (
    get_pending_metrics,
    is_last_micro_step,
    move_validation_to_previous_step,
    set_loop_position,
)
from lit_vlm.distributed.collectives import StepFlag, gather_objects, get_shared_flags, make_rank_zero_error
from lit_vlm.distributed.sharded_state import ShardedState, get_sharded_state
from lit_vlm.fault_tolerance.watchdog import Activity, get_progress
from lit_vlm.runs.run_folder import get_package_versions

VALIDATION_METRIC = "val/loss"


class Checkpoint(L.Callback):
    """Saves trained weights, optimizer state and step at the end of optimizer steps, and resumes from the newest valid checkpoint.

    Each rank writes its own shards into `run_dir/checkpoints`, a folder that all ranks must be able to read. The
    `state_dict()` of other callbacks is stored as JSON. It is called on all ranks, and the state of rank 0 is stored.

    Args:
        run_dir: run folder.
        every_steps: optimizer steps between two checkpoints. None: save by the clock alone. A checkpoint is always saved
            after the last step.
        every_minutes: minutes between two checkpoints, by the clock of rank 0. None: save by steps alone.
        keep_last: number of newest checkpoints to keep. Older ones are removed.
        keep_best: also keep the checkpoint with the best `best_metric`.
        best_metric: "val/loss" (lowest is best), or a recall or a score of the exam (highest is best).
        asynchronous: copy the state to host memory, and write it while training continues.
        resume_from: "auto": the newest valid checkpoint of the run folder; "none": start from step 0; or the path of a
            checkpoint folder.
        belongs: fingerprint that a checkpoint must share with this run. None: only tensors and samples must match.
        timeout_minutes: maximum minutes that rank 0 waits for the files of the other ranks.
        say: called with each line for the user.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        every_steps: int | None = None,
        every_minutes: float | None = 15.0,
        keep_last: int = 2,
        keep_best: bool = False,
        best_metric: str = VALIDATION_METRIC,
        asynchronous: bool = True,
        resume_from: str = AUTO,
        belongs: RunFingerprint | None = None,
        timeout_minutes: float = 30.0,
        say: Callable[[str], None] = print,
    ) -> None:
        self.folder = CheckpointFolder(Path(run_dir) / "checkpoints")
        self.every_steps, self.every_minutes = every_steps, every_minutes
        self.keep_last, self.keep_best, self.asynchronous = keep_last, keep_best, asynchronous
        self.best_metric = best_metric
        self.resume_from, self.fingerprint, self.say = resume_from, belongs or RunFingerprint(), say
        self.timeout_minutes = timeout_minutes
        self.stall_seconds: list[float] = []  # seconds that each save stalled training
        self._writer: CheckpointWriter | None = None
        self._shards: ShardedState  # set in on_fit_start
        self._sample_hash: SampleHash | None = None
        self._saved_step = 0  # last saved step
        self._best_value: float | None = None  # of best_metric
        self._last_save_time = time.monotonic()

    @property
    def writer(self) -> CheckpointWriter:
        """Writer of this run's checkpoints; there is one while a fit runs."""
        assert self._writer is not None
        return self._writer

    # ---- resume

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if hasattr(pl_module, "prepare"):
            pl_module.prepare()
        plan = getattr(getattr(trainer, "datamodule", None), "plan", None)
        if plan is not None:
            self._sample_hash = SampleHash(plan)
            self.fingerprint = replace(self.fingerprint, plan=compute_plan_digest(plan))
        self._shards = get_sharded_state(trainer)
        found = find_resume_checkpoint(
            trainer, self._shards, self.folder, self.resume_from, self.fingerprint, self._get_reporter(trainer)
        )
        if found is not None:
            self._resume(trainer, found)
        else:
            _resume_loggers(trainer, 0)
        self._saved_step = found[1].step if found else 0
        self._start_writer(trainer)

    def _resume(self, trainer: L.Trainer, found: FoundCheckpoint) -> None:
        path, index = found
        total = f" of {trainer.max_steps:,}" if trainer.max_steps > 0 else ""
        load_tensors(path, index, self._shards.iter_shards())
        self._shards.sync_after_load(index.updates)
        set_loop_position(trainer, index.step)
        if trainer.datamodule is not None:
            trainer.datamodule.start_step = index.step
        self._load_callback_states(trainer, index.state)
        self._get_reporter(trainer)(f"resumes at step {index.step:,}{total}, from {path}")

    def _load_callback_states(self, trainer: L.Trainer, state: dict[str, Any]) -> None:
        for callback in trainer.callbacks:
            if callback.state_key in state["callbacks"]:
                callback.load_state_dict(state["callbacks"][callback.state_key])
        if state["precision"]:
            trainer.precision_plugin.load_state_dict(state["precision"])
        _resume_loggers(trainer, *state["log"])

    def _start_writer(self, trainer: L.Trainer) -> None:
        """Create the writer and clean up the checkpoint folder.

        Nothing is written or removed before this call. A start that was refused leaves the folder unchanged.
        """
        writers = [
            rank for rank, writes in enumerate(gather_objects(self._shards.is_writer, trainer.world_size)) if writes
        ]
        if trainer.is_global_zero:
            self.folder.clean_before_run(self._saved_step)
            best = self.folder.read_best(self.best_metric)
            self._best_value = best[1] if best else None
        # also a barrier: no rank writes before the cleanup ends
        self._best_value = trainer.strategy.broadcast(self._best_value)
        seconds = 60 * self.timeout_minutes
        self._writer = CheckpointWriter(
            self.folder,
            rank=trainer.global_rank,
            writer_ranks=writers,
            keep_last=self.keep_last,
            timeout_seconds=seconds,
        )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        move_validation_to_previous_step(trainer)
        self._last_save_time = time.monotonic()

    # ---- when to save

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if not is_last_micro_step(trainer):
            return
        if (
            trainer.is_global_zero
            and self.every_minutes
            and time.monotonic() - self._last_save_time > 60 * self.every_minutes
        ):
            get_shared_flags(trainer).add(StepFlag.save)
        if self._writer is not None and self._writer.error is not None:
            get_shared_flags(trainer).add(StepFlag.save_failed)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not is_last_micro_step(trainer):
            return
        flag_sum, step = get_shared_flags(trainer).get, trainer.global_step
        if flag_sum(StepFlag.save_failed):
            self._wait_for_save(trainer)
        by_steps = self.every_steps and step % self.every_steps == 0
        # validation, generation and export follow the last step: they take long and may fail
        last = step == trainer.max_steps or batch_idx + 1 == trainer.num_training_batches
        if by_steps or last or flag_sum(StepFlag.save):
            self.save_now(trainer, pl_module, wait=False)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        name = self.best_metric if self.best_metric.startswith("val/") else VALIDATION_METRIC
        value = trainer.callback_metrics.get(name)
        if not trainer.sanity_checking and value is not None:
            self.update_best(trainer, pl_module, {name: float(value)})

    def update_best(self, trainer: L.Trainer, pl_module: L.LightningModule, metrics: Mapping[str, float]) -> None:
        """Save a checkpoint and mark it as the best one, if `best_metric` is among the metrics and is better than before.

        All ranks must call it at the same point with the same metrics, so that they take the same decision.
        """
        value = metrics.get(self.best_metric)
        if not self.keep_best or self._writer is None or value is None or math.isnan(value):
            return
        sign = -1 if self.best_metric == VALIDATION_METRIC else 1
        if self._best_value is None or sign * value > sign * self._best_value:
            self._best_value = value
            self.save_now(trainer, pl_module, wait=True)
            if trainer.is_global_zero:
                self.folder.mark_best(trainer.global_step, value, self.best_metric)
                self.folder.remove_old(self.keep_last)

    # ---- saving

    def save_now(self, trainer: L.Trainer, pl_module: L.LightningModule, wait: bool = True) -> None:
        """Save a checkpoint of the state after the current step. All ranks must call it at the same point.

        Args:
            wait: return only after the checkpoint is on disk under its final name.

        Raises:
            UserError: this checkpoint or the one before could not be written. All ranks raise it.
        """
        start = time.perf_counter()
        with get_progress(trainer).use_activity(Activity.saving):
            self._wait_for_save(trainer)
            if trainer.global_step > self._saved_step:
                pieces = [one for one in self._shards.iter_shards() if self._shards.is_writer and not one.is_replica]
                self.writer.start(self._make_index(trainer), pieces, asynchronous=self.asynchronous)
                self._saved_step, self._last_save_time = trainer.global_step, time.monotonic()
            if wait or not self.asynchronous:
                self._wait_for_save(trainer)
        self.stall_seconds.append(time.perf_counter() - start)

    def _make_index(self, trainer: L.Trainer) -> CheckpointIndex:
        csv = _find_csv_logger(trainer)
        state = {
            "callbacks": {key: value for key, value in map(_get_callback_state, trainer.callbacks) if value},
            "precision": trainer.precision_plugin.state_dict(),
            "log": [csv.num_rows if csv is not None else 0, get_pending_metrics(trainer)],
        }
        return CheckpointIndex(
            step=trainer.global_step,
            updates=_count_updates(trainer),
            intervals=[],
            files=[],
            belongs=self.fingerprint.to_dict(),
            consumed=self._sample_hash.compute_digest(trainer.global_step) if self._sample_hash else "",
            state=json.loads(json.dumps(state)),
            versions=get_package_versions(),
            written=datetime.now(UTC).isoformat(timespec="seconds"),
        )

    def _wait_for_save(self, trainer: L.Trainer) -> None:
        """Wait for the current save. Raise UserError on all ranks if one rank could not write."""
        if message := self._collect_save_error(trainer):
            raise make_rank_zero_error(trainer, message)

    def _collect_save_error(self, trainer: L.Trainer) -> str:
        """Wait for the current save and return its error message; "" if the checkpoint is on disk."""
        # The writer of rank 0 waits for the files of the other ranks. It stops early if one of them failed.
        world_size = trainer.world_size
        own_error = "" if trainer.is_global_zero else _format_error(self.writer.wait())
        other_errors = gather_objects(own_error, world_size)
        errors = gather_objects(_format_error(self.writer.wait(aborting=any(other_errors))), world_size)
        if not any(errors):
            return ""
        if trainer.is_global_zero:
            self.writer.remove_unfinished()
        steps = self.folder.list_steps()
        kept = f"The one before, of step {steps[0]:,}, is whole" if steps else "There is none before"
        return (
            f"The checkpoint of step {self._saved_step:,} could not be written to {self.folder.path}: {next(filter(None, errors))}. "
            f"{kept}. Make room, or write fewer (checkpoint.every_steps, checkpoint.keep_last); the same command resumes it."
        )

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if message := self._collect_save_error(trainer):  # reported, not raised: the export comes next
            self._get_reporter(trainer)(message)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if self._writer is not None:
            self._writer.wait(aborting=True)  # complete a save that has started

    def _get_reporter(self, trainer: L.Trainer) -> Callable[[str], None]:
        return self.say if trainer.is_global_zero else lambda text: None


def _find_csv_logger(trainer: L.Trainer) -> Any:
    """Find the logger that can resume its CSV table; None if there is none."""
    return next((logger for logger in trainer.loggers if hasattr(logger, "go_on")), None)


def _resume_loggers(trainer: L.Trainer, num_rows: int, row: dict[str, Any] | None = None) -> None:
    """Cut the CSV table to `num_rows` rows plus the pending row, and send the remaining rows to the other loggers."""
    csv = _find_csv_logger(trainer)
    rows = csv.go_on(num_rows, row) if csv is not None else []
    for logger in trainer.loggers:
        if hasattr(logger, "replay") and trainer.is_global_zero:
            logger.replay(rows)


def _get_callback_state(callback: L.Callback) -> tuple[str, dict[str, Any]]:
    """Return the state key and the JSON-serialisable state of a callback; {} with a warning if JSON cannot hold it."""
    state = callback.state_dict()
    try:
        return callback.state_key, json.loads(json.dumps(state, default=_convert_to_list))
    except TypeError as error:
        warnings.warn(f"{type(callback).__name__}.state_dict() is not kept: {error}", stacklevel=2)
        return callback.state_key, {}


def _convert_to_list(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is not a number, a text or a list of them")


def _count_updates(trainer: L.Trainer) -> int:
    """Count the updates of the optimizer. Skipped steps do not count."""
    optimizer: Any = trainer.optimizers[0]
    states = (
        state
        for candidate in (optimizer, getattr(optimizer, "optimizer", None))
        for state in getattr(candidate, "state", {}).values()
    )
    counts = [int(state["step"]) for state in states if isinstance(state, dict) and "step" in state]
    return counts[0] if counts else trainer.global_step


def _format_error(error: BaseException | None) -> str:
    if error is None:
        return ""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return f"{type(error).__name__}: {error}"
