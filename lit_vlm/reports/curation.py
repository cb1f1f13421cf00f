"""Page of task=curate: what was left out and why, and what stayed, with samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from markupsafe import Markup

from lit_vlm.curation.mixture import Example, ResultTable, ScoreDistribution
from lit_vlm.messages import translate
from lit_vlm.reports.charts import HISTOGRAM_STYLES, draw_histogram
from lit_vlm.reports.curation_examples import CurationExample, ShownRecord
from lit_vlm.reports.preflight.facts import Histogram
from lit_vlm.reports.preflight.samples import encode_data_url
from lit_vlm.reports.preflight.statistics import compute_summary_stats
from lit_vlm.reports.templates import PageTemplate, write_page
from lit_vlm.types import LazyImage, RecordError

__all__ = [
    "CurationExample",
    "CurationPage",
    "ShownRecord",
    "SourceCounts",
    "show_examples",
    "show_record",
    "write_curation_page",
]

MAX_TEXT = 400  # characters of the turns of an example
MAX_PICTURES = 2
NUM_BINS = 40


@dataclass(frozen=True, slots=True)
class SourceCounts:
    """Records of a source: all, those that cannot be read, left out before and now."""

    name: str
    num_records: int
    num_bad: int
    num_out_before: int
    num_left_out: int

    @property
    def num_kept(self) -> int:
        return self.num_records - self.num_out_before - self.num_left_out


@dataclass(frozen=True, slots=True)
class ScoreChart:
    """Histogram of a score: its title, (style, name) of each series, and the drawing."""

    title: str
    legend: list[tuple[str, str]]
    svg: Markup


@dataclass(frozen=True, slots=True)
class CurationPage:
    """Values of the page.

    Attributes:
        counts: (what, number) of the results.
        left_out, kept: examples of records that were left out, and of similar ones that stay.
        notes: sentences about what was not done.
        command: command line that made the page.
        tables: of the results.
        kept_title: heading of the examples that stay.
        scores: of records, drawn as histograms.
    """

    title: str
    sources: Sequence[SourceCounts]
    counts: Sequence[tuple[str, int]]
    left_out: Sequence[CurationExample]
    kept: Sequence[CurationExample]
    settings: Sequence[tuple[str, str]]
    notes: Sequence[str] = field(default=())
    command: str = ""
    tables: Sequence[ResultTable] = field(default=())
    kept_title: str = "Similar, and stays"
    scores: Sequence[ScoreDistribution] = field(default=())

    @property
    def charts(self) -> list[ScoreChart]:
        """Histogram of each score."""
        histograms = [make_score_histogram(scores) for scores in self.scores]
        return [
            ScoreChart(one.title, list(zip(HISTOGRAM_STYLES, one.series, strict=False)), Markup(draw_histogram(one)))
            for one in histograms
        ]


def make_score_histogram(distribution: ScoreDistribution) -> Histogram:
    """Make the histogram of a score, in percent: its axis has whole numbers."""
    series = {language: 100 * np.array(scores) for language, scores in distribution.scores.items()}
    values = np.concatenate(list(series.values()))
    low, high = np.floor(values.min()), max(np.ceil(values.max()), np.floor(values.min()) + 1)
    edges = np.linspace(low, high, NUM_BINS + 1)
    counts = {language: np.histogram(part, edges)[0].tolist() for language, part in series.items()}
    cap = None if distribution.threshold is None else 100 * distribution.threshold
    spread = compute_summary_stats(values)
    return Histogram(distribution.name, "%", edges.tolist(), counts, spread, cap=cap, cap_name="threshold")


def show_record(title: str, origin: str, text: str, images: Sequence[LazyImage]) -> ShownRecord:
    """Prepare a record for the page; a picture that cannot be read any more is left out."""
    pictures = []
    for image in images[:MAX_PICTURES]:
        try:
            pictures.append(encode_data_url(image.load()))
        except RecordError:
            continue
    shown = text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]} …"
    return ShownRecord(title, origin, shown, tuple(pictures))


def show_examples(examples: Sequence[Example]) -> list[CurationExample]:
    """Prepare examples for the page."""
    return [
        CurationExample(
            example.reason,
            tuple(show_record(one.title, one.origin, one.text, one.images) for one in example.records),
        )
        for example in examples
    ]


def write_curation_page(path: Path, page: CurationPage) -> None:
    """Write the page as one HTML file."""
    write_page(path, PageTemplate("curation.html").render(title=translate(page.title), page=page))
