"""Reader of run folders for reports, and number formats. Missing files are skipped, so an unfinished run has a report, too."""

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
    """Content of one stage's run folder."""

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

    def get_scores(self, phase: str) -> dict[str, float]:
        """Return the score of each "<kind>_<language>" in a phase, "before" or "after"."""
        return (self.figures.get("scores") or {}).get(phase) or {}

    def get_text_scores(self, phase: str) -> dict[str, dict[str, float]]:
        """Return the scores of the other metrics in a phase: metric -> "<kind>_<language>" -> score."""
        return (self.figures.get("text_scores") or {}).get(phase) or {}

    def compute_mean_score(self, phase: str) -> float | None:
        """Compute the mean score over kinds and languages, with equal weights; None if there are none."""
        values = list(self.get_scores(phase).values())
        return sum(values) / len(values) if values else None

    @property
    def trained_parts(self) -> list[dict[str, Any]]:
        """Trained parts of the model, with their numbers of trainable parameters."""
        return [part for part in self.manifest.get("trained") or [] if part.get("trainable")]


def read_run(path: Path) -> RunRecord:
    """Read a run folder; none of its files is required."""
    return RunRecord(
        path=path,
        manifest=_parse_json(_read_text(path / "manifest.json")) or {},
        metrics=read_metrics(path / "metrics.csv"),
        samples=_parse_rows(_read_text(path / "samples.jsonl")),
        quarantine=_parse_rows(_read_text(path / "quarantine.jsonl")),
        settings=_read_text(path / "config.yaml"),
    )


def split_group(group: str) -> tuple[str, str]:
    """Split the name of a score into kind and language: "multi_image_ko" is ("multi_image", "ko")."""
    kind, _, language = group.rpartition("_")
    return (kind, language) if kind else (group, "")


def format_short(number: float | None) -> str:
    """Format a count for a table: 9,999, 12.3 k, 4.56 M, 789 G."""
    if number is None:
        return ""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= max(size, 1e4):
            shown = number / size
            return f"{shown:.{0 if shown >= 100 else 1 if shown >= 10 else 2}f} {unit}"
    return f"{number:,.0f}"


def format_change(before: float | None, after: float | None, number_format: str = ".2f") -> str:
    """Format a change as "before \u2192 after"; an unknown value is left out."""
    known = [format(value, number_format) for value in (before, after) if value is not None]
    return " \u2192 ".join(known)


def format_duration(seconds: float | None) -> str:
    """Format a duration: "2 h 5 min", "3 min 10 s" or "4.2 s"."""
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def _read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _parse_json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:  # the run was killed during a write
        return None


def _parse_rows(text: str) -> list[dict[str, Any]]:
    lines: Iterable[Any] = map(_parse_json, text.split("\n"))  # not splitlines(): answers may hold U+2028
    return [row for row in lines if isinstance(row, dict)]


def read_metrics(path: Path) -> dict[str, Points]:
    """Read the columns of a metrics.csv, also while it is written: an incomplete last row is skipped."""
    columns: dict[str, Points] = {}
    lines = _read_text(path).splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    for row in csv.DictReader(lines):
        step = row.get("step")
        for name, value in row.items():
            if step and value and name not in ("step", "epoch", None):
                columns.setdefault(name, []).append((int(float(step)), float(value)))
    return columns
