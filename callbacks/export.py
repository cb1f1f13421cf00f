"""Leaves the trained model in a folder that plain transformers loads."""

from __future__ import annotations

from pathlib import Path

import lightning as L

from lit_vlm.model.export import export_model


class Export(L.Callback):
    """Writes `run_dir/hf` when training has ended, while the model is still on its devices."""

    def __init__(self, run_dir: Path) -> None:
        self.folder = Path(run_dir) / "hf"

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            processor = trainer.datamodule.processor
            export_model(pl_module.model, processor.tokenizer, processor.images, self.folder)
        trainer.strategy.barrier("export")
