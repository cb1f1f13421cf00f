"""The held-out loss, apart by language and by kind."""

from __future__ import annotations

import warnings
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torchmetrics import MeanMetric

from lit_vlm.data.index.columns import groups_of
from lit_vlm.types import Batch


class LanguageLoss(L.Callback):
    """Logs `val/loss_<language>` and `val/loss_<kind>`: means over supervised tokens, as `val/loss` is.

    Needs validation steps that return `loss_sum` and `num_tokens`, both [B]; other stages are left alone.
    """

    def __init__(self) -> None:
        self._metrics: dict[str, MeanMetric] = {}

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # From the data and not from the batches: every rank must hold the same metrics, or their synchronisation hangs.
        held_out = getattr(getattr(trainer, "datamodule", None), "held_out", None)
        names = set(map(str, groups_of(held_out))) if held_out is not None else set()
        self._metrics = {name: MeanMetric().to(pl_module.device) for name in sorted(names)}

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        known = isinstance(outputs, dict) and {"loss_sum", "num_tokens"} <= set(outputs)
        if not known or not isinstance(batch, Batch):
            return
        total, count = outputs["loss_sum"], outputs["num_tokens"]
        repeats = 2 if batch.num_pairs else 1  # chosen answers, then rejected ones
        for names in (batch.languages * repeats, batch.kinds * repeats):
            if len(names) == len(total):
                self._update([str(name) for name in names], total, count)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for name, metric in self._metrics.items():
            with warnings.catch_warnings():  # a rank may have seen no such sample and must take part all the same
                warnings.filterwarnings("ignore", message=".*called before the ``update`` method.*")
                value = metric.compute()  # over all ranks
            if not torch.isnan(value):  # no such sample in this validation; a diverged run shows in val/loss
                pl_module.log(f"val/loss_{name}", value, batch_size=1)

    def _update(self, names: list[str], total: Tensor, count: Tensor) -> None:
        for name in set(names) & set(self._metrics):
            rows = torch.tensor([i for i, other in enumerate(names) if other == name], device=total.device)
            tokens = count[rows].clamp(min=1)
            self._metrics[name].update(total[rows] / tokens, weight=tokens.to(total.dtype))
