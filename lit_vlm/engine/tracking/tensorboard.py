"""TensorBoard's files, in `tensorboard/` of the run's folder. A run that goes on appends to them, and no step is there twice."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger

from lit_vlm.types import UserError

FOLDER = "tensorboard"


def make_tensorboard(run_dir: Path) -> Logger:
    """Lightning's logger, which continues a table of rows.

    Raises:
        UserError: the package is not installed.
    """
    if find_spec("tensorboard") is None:
        raise UserError(
            "logger.tensorboard=true needs the package tensorboard, which is not installed: pip install '.[tensorboard]',"
            " or leave logger.tensorboard out (metrics.csv has the same numbers)."
        )
    from lightning.pytorch.loggers import TensorBoardLogger

    class Continued(TensorBoardLogger):
        def replay(self, rows: list[dict[str, Any]]) -> None:
            """What is after the last kept step is logged again, so a reader is told to forget it (`purge_step`)."""
            steps = [int(row["step"]) for row in rows]
            if not steps:
                for file in Path(self.log_dir).glob("events.out.tfevents.*"):  # of a run that was here
                    file.unlink()
                return
            self._kwargs["purge_step"] = max(steps)
            for row in rows:
                if int(row["step"]) == max(steps):  # another half of this step may come
                    self.log_metrics({key: value for key, value in row.items() if key != "step"}, step=max(steps))

    return Continued(save_dir=run_dir, name="", version=FOLDER)
