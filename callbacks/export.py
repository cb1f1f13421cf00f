"""Export callback: writes the trained model as a folder that plain transformers loads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L

from lit_vlm.fault_tolerance.watchdog import Activity, Progress, get_progress
from lit_vlm.model.adapters import can_export_adapter, export_adapter, get_adapter_folder
from lit_vlm.model.export import export_model
from lit_vlm.model.tensor_files import raise_os_errors
from lit_vlm.reports.report import write_report
from lit_vlm.types import UserError


@contextmanager
def export_to(folder: Path, trainer: L.Trainer) -> Iterator[Progress]:
    """Report progress while the block writes the model to a folder; all ranks wait for its end.

    Raises:
        UserError: the folder cannot be written.
    """
    progress = get_progress(trainer)
    with progress.use_activity(Activity.exporting):
        try:
            with raise_os_errors():
                yield progress
        except OSError as error:
            raise UserError(
                f"The model cannot be written to {folder}: {error.strerror or error}. Make room or change its rights; the"
                " same command resumes from the last checkpoint and writes it then."
            ) from error
        trainer.strategy.barrier("exported")


class Export(L.Callback):
    """Exports the model to `run_dir/hf` at the end of training, and what LoRA trained to `run_dir/hf-adapter`.

    The model is still on its devices.

    Rank 0 writes one weight at a time, with a barrier before each weight. So no rank waits longer than the writing of one
    weight takes, even on a slow disk. Sharded weights are gathered at this barrier. Raises UserError if the folder cannot
    be written.

    Args:
        special_boxes: see `export_model`.
    """

    def __init__(self, run_dir: Path, special_boxes: bool = True) -> None:
        self.folder, self.special_boxes = Path(run_dir) / "hf", special_boxes

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        with export_to(self.folder, trainer) as progress:
            self._export(trainer, pl_module, progress)

    def _export(self, trainer: L.Trainer, pl_module: L.LightningModule, progress: Progress) -> None:
        strategy: Any = trainer.strategy
        processor = trainer.datamodule.processor
        model = pl_module.model
        options: dict[str, Any] = {
            "gather_weight": strategy.whole_weights(model) if hasattr(strategy, "whole_weights") else None,
            "is_writer": trainer.is_global_zero,
            "before_each_weight": progress.wrap(partial(strategy.barrier, "export")),
        }
        parts = (model, processor.tokenizer, processor.images)
        export_model(*parts, self.folder, special_boxes=self.special_boxes, **options)
        if can_export_adapter(model):
            export_adapter(*parts, get_adapter_folder(self.folder), **options)


class Report(L.Callback):
    """Writes `run_dir/report.html` from the files in the run folder, at the very end of a fit."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = Path(run_dir)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            write_report(self.run_dir / "report.html", [self.run_dir], self.run_dir.name)
