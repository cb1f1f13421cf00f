"""Heartbeat and watchdog callback: each rank reports its activity, and no rank waits for another beyond the timeout."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lit_vlm.engine import watch, watch_thread
from lit_vlm.engine.consensus import is_last_micro_step
from lit_vlm.engine.exits import STUCK, RollBack
from lit_vlm.engine.watch import Doing, Pulse, pulse_of
from lit_vlm.engine.watch_thread import Note, Watch
from lit_vlm.types import Batch, UserError

PATIENCE = 10.0  # seconds


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
        self.run_dir, self.seconds, self.limit = Path(run_dir), heartbeat_seconds, timeout_minutes * 60
        self._watch: Watch | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if trainer.is_global_zero:  # remove the files of an earlier start
            for folder in (watch.FOLDER, watch_thread.FOLDER):
                shutil.rmtree(self.run_dir / folder, ignore_errors=True)
        trainer.strategy.barrier("heartbeat")
        progress = pulse_of(trainer)
        progress.turn_to(Doing.starting)
        ranks = (trainer.global_rank, trainer.world_size)
        self._watch = Watch(
            progress, self.run_dir, *ranks, seconds=self.seconds, limit=self.limit, failing=lambda: trainer.interrupted
        )
        self._watch.start()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._end("left")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Notify the other ranks, which may wait for this one in a collective."""
        if self._watch is None:
            return
        with suppress(OSError):  # an error of the run folder must not hide the exception
            self._announce(self._watch, trainer, exception)
        self._end("failed")

    def _announce(self, watching: Watch, trainer: L.Trainer, exception: BaseException) -> None:
        notice = Note.read(self.run_dir)
        if notice is not None and notice.code == STUCK:
            watching.join(timeout=PATIENCE)  # it has read the notice and exits with its status
        if _is_time_out(exception):
            watching.give_up()
        is_shared_error = isinstance(exception, UserError) and not str(exception)  # on all ranks
        is_known = isinstance(exception, SystemExit | RollBack | KeyboardInterrupt) or is_shared_error
        if trainer.world_size > 1 and not is_known:
            Note(1, f"rank {trainer.global_rank} failed: {exception!r}", []).announce(self.run_dir)

    def _end(self, state: str) -> None:
        if self._watch is not None:
            self._watch.end(state)
            self._watch = None

    # ---- activity of the main thread

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        _pulse(trainer).turn_to(Doing.data)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        is_batch = isinstance(batch, Batch)
        _pulse(trainer).turn_to(
            Doing.forward,
            step=batch.step if is_batch else trainer.global_step,
            micro_step=batch_idx % trainer.accumulate_grad_batches,
            samples=tuple(batch.sample_ids) if is_batch else (),
        )

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        _pulse(trainer).turn_to(Doing.backward)

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if is_last_micro_step(trainer):
            _pulse(trainer).turn_to(Doing.communication)

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if is_last_micro_step(trainer):
            _pulse(trainer).turn_to(Doing.optimizer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        _pulse(trainer).turn_to(Doing.data)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        _pulse(trainer).turn_to(Doing.validation, samples=())

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        samples = tuple(batch.sample_ids) if isinstance(batch, Batch) else ()
        _pulse(trainer).turn_to(Doing.validation, samples=samples)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        _pulse(trainer).turn_to(Doing.data)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        _pulse(trainer).turn_to(Doing.finishing)


def _pulse(trainer: L.Trainer) -> Pulse:
    return pulse_of(trainer)


def _is_time_out(exception: BaseException) -> bool:
    """Return whether a collective ran into the timeout of its process group."""
    return isinstance(exception, RuntimeError) and "timed out" in str(exception).lower()
