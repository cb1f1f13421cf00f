"""Steps of the plan that a run leaves out, because their loss or gradient was not a number: `skipped.jsonl`.

A step that is listed is left out whenever the run passes it: after a rollback and after a resume it is a blank one, for
which nothing is read and nothing changes.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from lit_vlm.files import append_line

NAME = "skipped.jsonl"


@dataclass(frozen=True, slots=True)
class SkippedStep:
    """One of them. `step` counts from 0, as the plan does."""

    step: int
    reason: str  # what was not finite: "loss" or "gradient"
    samples: list[str]  # of the micro-batches that it came from
    time: str


def read_skipped(run_dir: Path) -> dict[int, SkippedStep]:
    """By step. A last line that was cut short is not counted."""
    file, found = run_dir / NAME, {}
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    for line in lines:
        try:
            row = SkippedStep(**json.loads(line))
        except (ValueError, TypeError):
            continue
        found[row.step] = row
    return found


def add_skipped(run_dir: Path, step: int, reason: str, samples: list[str]) -> None:
    """Rank 0 writes; on the disk when it returns."""
    row = SkippedStep(step, reason, samples, datetime.now(UTC).isoformat(timespec="seconds"))
    append_line(run_dir / NAME, json.dumps(asdict(row), ensure_ascii=False).encode("utf-8", "backslashreplace"))
