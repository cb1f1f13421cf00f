"""Short training runs of a stage, and their results."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L

from lit_vlm.data.datamodule import DataModule
from lit_vlm.data.processor import Processor
from lit_vlm.model.export import export_model
from lit_vlm.stages.base import Stage
from lit_vlm.types import Source


@dataclass
class FitResult:
    losses: list[float]  # one value for each micro-batch
    metrics: dict[str, float]  # values at the end
    data: DataModule
    messages: list[str] = field(default_factory=list)  # of the passes before training


class LossRecorder(L.Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))


def fit(
    stage: Stage,
    processor: Processor,
    sources: Sequence[Source],
    store: Path,
    *,
    precision: str = "32-true",
    **data: Any,
) -> FitResult:
    """Train the stage and return its results. A quarter of the sources is held out.

    Args:
        data: further arguments of the data module.
    """
    losses, messages = LossRecorder(), list[str]()
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    trainer = L.Trainer(
        accelerator="cpu",
        precision=precision,  # type: ignore[arg-type]
        num_sanity_val_steps=0,
        callbacks=[losses],
        **dict.fromkeys(quiet, False),
    )
    stage.say = messages.append
    module = DataModule(processor, sources, 0.25, store=store, num_workers=0, **data)
    module.build_indexes(recheck=True)  # pictures may have been replaced since the last fit
    trainer.fit(stage, module)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return FitResult(losses.losses, metrics, module, messages)


def export_copy(model: Any, processor: Processor, folder: Path) -> Path:
    """Export a copy of the model to a folder that a stage can start from."""
    export_model(copy.deepcopy(model), processor.tokenizer, processor.images, folder)
    return folder
