"""Mixture that is curated: its sources with all of their records, and what a search found in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any, TypeVar

import numpy as np

from lit_vlm.curation.features import Features, OnProgress
from lit_vlm.curation.text_hashes import list_messages
from lit_vlm.data.generated import GeneratedTurns
from lit_vlm.data.index.build import map_parallel
from lit_vlm.data.index.shard_cache import get_origin
from lit_vlm.data.selection import RowsIdentity, Selection
from lit_vlm.types import LazyImage, Record, RecordError, Source, UserError

T = TypeVar("T")
Item = TypeVar("Item")
BATCH_RECORDS = 8192  # of one task of a worker


@dataclass(frozen=True, slots=True)
class ExampleRecord:
    """Record that the page shows: where it is, its turns and its pictures."""

    title: str
    origin: str
    text: str
    images: tuple[LazyImage, ...] = ()


@dataclass(frozen=True, slots=True)
class Example:
    """Records side by side, with the reason why they are shown together."""

    reason: str
    records: tuple[ExampleRecord, ...]


@dataclass(frozen=True, slots=True)
class ResultTable:
    """Table of results, for the page and the terminal: the first column is a name, the others are numbers."""

    title: str
    headings: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class ScoreDistribution:
    """Scores of records, for a histogram.

    Attributes:
        name: what the score is.
        scores: by language, or by another property.
        threshold: below which records leave; None: none does.
    """

    name: str
    scores: dict[str, list[float]]
    threshold: float | None


@dataclass(slots=True)
class CuratedMixture:
    """Sources of a mixture with all of their records.

    Attributes:
        identities: of the records of each source.
        selections: that the sources had already.
        features: of all records.
        is_out: records that these selections leave out, [R] bool.
    """

    sources: list[Source]
    identities: list[RowsIdentity]
    selections: list[Selection | None]
    features: Features
    is_out: np.ndarray

    def show(self, title: str, record: int, mask: Callable[[str], str] = str) -> ExampleRecord:
        """Prepare a record for the page.

        Args:
            mask: changes each text that is shown.
        """
        source = self.sources[self.features.source_ids[record]]
        position = int(self.features.positions[record])
        found = source[position]
        text = "\n".join(f"{message.role}: {mask(message.text)}" for message in list_messages(found))
        return ExampleRecord(title, found.origin, text, tuple(found.images))

    def get_key(self, record: int) -> str:
        """Return the source and position of a record as a text, for numbers drawn by record."""
        return f"{self.sources[self.features.source_ids[record]].name}\0{self.features.positions[record]}"

    def describe(self, record: int) -> dict[str, Any]:
        """Describe a record in a list: its source, position and origin."""
        source = self.sources[self.features.source_ids[record]]
        position = int(self.features.positions[record])
        return {"source": source.name, "position": position, "origin": get_origin(source, position)}


@dataclass(slots=True)
class CurationResult:
    """Result of a search.

    Attributes:
        left_out: numbers of the records to leave out, ascending.
        lines: one JSON object for each record that was found.
        counts: (what, number).
        examples_out, examples_kept: for the page.
        groups: records that share a picture.
        notes: sentences about what was not done.
        tables: for the page and the terminal.
        scores: for the page.
        generated: turns of new samples, by source; {}: the search makes none.
    """

    left_out: list[int]
    lines: list[dict[str, Any]]
    counts: list[tuple[str, int]]
    examples_out: list[Example] = field(default_factory=list)
    examples_kept: list[Example] = field(default_factory=list)
    groups: list[list[int]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    tables: list[ResultTable] = field(default_factory=list)
    scores: list[ScoreDistribution] = field(default_factory=list)
    generated: dict[str, list[GeneratedTurns]] = field(default_factory=dict)


def iterate_batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Iterate over items in lists of `size`; the last may be shorter."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def read_images(sources: Sequence[Source], places: Sequence[tuple[int, int]]) -> list[tuple[LazyImage, ...] | str]:
    """Read the pictures of records, not decoded; the message instead if a record cannot be read.

    Sources are read by one thread: not all of them allow several.

    Args:
        places: (number of the source, position) of each record.
    """
    found: list[tuple[LazyImage, ...] | str] = []
    for source_id, position in places:
        try:
            found.append(tuple(sources[source_id][position].images))
        except RecordError as error:
            found.append(str(error))
    return found


def map_records(
    sources: Sequence[Source],
    function: Callable[[Record], T | None],
    *,
    workers: int,
    on_progress: OnProgress | None = None,
) -> tuple[list[T | None], dict[int, str]]:
    """Map a function over all records of some sources in parallel.

    Args:
        function: may raise RecordError, as for a picture that is missing.
        workers: processes that read.
        on_progress: called after each batch of a source.

    Returns:
        Results in the order of the records, None for those that cannot be read, and the messages of these by number.
    """
    results, errors = list[T | None](), dict[int, str]()
    for source in sources:
        first, done = len(results), 0
        results += [None] * len(source)
        starts = range(0, len(source), BATCH_RECORDS)
        batches = [range(start, min(start + BATCH_RECORDS, len(source))) for start in starts]
        for batch, (values, messages) in map_parallel(partial(_map_batch, source, function), batches, workers):
            results[first + batch.start : first + batch.stop] = values
            errors |= {first + position: message for position, message in messages.items()}
            done += len(batch)
            if on_progress:
                on_progress(source.name, done, len(source))
    return results, errors


def _map_batch(
    source: Source, function: Callable[[Record], T | None], positions: range
) -> tuple[list[T | None], dict[int, str]]:
    values, messages = list[T | None](), dict[int, str]()
    for position in positions:
        try:
            values.append(function(source[position]))
        except RecordError as error:
            values.append(None)
            messages[position] = str(error)
    return values, messages


def mark_left_out(features: Features, selections: Sequence[Selection | None]) -> np.ndarray:
    """Mark the records that selections leave out: [R] bool."""
    is_out = np.zeros(len(features.rows), bool)
    for source_id, selection in enumerate(selections):
        if selection is not None:
            start = int(np.searchsorted(features.source_ids, source_id))
            is_out[start + selection.list_left_out()] = True
    return is_out


def require_readable(mixture: CuratedMixture) -> None:
    """Raise UserError if no record can be read."""
    errors = mixture.features.errors
    if len(errors) == len(mixture.features.rows):
        name, message = errors[0] if errors else ("", "the sources have no records")
        raise UserError(f"data.sources: no record can be read, so nothing was compared. {name}: {message}")


def choose_examples(items: Sequence[Any], groups: Sequence[str], count: int) -> list[Any]:
    """Choose examples spread over the groups, and over the order within each."""
    by_group: dict[str, list[Any]] = {}
    for item, group in zip(items, groups, strict=True):
        by_group.setdefault(group, []).append(item)
    share = -(-count // max(len(by_group), 1))
    spread = [
        [members[place] for place in np.unique(np.linspace(0, len(members) - 1, share).astype(int))]
        for members in by_group.values()
    ]
    return [item for members in spread for item in members][:count] if count else []
