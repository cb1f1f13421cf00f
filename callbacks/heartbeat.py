"""Heartbeat and watchdog callback: each rank reports its activity, and no rank waits for another beyond the timeout."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lit_vlm.compat.lightning import is_last_micro_step
from lit_vlm.fault_tolerance import watchdog as watch
from lit_vlm.fault_tolerance import watchdog_thread
from lit_vlm.fault_tolerance.exit_status import STUCK, RollbackRequest
from lit_vlm.fault_tolerance.watchdog import Activity, Progress, get_progress
from lit_vlm.fault_tolerance.watchdog_thread import ExitNotice, Watchdog
from lit_vlm.types import Batch, UserError

JOIN_SECONDS = 10.0  # seconds


class Heartbeat(L.Callback):
    """Writes `heartbeat/rank-N.json`, and ends a stuck run with the stacks of all ranks in `stuck/` (docs/faults.md).

    Another callback that takes long while ranks wait must report it:
    `with get_progress(trainer).use_activity(Activity.exporting): ...`. This callback must be the last one, so that the time
    of other callbacks in the same hook counts as their activity.

    Args:
        run_dir: run folder.
        heartbeat_seconds: seconds between two heartbeats.
        timeout_minutes: minutes without progress after which all ranks exit.
    """

    def __init__(self, run_dir: Path, heartbeat_seconds: float = 10.0, timeout_minutes: float = 30.0) -> None:
        self.run_dir, self.heartbeat_seconds, self.timeout_seconds = (
            Path(run_dir),
            heartbeat_seconds,
            timeout_minutes * 60,
        )
        self._watchdog: Watchdog | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if trainer.is_global_zero:  # remove the files of an earlier start
            for folder in (watch.HEARTBEAT_FOLDER, watchdog_thread.STUCK_FOLDER):
                shutil.rmtree(self.run_dir / folder, ignore_errors=True)
        trainer.strategy.barrier("heartbeat")
        progress = get_progress(trainer)
        progress.set_activity(Activity.starting)
        ranks = (trainer.global_rank, trainer.world_size)
        self._watchdog = Watchdog(
            progress,
            self.run_dir,
            *ranks,
            heartbeat_seconds=self.heartbeat_seconds,
            timeout_seconds=self.timeout_seconds,
            failing=lambda: trainer.interrupted,
        )
        self._watchdog.start()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._stop_watchdog("left")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Notify the other ranks, which may wait for this one in a collective."""
        if self._watchdog is None:
            return
        with suppress(OSError):  # an error of the run folder must not hide the exception
            self._send_exit_notice(self._watchdog, trainer, exception)
        self._stop_watchdog("failed")

    def _send_exit_notice(self, watchdog: Watchdog, trainer: L.Trainer, exception: BaseException) -> None:
        notice = ExitNotice.read(self.run_dir)
        if notice is not None and notice.code == STUCK:
            watchdog.join(timeout=JOIN_SECONDS)  # it has read the notice and exits with its status
        if _is_timeout(exception):
            watchdog.stop_stuck_run()
        is_shared_error = isinstance(exception, UserError) and not str(exception)  # on all ranks
        is_known = isinstance(exception, SystemExit | RollbackRequest | KeyboardInterrupt) or is_shared_error
        if trainer.world_size > 1 and not is_known:
            ExitNotice(1, f"rank {trainer.global_rank} failed: {exception!r}", []).create_file(self.run_dir)

    def _stop_watchdog(self, state: str) -> None:
        if self._watchdog is not None:
            self._watchdog.stop(state)
            self._watchdog = None

    # ---- activity of the main thread

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        _get_progress(trainer).set_activity(Activity.data)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        is_batch = isinstance(batch, Batch)
        _get_progress(trainer).set_activity(
            Activity.forward,
            step=batch.step if is_batch else trainer.global_step,
            micro_step=batch_idx % trainer.accumulate_grad_batches,
            samples=tuple(batch.sample_ids) if is_batch else (),
        )

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        _get_progress(trainer).set_activity(Activity.backward)

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if is_last_micro_step(trainer):
            _get_progress(trainer).set_activity(Activity.communication)

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if is_last_micro_step(trainer):
            _get_progress(trainer).set_activity(Activity.optimizer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        _get_progress(trainer).set_activity(Activity.data)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        _get_progress(trainer).set_activity(Activity.validation, samples=())

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        samples = tuple(batch.sample_ids) if isinstance(batch, Batch) else ()
        _get_progress(trainer).set_activity(Activity.validation, samples=samples)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        _get_progress(trainer).set_activity(Activity.data)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        _get_progress(trainer).set_activity(Activity.finishing)


def _get_progress(trainer: L.Trainer) -> Progress:
    return get_progress(trainer)


def _is_timeout(exception: BaseException) -> bool:
    """Return whether a collective ran into the timeout of its process group."""
    return isinstance(exception, RuntimeError) and "timed out" in str(exception).lower()
