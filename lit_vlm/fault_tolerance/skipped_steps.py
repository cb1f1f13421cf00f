"""List of skipped steps, whose loss or gradient was not finite: `skipped.jsonl`.

A listed step is skipped each time the run reaches it. After a rollback or a resume it is a dummy step: nothing is read and
nothing changes.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from lit_vlm.files import append_line, parse_json_line, read_lines
from lit_vlm.types import UserError

SKIPPED_STEPS_FILE = "skipped.jsonl"


@dataclass(frozen=True, slots=True)
class SkippedStep:
    """Row of `skipped.jsonl`. `step` counts from 0, as in the plan."""

    step: int
    reason: str  # what was not finite: "loss" or "gradient"
    samples: list[str]  # sample ids of the micro-batches concerned
    time: str


def read_skipped(run_dir: Path) -> dict[int, SkippedStep]:
    """Read the skipped steps of a run, by step. A damaged line, e.g. a truncated one, is ignored with a warning.

    Returns:
        {step: its row}; {} if there is no file.

    Raises:
        UserError: the file cannot be read.
    """
    file, rows = run_dir / SKIPPED_STEPS_FILE, {}
    try:
        lines = read_lines(file)
    except OSError as error:
        raise UserError(
            f"{file} cannot be read: {error.strerror or error}. The steps that this run leaves out are listed there: "
            "mend it, or remove it, and these steps are computed again."
        ) from error
    for number, line in enumerate(lines, 1):
        row = _read_row(line)
        if row is not None:
            rows[row.step] = row
        elif line.strip():
            warnings.warn(
                f"{file}:{number}: this line is damaged and says of no step that it is left out: {line[:80]!r}",
                stacklevel=2,
            )
    return rows


def _read_row(line: str) -> SkippedStep | None:
    """Parse a line; None if it is not a valid row."""
    try:
        row = SkippedStep(**parse_json_line(line))
    except TypeError:
        return None
    return row if type(row.step) is int and row.step >= 0 else None


def add_skipped(run_dir: Path, step: int, reason: str, samples: list[str]) -> None:
    """Append a skipped step to the file, durable on return. Call it on rank 0 only."""
    row = SkippedStep(step, reason, samples, datetime.now(UTC).isoformat(timespec="seconds"))
    append_line(
        run_dir / SKIPPED_STEPS_FILE, json.dumps(asdict(row), ensure_ascii=False).encode("utf-8", "backslashreplace")
    )
