"""Page of task=generate: the counts of each kind, and records beside their new turns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lit_vlm.messages import translate
from lit_vlm.reports.curation import CurationExample
from lit_vlm.reports.templates import PageTemplate, write_page


@dataclass(frozen=True, slots=True)
class GenerationPage:
    """Values of the page.

    Attributes:
        counts: kind -> status -> number of texts.
        accepted, rejected: examples.
        command: command line that made the page.
    """

    title: str
    counts: Mapping[str, Mapping[str, int]]
    settings: Sequence[tuple[str, str]]
    accepted: Sequence[CurationExample]
    rejected: Sequence[CurationExample]
    command: str = ""

    @property
    def statuses(self) -> list[str]:
        """Statuses that any text has."""
        rows = list(self.counts.values())
        return [status for status in (rows[0] if rows else ()) if any(row[status] for row in rows)]


def write_generation_page(path: Path, page: GenerationPage) -> None:
    """Write the page as one HTML file."""
    write_page(path, PageTemplate("generation.html").render(title=translate(page.title), page=page))
