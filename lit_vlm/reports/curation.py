"""Page of task=curate: what was left out and why, and what stayed, with samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lit_vlm.curation.mixture import ResultTable
from lit_vlm.messages import translate
from lit_vlm.reports.preflight.samples import encode_data_url
from lit_vlm.reports.templates import PageTemplate, write_page
from lit_vlm.types import LazyImage, RecordError

MAX_TEXT = 400  # characters of the turns of an example
MAX_PICTURES = 2


@dataclass(frozen=True, slots=True)
class ShownRecord:
    """Record on the page: where it is, its turns, and its pictures as data URLs."""

    title: str
    origin: str
    text: str
    pictures: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class CurationExample:
    """Records side by side, with the reason why they are shown together."""

    reason: str
    records: tuple[ShownRecord, ...]


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
class CurationPage:
    """Values of the page.

    Attributes:
        counts: (what, number) of the results.
        left_out, kept: examples of records that were left out, and of similar ones that stay.
        notes: sentences about what was not done.
        command: command line that made the page.
        tables: of the results.
        kept_title: heading of the examples that stay.
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


def write_curation_page(path: Path, page: CurationPage) -> None:
    """Write the page as one HTML file."""
    write_page(path, PageTemplate("curation.html").render(title=translate(page.title), page=page))
