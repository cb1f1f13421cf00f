"""Guard against non-finite losses and gradients. All ranks take the same decision before the step changes the weights."""

from __future__ import annotations

import math
from itertools import count
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lit_vlm.config.schema import OnNonfinite
from lit_vlm.engine.consensus import Word, consensus_of, is_last_micro_step
from lit_vlm.engine.exits import RollBack
from lit_vlm.engine.gradients import discard, square_sum
from lit_vlm.engine.skipped import NAME, add_skipped, read_skipped
from lit_vlm.types import Batch, UserError, escape_controls

NUM_NAMED = 40  # maximum number of sample ids in a message


class Exchange(L.Callback):
    """Exchanges the flags of all ranks before each update (`engine/consensus.py`).

    Signals and due checkpoints depend on this exchange, so a run without the guard has this callback instead.
    """

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if is_last_micro_step(trainer):
            self.before_exchange(trainer, optimizer)
            consensus_of(trainer).exchange(trainer)
            self.after_exchange(trainer, pl_module, optimizer)

    def before_exchange(self, trainer: L.Trainer, optimizer: torch.optim.Optimizer) -> None:
        """Set the flags of this rank for the current step. Called before the all-reduce."""

    def after_exchange(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Act on the summed flags of all ranks. Called after the all-reduce, before the update."""


class Guard(Exchange):
    """Checks that the micro-batch losses and the gradient of each step are finite, over all ranks.

    Under float16 the gradient scaler checks the gradient itself and expects non-finite values from time to time, so only
    the loss is checked here. Reading the values makes the host wait for the device once per optimizer step.

    Args:
        run_dir: run folder, which holds `skipped.jsonl`. None: skipped steps are only counted.
        on_nonfinite: "stop"; "skip", which leaves weights, moments and the optimizer's step count unchanged while the
            learning-rate schedule advances; or "rollback", which lists the step and raises `RollbackRequest`. A step that
            an earlier start has listed is skipped without a new check.
        max_skipped: maximum number of consecutive skipped steps. One more stops the run.
    """

    def __init__(
        self, run_dir: Path | None = None, on_nonfinite: OnNonfinite | str = OnNonfinite.stop, max_skipped: int = 10
    ) -> None:
        self.run_dir, self.on_nonfinite, self.max_skipped = run_dir, OnNonfinite(on_nonfinite), max_skipped
        self._listed: set[int] = set()
        self._step = 0
        self._ids: list[list[str]] = []  # one list per micro-batch since the last optimizer step, this rank
        self._losses: list[Tensor] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        listed = list(read_skipped(self.run_dir)) if self.run_dir else []
        # another rank may see an older version of the file
        self._listed = set(trainer.strategy.broadcast(listed))
        self._ids, self._losses = [], []
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        if hasattr(datamodule, "left_out"):
            datamodule.left_out = frozenset(self._listed)  # the loader reads nothing for these

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._ids, self._losses = [], []
        self._step = batch.step if isinstance(batch, Batch) else trainer.global_step
        self._ids.append(list(batch.sample_ids) if isinstance(batch, Batch) else [f"batch {batch_idx}"])

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        self._losses.append(loss.detach().double())

    def before_exchange(self, trainer: L.Trainer, optimizer: torch.optim.Optimizer) -> None:
        """Set the flags of non-finite losses and of the squared gradient norm."""
        losses = torch.stack(self._losses) if self._losses else torch.zeros(1)
        nonfinite = losses.isfinite().logical_not().sum()
        square_norm = square_sum(trainer, optimizer).to(losses.device)
        # one device sync
        num_bad, grad_square_norm = torch.stack([nonfinite.double(), square_norm]).tolist()
        flags = consensus_of(trainer)
        flags.tell(Word.bad_loss, num_bad)
        flags.tell(Word.gradient, grad_square_norm)

    def after_exchange(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Skip a listed step, and handle a non-finite loss or gradient."""
        flag_sum = consensus_of(trainer).heard
        has_scaler = getattr(trainer.precision_plugin, "scaler", None) is not None
        if self._step in self._listed:
            self._leave_out(trainer, pl_module, optimizer)
        elif flag_sum(Word.bad_loss):
            self._act(trainer, pl_module, optimizer, "loss")
        elif not math.isfinite(flag_sum(Word.gradient)) and not has_scaler:
            self._act(trainer, pl_module, optimizer, "gradient")

    def figures(self) -> dict[str, float]:
        """Return the number of skipped steps for the manifest, earlier starts included."""
        return {"skipped_steps": len(self._listed)} if self._listed else {}

    def _act(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer, reason: str
    ) -> None:
        """Stop, skip or roll back the step. The gathered sample ids are equal on all ranks, so all ranks do the same."""
        sample_ids = self._offenders(trainer, reason)
        finding = f"Step {self._step + 1:,}: the {reason} is not a number"
        origin = f"It comes from the micro-batches of these samples: {_listing(sample_ids)}."
        if self.on_nonfinite is OnNonfinite.stop:
            raise told_by_first(
                trainer,
                f"{finding}, so the run stops before this step changes the weights. {origin} {_advice(trainer)}, or leave "
                "such steps out with guard.on_nonfinite=skip.",
            )
        if self.run_dir and trainer.is_global_zero:
            add_skipped(self.run_dir, self._step, reason, sample_ids)
        self._listed.add(self._step)
        num_consecutive = self._in_a_row()
        if num_consecutive > self.max_skipped:
            raise told_by_first(
                trainer,
                f"{finding}, the last of {num_consecutive:,} in a row (guard.max_skipped={self.max_skipped}), so the run "
                f"stops; its weights are those of before the first of them. {origin} {_advice(trainer)}.",
            )
        if self.on_nonfinite is OnNonfinite.rollback:
            raise RollBack(self._step, f"{finding}. {origin} The run goes back and leaves this step out.")
        self._leave_out(trainer, pl_module, optimizer)
        _say(trainer, f"{finding}; it is left out (guard.on_nonfinite=skip). {origin} All such steps: {NAME}.")

    def _in_a_row(self) -> int:
        """Count the consecutive skipped steps up to this one, those of earlier starts included."""
        return next(n for n in count() if self._step - n not in self._listed)

    def _leave_out(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer) -> None:
        discard(trainer, optimizer)
        pl_module.discarded = True  # no gradients are left; the stage audits those of another step

    def _offenders(self, trainer: L.Trainer, reason: str) -> list[str]:
        """Gather the sample ids of non-finite micro-batches from all ranks.

        A gradient is a sum, so for a non-finite gradient the ids of all micro-batches of the step are returned.
        """
        micro_batches = zip(self._ids, self._losses, strict=True)
        own = [id_ for ids, loss in micro_batches if reason == "gradient" or not loss.isfinite() for id_ in ids]
        if trainer.world_size == 1:
            return own
        gathered: list[list[str]] = [[] for _ in range(trainer.world_size)]
        torch.distributed.all_gather_object(gathered, own)
        return [id_ for rank_ids in gathered for id_ in rank_ids]


def told_by_first(trainer: L.Trainer, message: str) -> UserError:
    """Make the error that all ranks raise. Rank 0 has the message; the others exit with the same status and no message."""
    return UserError(message if trainer.is_global_zero else "")


def _advice(trainer: L.Trainer) -> str:
    return (
        "Look at them; if they are sound, lower stage.learning_rate, lengthen stage.warmup, or compute in another "
        f"precision (trainer.precision={trainer.precision} now; 32-true is the safest)"
    )


def _listing(names: list[str]) -> str:
    more = f" and {len(names) - NUM_NAMED:,} more" if len(names) > NUM_NAMED else ""
    return f"{', '.join(names[:NUM_NAMED])}{more}"


def _say(trainer: L.Trainer, text: str) -> None:
    if trainer.is_global_zero:
        print(escape_controls(text), flush=True)
