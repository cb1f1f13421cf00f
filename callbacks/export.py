"""Leaves the trained model in a folder that plain transformers loads."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import lightning as L

from lit_vlm.engine.watch import Doing, pulse_of
from lit_vlm.model.export import export_model


class Export(L.Callback):
    """Writes `run_dir/hf` when training has ended, while the model is still on its devices.

    Rank 0 writes, one weight at a time, and all ranks meet before each: so none waits longer for it than one weight takes,
    however slow the disk is. Where ranks share weights out, they gather them there.
    """

    def __init__(self, run_dir: Path) -> None:
        self.folder = Path(run_dir) / "hf"

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        with pulse_of(trainer).during(Doing.exporting):
            self._export(trainer, pl_module)
            trainer.strategy.barrier("exported")

    def _export(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        strategy: Any = trainer.strategy
        processor, pulse = trainer.datamodule.processor, pulse_of(trainer)
        export_model(
            pl_module.model,
            processor.tokenizer,
            processor.images,
            self.folder,
            whole=strategy.whole_weights(pl_module.model) if hasattr(strategy, "whole_weights") else None,
            writes=trainer.is_global_zero,
            before_each=pulse.with_each(partial(strategy.barrier, "export")),
        )
