"""Short fits of a stage, and what they came to."""

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
class Fit:
    losses: list[float]  # of each micro-batch
    metrics: dict[str, float]  # as they were at the end
    data: DataModule
    said: list[str] = field(default_factory=list)  # by passes before training


class Losses(L.Callback):
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
) -> Fit:
    """A quarter of the sources is held out.

    Args:
        data: more arguments of the data module.
    """
    losses, said = Losses(), list[str]()
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    trainer = L.Trainer(
        accelerator="cpu",
        precision=precision,  # type: ignore[arg-type]
        num_sanity_val_steps=0,
        callbacks=[losses],
        **dict.fromkeys(quiet, False),
    )
    stage.say = said.append
    module = DataModule(processor, sources, 0.25, store=store, num_workers=0, **data)
    module.build_indexes(recheck=True)  # pictures may have been replaced since the last fit
    trainer.fit(stage, module)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return Fit(losses.losses, metrics, module, said)


def exported(model: Any, processor: Processor, folder: Path) -> Path:
    """A folder to start from."""
    export_model(copy.deepcopy(model), processor.tokenizer, processor.images, folder)
    return folder
