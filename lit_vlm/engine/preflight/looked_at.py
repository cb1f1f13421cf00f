"""Subset of a source without an index, with records that are spread evenly over it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lit_vlm.data.index.shards import get_origin, list_shard_ranges, open_shard_cache
from lit_vlm.data.index.store import compute_index_key
from lit_vlm.data.processor import Processor
from lit_vlm.types import Record, Source


class EvenlySpacedSubset:
    """Subset of at most `max_records` records of a source, evenly spaced."""

    def __init__(self, source: Source, max_records: int) -> None:
        self.name, self.source = source.name, source
        places = np.linspace(0, len(source) - 1, min(max_records, len(source)))
        self._positions = np.unique(places.round().astype(np.int64)).tolist()

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, index: int) -> Record:
        return self.source[self._positions[index]]

    def origin(self, index: int) -> str:
        return get_origin(self.source, self._positions[index])

    @property
    def digest(self) -> str:
        return f"{self.source.digest}:{len(self)}"


def is_indexed(source: Source, processor: Processor, store: Path) -> bool:
    """Return whether every shard of the source is in the index cache."""
    shelf = open_shard_cache(store)
    return all(
        shelf.get(compute_index_key(processor, span)) is not None for span in list_shard_ranges(0, source, store)
    )


def subsample_source(source: Source, processor: Processor, store: Path, max_records: int) -> Source:
    """Return the source itself if it is small or indexed, else an evenly spaced subset of `max_records` records."""
    small = len(source) <= max_records
    return source if small or is_indexed(source, processor, store) else EvenlySpacedSubset(source, max_records)
