"""Subsets of a source of any format: some of its records, or all records with a lower tile limit or larger images."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image

from lit_vlm.types import LazyImage, Record, Source


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


class ChangedSource:
    """Source whose records are changed when they are read; subclasses implement `_change`.

    Args:
        change: description of the change, a part of the digest.
    """

    def __init__(self, source: Source, change: str) -> None:
        self.name, self._source = source.name, source
        self.digest = hashlib.sha256(f"{source.digest}\0{change}".encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Record:
        return self._change(self._source[index])

    def origin(self, index: int) -> str:
        return _get_origin(self._source, index)

    def _change(self, record: Record) -> Record:
        raise NotImplementedError


class TileLimitedSource(ChangedSource):
    """Source with a lower tile limit: its images get at most `max_tiles` tiles besides their base view."""

    def __init__(self, source: Source, max_tiles: int) -> None:
        super().__init__(source, str(max_tiles))
        self._max_tiles = max_tiles

    def _change(self, record: Record) -> Record:
        return replace(record, max_tiles=self._max_tiles)


class EnlargedSource(ChangedSource):
    """Source whose images are enlarged until their longer side has `side_px` pixels; larger ones stay as they are."""

    def __init__(self, source: Source, side_px: int) -> None:
        super().__init__(source, f"enlarged to {side_px} px")
        self._side_px = side_px

    def _change(self, record: Record) -> Record:
        return replace(record, images=tuple(EnlargedImage(image, self._side_px) for image in record.images))


class EnlargedImage:
    """Image that is enlarged when it is loaded. All else, such as its hash, is that of the image itself.

    VARCO-VISION-2.0's card enlarges pictures in this way before OCR.
    """

    def __init__(self, image: LazyImage, side_px: int) -> None:
        self._image, self._side_px = image, side_px

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels after the enlargement."""
        height, width = self._image.size
        scale = self._side_px / max(height, width)
        return (height, width) if scale <= 1 else (max(1, int(height * scale)), max(1, int(width * scale)))

    def load(self) -> Image.Image:
        """Load the image as upright RGB, and enlarge it."""
        image, (height, width) = self._image.load(), self.size
        return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.LANCZOS)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "load_at_least":  # an image that is enlarged is decoded at full size
            raise AttributeError(name)
        return getattr(self._image, name)


def find_in_whole(source: Source, positions: np.ndarray) -> tuple[Source, np.ndarray]:
    """Find records of a subset, [n], in the source that the subset was made of. Returns that source and the positions there, [n]."""
    while isinstance(source, PositionSubset | ChangedSource):
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
