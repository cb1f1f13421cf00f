"""Guard against non-finite losses and gradients. All ranks take the same decision before the step changes the weights."""

from __future__ import annotations

import math
from itertools import count
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lit_vlm.compat.lightning import is_last_micro_step
from lit_vlm.config.choices import OnNonfinite
from lit_vlm.distributed.collectives import StepFlag, gather_objects, get_shared_flags, make_rank_zero_error
from lit_vlm.distributed.gradients import compute_grad_square_sum, skip_update
from lit_vlm.fault_tolerance.exit_status import RollbackRequest
from lit_vlm.fault_tolerance.skipped_steps import SKIPPED_STEPS_FILE, add_skipped, read_skipped
from lit_vlm.types import Batch, escape_control_characters

MAX_LISTED_SAMPLES = 40  # maximum number of sample ids in a message


class Exchange(L.Callback):
    """Exchanges the flags of all ranks before each update (`distributed/collectives.py`).

    Signals and due checkpoints depend on this exchange, so a run without the guard has this callback instead.
    """

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if is_last_micro_step(trainer):
            self.on_before_exchange(trainer, optimizer)
            get_shared_flags(trainer).sync(trainer)
            self.on_after_exchange(trainer, pl_module, optimizer)

    def on_before_exchange(self, trainer: L.Trainer, optimizer: torch.optim.Optimizer) -> None:
        """Set the flags of this rank for the current step. Called before the all-reduce."""

    def on_after_exchange(
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
        self._skipped_steps: set[int] = set()
        self._step = 0
        self._sample_ids: list[list[str]] = []  # one list per micro-batch since the last optimizer step, this rank
        self._losses: list[Tensor] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        listed = list(read_skipped(self.run_dir)) if self.run_dir else []
        # another rank may see an older version of the file
        self._skipped_steps = set(trainer.strategy.broadcast(listed))
        self._sample_ids, self._losses = [], []
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        if hasattr(datamodule, "skipped_steps"):
            datamodule.skipped_steps = frozenset(self._skipped_steps)  # the loader reads nothing for these

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._sample_ids, self._losses = [], []
        self._step = batch.step if isinstance(batch, Batch) else trainer.global_step
        ids = list(getattr(batch, "sample_ids", ()))
        self._sample_ids.append(ids if ids or isinstance(batch, Batch) else [f"batch {batch_idx}"])

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        self._losses.append(loss.detach().double())

    def on_before_exchange(self, trainer: L.Trainer, optimizer: torch.optim.Optimizer) -> None:
        """Set the flags of non-finite losses and of the squared gradient norm."""
        losses = torch.stack(self._losses) if self._losses else torch.zeros(1)
        nonfinite = losses.isfinite().logical_not().sum()
        square_norm = compute_grad_square_sum(trainer, optimizer).to(losses.device)
        # one device sync
        num_bad, grad_square_norm = torch.stack([nonfinite.double(), square_norm]).tolist()
        flags = get_shared_flags(trainer)
        flags.add(StepFlag.nonfinite_losses, num_bad)
        flags.add(StepFlag.grad_square_sum, grad_square_norm)

    def on_after_exchange(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Skip a listed step, and handle a non-finite loss or gradient."""
        flag_sum = get_shared_flags(trainer).get
        has_scaler = getattr(trainer.precision_plugin, "scaler", None) is not None
        if self._step in self._skipped_steps:
            self._skip_step(trainer, pl_module, optimizer)
        elif flag_sum(StepFlag.nonfinite_losses):
            self._handle_nonfinite(trainer, pl_module, optimizer, "loss")
        elif not math.isfinite(flag_sum(StepFlag.grad_square_sum)) and not has_scaler:
            self._handle_nonfinite(trainer, pl_module, optimizer, "gradient")

    def figures(self) -> dict[str, float]:
        """Return the number of skipped steps for the manifest, earlier starts included."""
        return {"skipped_steps": len(self._skipped_steps)} if self._skipped_steps else {}

    def _handle_nonfinite(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer, reason: str
    ) -> None:
        """Stop, skip or roll back the step. The gathered sample ids are equal on all ranks, so all ranks do the same."""
        sample_ids = self._gather_sample_ids(trainer, reason)
        finding = f"Step {self._step + 1:,}: the {reason} is not a number"
        origin = f"It comes from the micro-batches of these samples: {_format_sample_ids(sample_ids)}."
        if self.on_nonfinite is OnNonfinite.stop:
            raise make_rank_zero_error(
                trainer,
                f"{finding}, so the run stops before this step changes the weights. {origin} {_format_advice(trainer)}, or leave "
                "such steps out with guard.on_nonfinite=skip.",
            )
        if self.run_dir and trainer.is_global_zero:
            add_skipped(self.run_dir, self._step, reason, sample_ids)
        self._skipped_steps.add(self._step)
        num_consecutive = self._count_consecutive_skips()
        if num_consecutive > self.max_skipped:
            raise make_rank_zero_error(
                trainer,
                f"{finding}, the last of {num_consecutive:,} in a row (guard.max_skipped={self.max_skipped}), so the run "
                f"stops; its weights are those of before the first of them. {origin} {_format_advice(trainer)}.",
            )
        if self.on_nonfinite is OnNonfinite.rollback:
            raise RollbackRequest(self._step, f"{finding}. {origin} The run goes back and leaves this step out.")
        self._skip_step(trainer, pl_module, optimizer)
        _print_on_rank_zero(
            trainer,
            f"{finding}; it is left out (guard.on_nonfinite=skip). {origin} All such steps: {SKIPPED_STEPS_FILE}.",
        )

    def _count_consecutive_skips(self) -> int:
        """Count the consecutive skipped steps up to this one, those of earlier starts included."""
        return next(n for n in count() if self._step - n not in self._skipped_steps)

    def _skip_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer) -> None:
        skip_update(trainer, optimizer)
        pl_module.gradients_discarded = True  # no gradients are left; the stage audits those of another step

    def _gather_sample_ids(self, trainer: L.Trainer, reason: str) -> list[str]:
        """Gather the sample ids of non-finite micro-batches from all ranks.

        A gradient is a sum, so for a non-finite gradient the ids of all micro-batches of the step are returned.
        """
        micro_batches = zip(self._sample_ids, self._losses, strict=True)
        own = [id_ for ids, loss in micro_batches if reason == "gradient" or not loss.isfinite() for id_ in ids]
        return [id_ for rank_ids in gather_objects(own, trainer.world_size) for id_ in rank_ids]


def _format_advice(trainer: L.Trainer) -> str:
    return (
        "Look at them; if they are sound, lower stage.learning_rate, lengthen stage.warmup, or compute in another "
        f"precision (trainer.precision={trainer.precision} now; 32-true is the safest)"
    )


def _format_sample_ids(sample_ids: list[str]) -> str:
    more = f" and {len(sample_ids) - MAX_LISTED_SAMPLES:,} more" if len(sample_ids) > MAX_LISTED_SAMPLES else ""
    return f"{', '.join(sample_ids[:MAX_LISTED_SAMPLES])}{more}"


def _print_on_rank_zero(trainer: L.Trainer, text: str) -> None:
    if trainer.is_global_zero:
        print(escape_control_characters(text), flush=True)
