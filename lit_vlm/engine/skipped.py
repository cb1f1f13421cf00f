"""Steps of the plan that a run leaves out, because their loss or gradient was not a number: `skipped.jsonl`.

A step that is listed is left out whenever the run passes it: after a rollback and after a resume it is a blank one, for
which nothing is read and nothing changes.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from lit_vlm.files import append_line
from lit_vlm.types import UserError

NAME = "skipped.jsonl"


@dataclass(frozen=True, slots=True)
class SkippedStep:
    """One of them. `step` counts from 0, as the plan does."""

    step: int
    reason: str  # what was not finite: "loss" or "gradient"
    samples: list[str]  # of the micro-batches that it came from
    time: str


def read_skipped(run_dir: Path) -> dict[int, SkippedStep]:
    """Read them, by step. A damaged line, such as one that was cut short, is not counted, and is named.

    Raises:
        UserError: the file cannot be read.
    """
    file, found = run_dir / NAME, {}
    try:
        text = file.read_bytes().decode("utf-8", "replace")
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UserError(
            f"{file} cannot be read: {error.strerror or error}. The steps that this run leaves out are listed there: "
            "mend it, or remove it, and these steps are computed again."
        ) from error
    for number, line in enumerate(text.split("\n"), 1):  # not at every line separator of Unicode
        row = _read_row(line)
        if row is not None:
            found[row.step] = row
        elif line.strip():
            warnings.warn(
                f"{file}:{number}: this line is damaged and says of no step that it is left out: {line[:80]!r}",
                stacklevel=2,
            )
    return found


def _read_row(line: str) -> SkippedStep | None:
    """Read a line; None where it is none of ours."""
    try:
        row = SkippedStep(**json.loads(line))
    except (ValueError, TypeError, RecursionError):
        return None
    return row if type(row.step) is int and row.step >= 0 else None


def add_skipped(run_dir: Path, step: int, reason: str, samples: list[str]) -> None:
    """Rank 0 writes; on the disk when it returns."""
    row = SkippedStep(step, reason, samples, datetime.now(UTC).isoformat(timespec="seconds"))
    append_line(run_dir / NAME, json.dumps(asdict(row), ensure_ascii=False).encode("utf-8", "backslashreplace"))
