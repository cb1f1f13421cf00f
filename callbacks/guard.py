"""What happens to a step whose loss or gradient is not a number: all ranks decide alike, before it reaches the weights."""

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

NUM_NAMED = 40  # samples that a message lists


class Exchange(L.Callback):
    """The ranks' exchange before each update (`engine/consensus.py`). Signals and due saves depend on it, so a run without
    the guard has this in its place."""

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if is_last_micro_step(trainer):
            self.before_exchange(trainer, optimizer)
            consensus_of(trainer).exchange(trainer)
            self.after_exchange(trainer, pl_module, optimizer)

    def before_exchange(self, trainer: L.Trainer, optimizer: torch.optim.Optimizer) -> None:
        """Tell what this rank knows of the step."""

    def after_exchange(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Act on what was heard; the update comes next."""


class Guard(Exchange):
    """Looks at the losses of a step's micro-batches and at its gradient, over all ranks.

    Under float16 the scaler looks at the gradient itself, and expects it not to be finite now and then; only the loss is
    looked at. Reading the numbers makes the host wait for the device once per optimizer step.

    Args:
        run_dir: where `skipped.jsonl` is kept; None: skipped steps are only counted.
        on_nonfinite: stop; skip, which leaves weights, moments and the optimizer's count of steps as they are while the
            schedule of the rate goes on; or rollback, which lists the step and raises `RollBack`. A step that an earlier
            start listed is left out without being judged again.
        max_skipped: steps in a row; more stop the run.
    """

    def __init__(
        self, run_dir: Path | None = None, on_nonfinite: OnNonfinite | str = OnNonfinite.stop, max_skipped: int = 10
    ) -> None:
        self.run_dir, self.on_nonfinite, self.max_skipped = run_dir, OnNonfinite(on_nonfinite), max_skipped
        self._listed: set[int] = set()
        self._step = 0
        self._ids: list[list[str]] = []  # of the micro-batches since the last optimizer step, on this rank
        self._losses: list[Tensor] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        listed = list(read_skipped(self.run_dir)) if self.run_dir else []
        self._listed = set(trainer.strategy.broadcast(listed))  # a shared folder may show another rank an older file
        self._ids, self._losses = [], []
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        if hasattr(datamodule, "left_out"):
            datamodule.left_out = frozenset(self._listed)  # the loader is made next, and nothing is read for these

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
        losses = torch.stack(self._losses) if self._losses else torch.zeros(1)
        bad = losses.isfinite().logical_not().sum()
        square = square_sum(trainer, optimizer).to(losses.device)
        num_bad, squared = torch.stack([bad.double(), square]).tolist()  # one wait for the device
        told = consensus_of(trainer)
        told.tell(Word.bad_loss, num_bad)
        told.tell(Word.gradient, squared)

    def after_exchange(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        heard = consensus_of(trainer).heard
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        if self._step in self._listed:
            self._leave_out(trainer, pl_module, optimizer)
        elif heard(Word.bad_loss):
            self._act(trainer, pl_module, optimizer, "loss")
        elif not math.isfinite(heard(Word.gradient)) and not scaled:
            self._act(trainer, pl_module, optimizer, "gradient")

    def figures(self) -> dict[str, float]:
        """For the manifest: steps that the run left out, in earlier starts as well."""
        return {"skipped_steps": len(self._listed)} if self._listed else {}

    def _act(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer, reason: str
    ) -> None:
        """The gathered ids are the same on all ranks, and so is what follows."""
        names = self._offenders(trainer, reason)
        found = f"Step {self._step + 1:,}: the {reason} is not a number"
        whose = f"It comes from the micro-batches of these samples: {_listing(names)}."
        if self.on_nonfinite is OnNonfinite.stop:
            raise told_by_first(
                trainer,
                f"{found}, so the run stops before this step changes the weights. {whose} {_advice(trainer)}, or leave "
                "such steps out with guard.on_nonfinite=skip.",
            )
        if self.run_dir and trainer.is_global_zero:
            add_skipped(self.run_dir, self._step, reason, names)
        self._listed.add(self._step)
        in_a_row = self._in_a_row()
        if in_a_row > self.max_skipped:
            raise told_by_first(
                trainer,
                f"{found}, the last of {in_a_row:,} in a row (guard.max_skipped={self.max_skipped}), so the run "
                f"stops; its weights are those of before the first of them. {whose} {_advice(trainer)}.",
            )
        if self.on_nonfinite is OnNonfinite.rollback:
            raise RollBack(self._step, f"{found}. {whose} The run goes back and leaves this step out.")
        self._leave_out(trainer, pl_module, optimizer)
        _say(trainer, f"{found}; it is left out (guard.on_nonfinite=skip). {whose} All such steps: {NAME}.")

    def _in_a_row(self) -> int:
        """Steps that are left out, up to this one; those of earlier starts count as well."""
        return next(n for n in count() if self._step - n not in self._listed)

    def _leave_out(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer) -> None:
        discard(trainer, optimizer)
        pl_module.discarded = True  # there are no gradients now; a stage audits those of another step

    def _offenders(self, trainer: L.Trainer, reason: str) -> list[str]:
        """Sample ids, from all ranks. A gradient is a sum: any micro-batch of the step may have brought what is in it."""
        parts = zip(self._ids, self._losses, strict=True)
        own = [name for ids, loss in parts if reason == "gradient" or not loss.isfinite() for name in ids]
        if trainer.world_size == 1:
            return own
        gathered: list[list[str]] = [[] for _ in range(trainer.world_size)]
        torch.distributed.all_gather_object(gathered, own)
        return [name for rank in gathered for name in rank]


def told_by_first(trainer: L.Trainer, message: str) -> UserError:
    """To be raised by all ranks: the first one has the words, the others end with the same exit status without them."""
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
