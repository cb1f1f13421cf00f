"""TensorBoard logger, in `tensorboard/` of the run folder. A resumed run appends to its files, without duplicate steps."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger

from lit_vlm.compat.lightning import set_purge_step
from lit_vlm.types import UserError

FOLDER = "tensorboard"


def make_tensorboard_logger(run_dir: Path) -> Logger:
    """Make Lightning's TensorBoard logger, extended by `replay` for resumed runs.

    Raises:
        UserError: the package is not installed.
    """
    if find_spec("tensorboard") is None:
        raise UserError(
            "logger.tensorboard=true needs the package tensorboard, which is not installed: pip install '.[tensorboard]',"
            " or leave logger.tensorboard out (metrics.csv has the same numbers)."
        )
    from lightning.pytorch.loggers import TensorBoardLogger

    class ResumableTensorBoardLogger(TensorBoardLogger):
        def replay(self, rows: list[dict[str, Any]]) -> None:
            """Mark all events after the last kept step as purged (`purge_step`), because they are logged again."""
            steps = [int(row["step"]) for row in rows]
            if not steps:
                for file in Path(self.log_dir).glob("events.out.tfevents.*"):  # of an earlier run in this folder
                    file.unlink()
                return
            set_purge_step(self, max(steps))
            for row in rows:
                if int(row["step"]) == max(steps):  # more values of this step may follow
                    self.log_metrics({key: value for key, value in row.items() if key != "step"}, step=max(steps))

    return ResumableTensorBoardLogger(save_dir=run_dir, name="", version=FOLDER)
