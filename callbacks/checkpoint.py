"""Saves an unfinished run's state, and brings it back at the next start."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lightning as L
from torch import Tensor

from lit_vlm.engine.checkpoint import Belongs, Consumed, Folder, Index, Writer, load, plan_digest
from lit_vlm.engine.checkpoint.loop import go_to, note_validation, pending_row
from lit_vlm.engine.checkpoint.resume import AUTO, Found, find, gathered
from lit_vlm.engine.consensus import Word, consensus_of, is_last_micro_step
from lit_vlm.engine.run_folder import versions
from lit_vlm.engine.shards import Shards, shards_of
from lit_vlm.engine.watch import Doing, pulse_of
from lit_vlm.types import UserError

BEST_BY = "val/loss"


class Checkpoint(L.Callback):
    """Weights that train, optimizer and step, at ends of optimizer steps; at the next start, goes on from the newest good one.

    Each rank writes what it holds, into `run_dir/checkpoints`, which all of them must see. Other callbacks' `state_dict()`
    is kept as JSON: it is called on all ranks, and rank 0's goes on.

    Args:
        run_dir: the run's folder.
        every_steps: optimizer steps between two; None: by the clock alone. After the last step one is saved in any case.
        every_minutes: by rank 0's clock; None: by the steps alone.
        keep_last: older ones are removed.
        keep_best: keep the one of the lowest val/loss as well.
        asynchronous: copy to the host's memory, and write while training goes on.
        resume_from: "auto": the newest good one of the run's folder; "none"; or a checkpoint's folder.
        belongs: what must be the same for a state to go on; None: the model's tensors and the samples alone.
        timeout_minutes: that rank 0 waits for the other ranks' files.
        say: takes what the user should know.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        every_steps: int | None = None,
        every_minutes: float | None = 15.0,
        keep_last: int = 2,
        keep_best: bool = False,
        asynchronous: bool = True,
        resume_from: str = AUTO,
        belongs: Belongs | None = None,
        timeout_minutes: float = 30.0,
        say: Callable[[str], None] = print,
    ) -> None:
        self.folder = Folder(Path(run_dir) / "checkpoints")
        self.every_steps, self.every_minutes = every_steps, every_minutes
        self.keep_last, self.keep_best, self.asynchronous = keep_last, keep_best, asynchronous
        self.resume_from, self.belongs, self.say = resume_from, belongs or Belongs(), say
        self.timeout_minutes = timeout_minutes
        self.stalls: list[float] = []  # seconds that training stood still, of each save
        self._writer: Writer | None = None
        self._shards: Shards | None = None
        self._consumed: Consumed | None = None
        self._saved, self._best = 0, float("inf")  # the last saved step, the lowest val/loss
        self._clock = time.monotonic()

    # ---- going on

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if hasattr(pl_module, "prepare"):
            pl_module.prepare()
        plan = getattr(getattr(trainer, "datamodule", None), "plan", None)
        if plan is not None:
            self._consumed = Consumed(plan)
            self.belongs = replace(self.belongs, plan=plan_digest(plan))
        self._shards = shards_of(trainer)
        found = find(trainer, self._shards, self.folder, self.resume_from, self.belongs, self._tell(trainer))
        if found is not None:
            self._go_on(trainer, found)
        else:
            _continue_logs(trainer, 0)
        self._saved = found[1].step if found else 0
        self._start_writer(trainer)

    def _go_on(self, trainer: L.Trainer, found: Found) -> None:
        path, index = found
        total = f" of {trainer.max_steps:,}" if trainer.max_steps > 0 else ""
        load(path, index, self._shards.pieces())
        self._shards.loaded(index.updates)
        go_to(trainer, index.step)
        if trainer.datamodule is not None:
            trainer.datamodule.start_step = index.step
        self._restore(trainer, index.state)
        self._tell(trainer)(f"goes on at step {index.step:,}{total}, from {path}")

    def _restore(self, trainer: L.Trainer, state: dict[str, Any]) -> None:
        for callback in trainer.callbacks:
            if callback.state_key in state["callbacks"]:
                callback.load_state_dict(state["callbacks"][callback.state_key])
        if state["precision"]:
            trainer.precision_plugin.load_state_dict(state["precision"])
        _continue_logs(trainer, *state["log"])

    def _start_writer(self, trainer: L.Trainer) -> None:
        """Only now is anything written or removed: a start that was refused leaves the folder as it was."""
        ranks = [rank for rank, writes in enumerate(gathered(trainer, self._shards.writes)) if writes]
        if trainer.is_global_zero:
            self.folder.sweep(self._saved)
            best = self.folder.best()
            self._best = best[1] if best else self._best
        self._best = trainer.strategy.broadcast(self._best)  # and nobody writes before the sweep is over
        seconds = 60 * self.timeout_minutes
        self._writer = Writer(
            self.folder, rank=trainer.global_rank, ranks=ranks, keep_last=self.keep_last, timeout_seconds=seconds
        )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        note_validation(trainer)
        self._clock = time.monotonic()

    # ---- when to save

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if not is_last_micro_step(trainer):
            return
        if trainer.is_global_zero and self.every_minutes and time.monotonic() - self._clock > 60 * self.every_minutes:
            consensus_of(trainer).tell(Word.save)
        if self._writer is not None and self._writer.error is not None:
            consensus_of(trainer).tell(Word.unsaved)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not is_last_micro_step(trainer):
            return
        heard, step = consensus_of(trainer).heard, trainer.global_step
        if heard(Word.unsaved):
            self._settle(trainer)
        by_steps = self.every_steps and step % self.every_steps == 0
        # what follows the last step takes long and may fail: validation, answers, export
        last = step == trainer.max_steps or batch_idx + 1 == trainer.num_training_batches
        if by_steps or last or heard(Word.save):
            self.save_now(trainer, pl_module, wait=False)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        loss = trainer.callback_metrics.get(BEST_BY)
        if not self.keep_best or self._writer is None or trainer.sanity_checking or loss is None:
            return
        if float(loss) < self._best:  # over all ranks, so all decide alike
            self._best = float(loss)
            self.save_now(trainer, pl_module, wait=True)
            if trainer.is_global_zero:
                self.folder.point_to_best(trainer.global_step, self._best)
                self.folder.prune(self.keep_last)

    # ---- saving

    def save_now(self, trainer: L.Trainer, pl_module: L.LightningModule, wait: bool = True) -> None:
        """Save the state after the step that is ending. All ranks must call it at the same place.

        Args:
            wait: return once it is on the disk, with its name.

        Raises:
            UserError: it, or the one before, could not be written; on all ranks alike.
        """
        began = time.perf_counter()
        with pulse_of(trainer).during(Doing.saving):
            self._settle(trainer)
            if trainer.global_step > self._saved:
                pieces = list(self._shards.pieces()) if self._shards.writes else []
                self._writer.start(self._index(trainer), pieces, asynchronous=self.asynchronous)
                self._saved, self._clock = trainer.global_step, time.monotonic()
            if wait or not self.asynchronous:
                self._settle(trainer)
        self.stalls.append(time.perf_counter() - began)

    def _index(self, trainer: L.Trainer) -> Index:
        csv = _csv_of(trainer)
        state = {
            "callbacks": {key: value for key, value in map(_state_of, trainer.callbacks) if value},
            "precision": trainer.precision_plugin.state_dict(),
            "log": [csv.num_rows if csv is not None else 0, pending_row(trainer)],
        }
        return Index(
            step=trainer.global_step,
            updates=_updates(trainer),
            intervals=[],
            files=[],
            belongs=self.belongs.as_dict(),
            consumed=self._consumed.until(trainer.global_step) if self._consumed else "",
            state=json.loads(json.dumps(state)),
            versions=versions(),
            written=datetime.now(UTC).isoformat(timespec="seconds"),
        )

    def _settle(self, trainer: L.Trainer) -> None:
        """Wait for the save under way; UserError on all ranks when one of them could not write."""
        if message := self._finished(trainer):
            raise UserError(message if trainer.is_global_zero else "")  # the first rank has the words

    def _finished(self, trainer: L.Trainer) -> str:
        """What is to be said of the save under way once it has ended: nothing, if it is on the disk."""
        # the first rank's writer waits for the others' files: no longer than there is hope
        others = gathered(trainer, "" if trainer.is_global_zero else _in_words(self._writer.finish()))
        told = gathered(trainer, _in_words(self._writer.finish(leaving=any(others))))
        if not any(told):
            return ""
        if trainer.is_global_zero:
            self._writer.give_up()
        before = self.folder.steps()
        kept = f"The one before, of step {before[0]:,}, is whole" if before else "There is none before"
        return (
            f"The checkpoint of step {self._saved:,} could not be written to {self.folder.path}: {next(filter(None, told))}. "
            f"{kept}. Make room, or write fewer (checkpoint.every_steps, checkpoint.keep_last); the same command goes on."
        )

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if message := self._finished(trainer):  # no reason to lose the model, which is saved next
            self._tell(trainer)(message)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if self._writer is not None:
            self._writer.finish(leaving=True)  # what was begun is not lost

    def _tell(self, trainer: L.Trainer) -> Callable[[str], None]:
        return self.say if trainer.is_global_zero else lambda text: None


