"""Check that the metric of a sweep is logged, after the first validation instead of at the end of the trial."""

from __future__ import annotations

import warnings
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torchmetrics import MeanMetric

from lit_vlm.data.index.sample_index import list_groups
from lit_vlm.loggers.tracker import require_logged_metric
from lit_vlm.types import Batch, UserError


class Metric(L.Callback):
    """Checks after each validation that the requested held-out metric was logged.

    Args:
        metric: name from `logger.metric`. None: no check.

    Raises:
        UserError: the metric begins with "val/" and was not logged. All ranks raise it.
    """

    def __init__(self, metric: str | None = None) -> None:
        self.metric = metric

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.metric is None or not self.metric.startswith("val/") or trainer.sanity_checking:
            return
        names = {name for name in trainer.callback_metrics if name.startswith("val/")}  # equal on all ranks
        try:
            require_logged_metric(self.metric, names)
        except UserError as error:
            # only rank 0 shows the message
            raise UserError(str(error) if trainer.is_global_zero else "") from None


class LanguageLoss(L.Callback):
    """Logs `val/loss_<language>` and `val/loss_<kind>`: means over supervised tokens, like `val/loss`.

    Needs validation steps that return `loss_sum` and `num_tokens`, both [B]. For other stages it does nothing.
    """

    def __init__(self) -> None:
        self._metrics: dict[str, MeanMetric] = {}

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # The names come from the data, not from the batches: all ranks need the same metrics, or their sync hangs.
        held_out = getattr(getattr(trainer, "datamodule", None), "held_out", None)
        names = set(map(str, list_groups(held_out))) if held_out is not None else set()
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
        has_sums = isinstance(outputs, dict) and {"loss_sum", "num_tokens"} <= set(outputs)
        if not has_sums or not isinstance(batch, Batch):
            return
        loss_sum, num_tokens = outputs["loss_sum"], outputs["num_tokens"]
        repeats = 2 if batch.num_pairs else 1  # chosen responses, then rejected ones
        for names in (batch.languages * repeats, batch.kinds * repeats):
            if len(names) == len(loss_sum):
                self._update_metrics([str(name) for name in names], loss_sum, num_tokens)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for name, metric in self._metrics.items():
            with warnings.catch_warnings():  # a rank without such a sample must still take part in the sync
                warnings.filterwarnings("ignore", message=".*called before the ``update`` method.*")
                value = metric.compute()  # reduced over all ranks
            # NaN: no such sample in this validation. A diverged run shows in val/loss
            if not torch.isnan(value):
                pl_module.log(f"val/loss_{name}", value, batch_size=1)

    def _update_metrics(self, names: list[str], total: Tensor, count: Tensor) -> None:
        for name in set(names) & set(self._metrics):
            rows = torch.tensor([i for i, other in enumerate(names) if other == name], device=total.device)
            tokens = count[rows].clamp(min=1)
            self._metrics[name].update(total[rows] / tokens, weight=tokens.to(total.dtype))
