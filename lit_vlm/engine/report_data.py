"""What a run's folder holds, read for people. What is missing is left out: half a run has a report too."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Points = list[tuple[int, float]]  # (optimizer step, value)


@dataclass(frozen=True, slots=True)
class RunRecord:
    """One stage's folder."""

    path: Path
    manifest: dict[str, Any]
    metrics: dict[str, Points]  # columns of metrics.csv
    samples: list[dict[str, Any]]
    quarantine: list[dict[str, Any]]
    settings: str  # config.yaml

    @property
    def name(self) -> str:
        return str(self.manifest.get("name") or self.path.name)

    @property
    def stage(self) -> str:
        return str(self.manifest.get("stage") or self.name.rpartition("/")[2])

    @property
    def figures(self) -> dict[str, Any]:
        return self.manifest.get("figures") or {}

    @property
    def data(self) -> dict[str, Any]:
        return self.manifest.get("data") or {}

    def scores(self, phase: str) -> dict[str, float]:
        """Score of each "<kind>_<language>"."""
        return (self.figures.get("scores") or {}).get(phase) or {}

    def mean_score(self, phase: str) -> float | None:
        """Over kinds and languages, each counting once."""
        values = list(self.scores(phase).values())
        return sum(values) / len(values) if values else None

    @property
    def trained(self) -> list[dict[str, Any]]:
        """The parts that train, with their numbers of trainable parameters."""
        return [part for part in self.manifest.get("trained") or [] if part.get("trainable")]


def read_run(path: Path) -> RunRecord:
    """The folder as it is; nothing in it is required."""
    return RunRecord(
        path=path,
        manifest=_json(_text(path / "manifest.json")) or {},
        metrics=read_metrics(path / "metrics.csv"),
        samples=_rows(_text(path / "samples.jsonl")),
        quarantine=_rows(_text(path / "quarantine.jsonl")),
        settings=_text(path / "config.yaml"),
    )


def split_group(group: str) -> tuple[str, str]:
    """Kind and language of a score's name: "multi_image_ko" is ("multi_image", "ko")."""
    kind, _, language = group.rpartition("_")
    return (kind, language) if kind else (group, "")


def short(number: float | None) -> str:
    """A count for a table: 9,999, 12.3 k, 4.56 M, 789 G."""
    if number is None:
        return ""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= max(size, 1e4):
            shown = number / size
            return f"{shown:.{0 if shown >= 100 else 1 if shown >= 10 else 2}f} {unit}"
    return f"{number:,.0f}"


def arrow(before: float | None, after: float | None, form: str = ".2f") -> str:
    """`before -> after` with the arrow that people read; what is unknown is left out."""
    known = [format(value, form) for value in (before, after) if value is not None]
    return " \u2192 ".join(known)


def duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:  # a run that was killed while it wrote
        return None


def _rows(text: str) -> list[dict[str, Any]]:
    lines: Iterable[Any] = map(_json, text.split("\n"))  # not splitlines(): answers may hold U+2028
    return [row for row in lines if isinstance(row, dict)]


def read_metrics(path: Path) -> dict[str, Points]:
    """The columns of a metrics.csv, also of one that is being written: half a row is none."""
    columns: dict[str, Points] = {}
    lines = _text(path).splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    for row in csv.DictReader(lines):
        step = row.get("step")
        for name, value in row.items():
            if step and value and name not in ("step", "epoch", None):
                columns.setdefault(name, []).append((int(float(step)), float(value)))
    return columns
