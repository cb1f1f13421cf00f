"""Check that the metric of a sweep is logged, after the first validation instead of at the end of the trial."""

from __future__ import annotations

import lightning as L

from lit_vlm.engine.tracking.tracking import require_logged_metric
from lit_vlm.types import UserError


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
