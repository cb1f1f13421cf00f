"""Report callback: writes the HTML report of a run."""

from __future__ import annotations

from pathlib import Path

import lightning as L

from lit_vlm.engine.report import write_report


class Report(L.Callback):
    """Writes `run_dir/report.html` from the files in the run folder, at the very end of a fit."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = Path(run_dir)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            write_report(self.run_dir / "report.html", [self.run_dir], self.run_dir.name)
