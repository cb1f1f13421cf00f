"""Loggers that write files of the run folder: `metrics.csv` and `tensorboard/`. A resumed run continues them without duplicate steps."""

from __future__ import annotations

import csv
import io
from argparse import Namespace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from lit_vlm.compat.lightning import set_purge_step
from lit_vlm.files import read_csv_rows, write_text_atomically
from lit_vlm.types import UserError


class MetricsCsv(Logger):
    """CSV logger with one row for each call of `log_metrics`. An old table is replaced, unless `go_on` keeps its first rows."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.path = Path(folder) / "metrics.csv"
        self.num_rows = 0
        self._columns: list[str] | None = None  # None: this process has written nothing yet

    @property
    def name(self) -> str:
        return ""

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self.path.parent)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the hyperparameters are in the run's config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append one row at once. A new metric adds a column, which rewrites the table."""
        row = {name: value.item() if isinstance(value, Tensor) else value for name, value in metrics.items()}
        row["step"] = self.num_rows if step is None else step
        if self._columns is None:
            self._write_table([], sorted(row))
        elif new := row.keys() - set(self._columns):
            self._write_table(read_csv_rows(self.path), sorted({*self._columns, *new}))
        assert self._columns is not None
        with self.path.open("a", encoding="utf-8", newline="") as stream:
            stream.write(_format_rows([row], self._columns))
        self.num_rows += 1

    def go_on(self, num_rows: int, row: dict[str, Any] | None = None) -> list[dict[str, Any]]:
        """Resume the existing table: keep its first `num_rows` rows.

        Args:
            num_rows: number of rows at the time of the checkpoint.
            row: a row that was due at that time and is added.

        Returns:
            The kept rows with the values as logged; an empty list on ranks other than 0.
        """
        if rank_zero_only.rank:
            return []
        rows = read_csv_rows(self.path)[:num_rows] + ([row] if row else [])
        columns = sorted({name for one in rows for name in one})
        if rows:
            self._write_table(rows, columns)
        self.num_rows = len(rows)
        return [{name: _parse_number(value) for name, value in one.items() if value != ""} for one in rows]

    def read_rows(self) -> list[dict[str, Any]]:
        """Read all rows of the table, with the values as logged."""
        rows = read_csv_rows(self.path)
        return [{name: _parse_number(value) for name, value in one.items() if value != ""} for one in rows]

    def read_metric_names(self) -> set[str]:
        """Read the names of all metrics in the table."""
        return {name for row in read_csv_rows(self.path) for name in row} - {"step", "epoch"}

    def _write_table(self, rows: list[dict[str, Any]], columns: list[str]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        header = _format_rows([dict(zip(columns, columns, strict=True))], columns)
        write_text_atomically(self.path, header + _format_rows(rows, columns), remove_secrets=False)
        self._columns = columns


def _parse_number(value: Any) -> Any:
    """Parse a cell into the number that was logged: the text form of Python's numbers is exact."""
    if not isinstance(value, str):
        return value
    return int(value) if value.lstrip("-").isdigit() else float(value)


def _format_rows(rows: list[dict[str, Any]], columns: list[str]) -> str:
    stream = io.StringIO(newline="")
    csv.DictWriter(stream, columns, lineterminator="\n").writerows(rows)
    return stream.getvalue()


TENSORBOARD_FOLDER = "tensorboard"


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

    return ResumableTensorBoardLogger(save_dir=run_dir, name="", version=TENSORBOARD_FOLDER)
