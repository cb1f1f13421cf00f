"""A sweep optimises a metric; a run that never logs it should not cost a whole trial to find out."""

from __future__ import annotations

import lightning as L

from lit_vlm.engine.tracking.tracking import require_logged
from lit_vlm.types import UserError


class Metric(L.Callback):
    """After the first validation: a held-out metric that it should have logged was logged.

    Args:
        metric: `logger.metric`; None: nothing is asked for.
    """

    def __init__(self, metric: str | None = None) -> None:
        self.metric = metric

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.metric is None or not self.metric.startswith("val/") or trainer.sanity_checking:
            return
        names = {name for name in trainer.callback_metrics if name.startswith("val/")}  # the same on all ranks
        try:
            require_logged(self.metric, names)
        except UserError as error:
            raise UserError(str(error) if trainer.is_global_zero else "") from None  # the first rank has the words