def _csv_of(trainer: L.Trainer) -> Any:
    """The logger that can go on with its table, if there is one."""
    return next((logger for logger in trainer.loggers if hasattr(logger, "go_on")), None)


def _continue_logs(trainer: L.Trainer, num_rows: int, row: dict[str, Any] | None = None) -> None:
    """The table keeps so many rows, and one that was due then; the other loggers are told what is kept."""
    csv = _csv_of(trainer)
    rows = csv.go_on(num_rows, row) if csv is not None else []
    for logger in trainer.loggers:
        if hasattr(logger, "replay") and trainer.is_global_zero:
            logger.replay(rows)


def _state_of(callback: L.Callback) -> tuple[str, dict[str, Any]]:
    """A callback's state as JSON keeps it."""
    state = callback.state_dict()
    try:
        return callback.state_key, json.loads(json.dumps(state, default=_listed))
    except TypeError as error:
        warnings.warn(f"{type(callback).__name__}.state_dict() is not kept: {error}", stacklevel=2)
        return callback.state_key, {}


def _listed(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is not a number, a text or a list of them")


def _updates(trainer: L.Trainer) -> int:
    """Steps that the optimizer counts; a step that was skipped is none."""
    optimizer: Any = trainer.optimizers[0]
    states = (
        state
        for one in (optimizer, getattr(optimizer, "optimizer", None))
        for state in getattr(one, "state", {}).values()
    )
    counted = [int(state["step"]) for state in states if isinstance(state, dict) and "step" in state]
    return counted[0] if counted else trainer.global_step


def _in_words(error: BaseException | None) -> str:
    if error is None:
        return ""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return f"{type(error).__name__}: {error}"
