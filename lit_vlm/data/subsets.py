"""Subsets of a source of any format: some of its records, or all records with a lower tile limit."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import numpy as np

from lit_vlm.types import Record, Source


class PositionSubset:
    """Subset of a source's records, by their positions.

    Args:
        positions: [n], ascending.
        digest: of the source and of the choice.
    """

    def __init__(self, source: Source, positions: np.ndarray, digest: str) -> None:
        self.name, self.digest = source.name, digest
        self._source, self._positions = source, positions

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, index: int) -> Record:
        return self._source[self._get_position(index)]

    def origin(self, index: int) -> str:
        return _get_origin(self._source, self._get_position(index))

    def digest_of(self, start: int, stop: int) -> str:
        """Compute the digest of the selected records start to stop - 1."""
        return _compute_digest(self._source, self._positions[start:stop].astype(np.int64))

    def _get_position(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return int(self._positions[index])


class SourceSubset(PositionSubset):
    """Subset of a source's records: a pseudo-random fraction.

    The choice depends on the source's name and a record's position alone. So a selected record stays selected when
    records are appended.

    Args:
        fraction: above 0, at most 1.
        limit: maximum number of records; the first of the selected ones are used.
    """

    def __init__(self, source: Source, fraction: float, limit: int | None = None) -> None:
        digest = hashlib.sha256(repr((source.digest, source.name, fraction, limit)).encode()).hexdigest()
        super().__init__(source, choose_positions(source.name, len(source), fraction)[:limit], digest)
        self._fraction, self._limit = fraction, limit

    def __reduce__(self):  # computing the positions again is faster than sending them to a worker
        return SourceSubset, (self._source, self._fraction, self._limit)


class TileLimitedSource:
    """Source with a lower tile limit: its images get at most `max_tiles` tiles besides their base view."""

    def __init__(self, source: Source, max_tiles: int) -> None:
        self.name, self._source, self._max_tiles = source.name, source, max_tiles
        self.digest = hashlib.sha256(f"{source.digest}\0{max_tiles}".encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Record:
        return replace(self._source[index], max_tiles=self._max_tiles)


def find_in_whole(source: Source, positions: np.ndarray) -> tuple[Source, np.ndarray]:
    """Find records of a subset, [n], in the source that the subset was made of. Returns that source and the positions there, [n]."""
    while isinstance(source, PositionSubset | TileLimitedSource):
        if isinstance(source, PositionSubset):
            positions = source._positions[positions]
        source = source._source
    return source, positions


def choose_positions(name: str, num_records: int, fraction: float) -> np.ndarray:
    """Choose the positions of a fraction of a source's records.

    Returns:
        [n] uint32, ascending.
    """
    seed = np.uint64(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little"))
    threshold = np.uint64(min(int(fraction * 2**64), 2**64 - 1))
    parts = [np.empty(0, np.uint32)]
    for start in range(0, num_records, 1 << 20):
        positions = np.arange(start, min(start + (1 << 20), num_records), dtype=np.uint64)
        parts.append(positions[_hash_splitmix64(positions ^ seed) <= threshold].astype(np.uint32))
    return np.concatenate(parts)


def find_runs(positions: np.ndarray) -> list[tuple[int, int]]:
    """Find the runs of consecutive numbers in [n] ascending positions: (first, last) of each."""
    if not len(positions):
        return []
    starts = np.flatnonzero(np.diff(positions, prepend=positions[:1] - 2) != 1)
    ends = np.append(starts[1:], len(positions)) - 1
    return list(zip(positions[starts].tolist(), positions[ends].tolist(), strict=True))


def _hash_splitmix64(values: np.ndarray) -> np.ndarray:
    """Hash each uint64 with splitmix64: every input bit affects every output bit."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _get_origin(source: Any, position: int) -> str:
    return source.origin(position) if hasattr(source, "origin") else f"{source.name}[{position}]"


def _compute_digest(source: Any, positions: np.ndarray) -> str:
    if not hasattr(source, "digest_of"):  # then the digest of the whole source stands for the content of its records
        return hashlib.sha256(source.digest.encode() + positions.tobytes()).hexdigest()
    digests = [source.digest_of(first, last + 1) for first, last in find_runs(positions)]
    return hashlib.sha256(repr(digests).encode()).hexdigest()
