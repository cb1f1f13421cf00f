"""Leaves the trained model in a folder that plain transformers loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L

from lit_vlm.engine.watch import Doing, pulse_of
from lit_vlm.model.export import export_model


class Export(L.Callback):
    """Writes `run_dir/hf` when training has ended, while the model is still on its devices.

    Where ranks share weights out, all of them take part and rank 0 writes, one weight at a time.
    """

    def __init__(self, run_dir: Path) -> None:
        self.folder = Path(run_dir) / "hf"

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        with pulse_of(trainer).during(Doing.exporting):
            self._export(trainer, pl_module)
            trainer.strategy.barrier("export")

    def _export(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        strategy: Any = trainer.strategy
        shared = hasattr(strategy, "whole_weights")
        if shared or trainer.is_global_zero:
            processor = trainer.datamodule.processor
            whole = strategy.whole_weights(pl_module.model) if shared else None
            export_model(
                pl_module.model,
                processor.tokenizer,
                processor.images,
                self.folder,
                whole=pulse_of(trainer).with_each(whole) if whole is not None else None,
                writes=trainer.is_global_zero,
            )
