"""Stops a run at the first loss that is not a number, before it reaches the weights."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor

from lit_vlm.types import Batch, UserError

NUM_NAMED = 40  # samples that the message lists


class Guard(L.Callback):
    """Looks at each optimizer step's loss, over all ranks and micro-batches, before the step is taken.

    Reading the loss makes the host wait for the device once per optimizer step.
    """

    def __init__(self) -> None:
        self._ids: list[list[str]] = []  # of the micro-batches since the last optimizer step, on this rank
        self._losses: list[Tensor] = []

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._ids, self._losses = [], []
        self._ids.append(list(batch.sample_ids) if isinstance(batch, Batch) else [f"batch {batch_idx}"])

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        # A stage multiplies by the world size what the strategy averages; Lightning divides by the micro-batches.
        self._losses.append(loss.detach().float() / trainer.world_size)

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if not self._losses:
            return
        loss = torch.stack(self._losses).sum()
        if trainer.world_size > 1:  # what is not finite on one rank is not finite in the sum: all decide alike
            loss = trainer.strategy.reduce(loss, reduce_op="sum")
        if not torch.isfinite(loss):
            raise UserError(self._message(trainer, float(loss)))

    def _message(self, trainer: L.Trainer, loss: float) -> str:
        parts = zip(self._ids, self._losses, strict=True)
        names = own = [name for ids, part in parts if not torch.isfinite(part) for name in ids]
        if trainer.world_size > 1:
            gathered: list[list[str]] = [[] for _ in range(trainer.world_size)]
            torch.distributed.all_gather_object(gathered, own)
            names = [name for rank in gathered for name in rank]
        more = f" and {len(names) - NUM_NAMED:,} more" if len(names) > NUM_NAMED else ""
        return (
            f"Step {trainer.global_step + 1:,}: the loss is {loss}, so the run stops before this step changes the "
            f"weights. It comes from the micro-batches of these samples: {', '.join(names[:NUM_NAMED])}{more}. Look at "
            "them; if they are sound, lower stage.learning_rate, lengthen stage.warmup, or compute in another "
            f"precision (trainer.precision={trainer.precision} now; 32-true is the safest)."
        )
