"""Subset of a source without an index, with records that are spread evenly over it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lit_vlm.data.index.shards import origin_of, shelf_of, spans_of
from lit_vlm.data.index.store import index_key
from lit_vlm.data.processor import Processor
from lit_vlm.types import Record, Source


class EvenSample:
    """Subset of at most `max_records` records of a source, evenly spaced."""

    def __init__(self, source: Source, most: int) -> None:
        self.name, self.whole = source.name, source
        places = np.linspace(0, len(source) - 1, min(most, len(source)))
        self._positions = np.unique(places.round().astype(np.int64)).tolist()

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, index: int) -> Record:
        return self.whole[self._positions[index]]

    def origin(self, index: int) -> str:
        return origin_of(self.whole, self._positions[index])

    @property
    def digest(self) -> str:
        return f"{self.whole.digest}:{len(self)}"


def is_indexed(source: Source, processor: Processor, store: Path) -> bool:
    """Return whether every shard of the source is in the index cache."""
    shelf = shelf_of(store)
    return all(shelf.get(index_key(processor, span)) is not None for span in spans_of(0, source, store))


def looked_at(source: Source, processor: Processor, store: Path, most: int) -> Source:
    """Return the source itself if it is small or indexed, else an evenly spaced subset of `max_records` records."""
    small = len(source) <= most
    return source if small or is_indexed(source, processor, store) else EvenSample(source, most)
