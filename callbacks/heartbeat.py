"""Each rank says where it is, and no rank waits for another longer than the run's time limit."""

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
    """Writes `heartbeat/rank-N.json`; ends a stuck run with the stacks of all ranks in `stuck/` (docs/faults.md).

    Another callback that takes long while ranks wait says so: `with pulse_of(trainer).during(Doing.exporting): ...`. To be
    the last of the callbacks, so that what the others do at the same places is seen as theirs.

    Args:
        heartbeat_seconds: between two heartbeats.
        timeout_minutes: without anything going on, after which all ranks leave.
    """

    def __init__(self, run_dir: Path, heartbeat_seconds: float = 10.0, timeout_minutes: float = 30.0) -> None:
        self.run_dir, self.seconds, self.limit = Path(run_dir), heartbeat_seconds, timeout_minutes * 60
        self._watch: Watch | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if trainer.is_global_zero:  # what an earlier start left
            for folder in (watch.FOLDER, watch_thread.FOLDER):
                shutil.rmtree(self.run_dir / folder, ignore_errors=True)
        trainer.strategy.barrier("heartbeat")
        pulse = pulse_of(trainer)
        pulse.turn_to(Doing.starting)
        ranks = (trainer.global_rank, trainer.world_size)
        self._watch = Watch(
            pulse, self.run_dir, *ranks, seconds=self.seconds, limit=self.limit, failing=lambda: trainer.interrupted
        )
        self._watch.start()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._end("left")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Other ranks may wait for this one, and never hear of it."""
        if self._watch is None:
            return
        with suppress(OSError):  # of the run's folder; the exception itself is what counts
            self._announce(self._watch, trainer, exception)
        self._end("failed")

    def _announce(self, watching: Watch, trainer: L.Trainer, exception: BaseException) -> None:
        note = Note.read(self.run_dir)
        if note is not None and note.code == STUCK:
            watching.join(timeout=PATIENCE)  # it has read that, too, and ends this process with the right status
        if _is_time_out(exception):
            watching.give_up()
        alike = isinstance(exception, UserError) and not str(exception)  # on all ranks; the first one has the words
        told = isinstance(exception, SystemExit | RollBack | KeyboardInterrupt) or alike
        if trainer.world_size > 1 and not told:
            Note(1, f"rank {trainer.global_rank} failed: {exception!r}", []).announce(self.run_dir)

    def _end(self, state: str) -> None:
        if self._watch is not None:
            self._watch.end(state)
            self._watch = None

    # ---- where the main thread is

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        _pulse(trainer).turn_to(Doing.data)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        known = isinstance(batch, Batch)
        _pulse(trainer).turn_to(
            Doing.forward,
            step=batch.step if known else trainer.global_step,
            micro_step=batch_idx % trainer.accumulate_grad_batches,
            samples=tuple(batch.sample_ids) if known else (),
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
    """A collective that waited as long as its process group allows."""
    return isinstance(exception, RuntimeError) and "timed out" in str(exception).lower()
