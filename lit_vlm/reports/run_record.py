"""Reader of run folders for reports. Missing files are skipped, so an unfinished run has a report, too."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_vlm.files import read_csv_rows, read_json_lines, read_json_or_none, read_lines

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
        manifest=read_json_or_none(path / "manifest.json") or {},
        metrics=read_metrics(path / "metrics.csv"),
        samples=read_json_lines(path / "samples.jsonl"),
        quarantine=read_json_lines(path / "quarantine.jsonl"),
        settings="\n".join(read_lines(path / "config.yaml")),
    )


def split_group(group: str) -> tuple[str, str]:
    """Split the name of a score into kind and language: "multi_image_ko" is ("multi_image", "ko")."""
    kind, _, language = group.rpartition("_")
    return (kind, language) if kind else (group, "")


def read_metrics(path: Path) -> dict[str, Points]:
    """Read the columns of a metrics.csv, also while it is written: an incomplete last row is skipped."""
    columns: dict[str, Points] = {}
    for row in read_csv_rows(path):
        step = row.get("step")
        for name, value in row.items():
            if step and value and name not in ("step", "epoch", None):
                columns.setdefault(name, []).append((int(float(step)), float(value)))
    return columns
