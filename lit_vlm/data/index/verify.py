"""Image verification: decode every image once, before training, to find images that cannot be decoded.

It is separate from the index, because it reads all bytes: it takes hours where the index takes minutes. Its result is
stored next to the index, and `build_index` then excludes the bad records.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from lit_vlm.data.index.columns import Index
from lit_vlm.data.index.fingerprint import picture_name, stamp
from lit_vlm.data.index.shards import Bad, Shard, Shelf, Span, alone, shelf_of, spans_of
from lit_vlm.data.index.store import OnProgress, verified_key
from lit_vlm.data.index.workers import parallel
from lit_vlm.types import Fault, ImageSource, Record, RecordError, Source


def verify(
    data: Index | Sequence[Source], store: Path | None, *, workers: int = 1, on_progress: OnProgress | None = None
) -> list[tuple[str, RecordError]]:
    """Verify images: decode each image that was not decoded yet, or whose size or modification time changed since.

    After an interruption it resumes with the shard at which it stopped.

    Args:
        data: an index, or its sources.
        store: cache folder of the index; None: the result is not stored.
        workers: processes that decode.
        on_progress: called after each shard.

    Returns:
        (source name, error) of the records with images that cannot be decoded completely.
    """
    sources = data.sources if isinstance(data, Index) else data
    cache, errors = shelf_of(store), list[tuple[str, RecordError]]()
    function = partial(_verified, sources, cache)
    for source_id, source in enumerate(sources):
        with alone(source, store, "verify"):
            shard_ranges, done = spans_of(source_id, source, store), 0
            bad: dict[int, list[Bad]] = {}  # by the start of the shard; shards finish in any order
            for shard_range, shard in parallel(function, shard_ranges, workers):
                cache.put(verified_key(shard_range), shard)
                bad[shard_range.start] = shard.bad
                done += len(shard_range)
                if on_progress:
                    on_progress(source.name, done, len(source))
        errors += [(source.name, record.error(source, start)) for start in sorted(bad) for record in bad[start]]
    return errors


def _verified(sources: Sequence[Source], shelf: Shelf, span: Span) -> Shard:
    """Verify a shard: stamp of each record, and records with a bad image. Images known to be good are not decoded."""
    source, previous = sources[span.source], shelf.get(verified_key(span))
    stamps, bad = np.zeros(len(span), np.uint64), list[Bad]()
    suspects = {record.position for record in previous.bad} if previous else set()
    known_faults: dict[bytes, RecordError | None] = {}  # by image
    for position in range(len(span)):
        try:
            record = source[span.start + position]
        except RecordError:  # the index has this error
            continue
        stamps[position] = stamp(record)
        if previous and previous.columns["stamp"][position] == stamps[position] and position not in suspects:
            continue
        fault = find_fault(record, known_faults)
        if fault is not None:
            bad.append(Bad.of(position, fault))
    return Shard({"stamp": stamps}, bad)


def find_fault(record: Record, seen: dict[bytes, RecordError | None]) -> RecordError | None:
    """Decode the record's images, except those in `known_faults`; return the first error, or None."""
    for number, image in enumerate(record.images):
        name = picture_name(record, number)
        if name not in seen:
            seen[name] = _decoded(image, record.origin)
        if seen[name] is not None:
            return seen[name]
    return None


def _decoded(image: ImageSource, origin: str) -> RecordError | None:
    """Decode an image; return the error, or None."""
    try:
        height, width = image.size
        picture = image.load()
    except RecordError as error:
        return error
    if picture.size == (width, height):
        return None
    reason = f"its image's header says {width} x {height} pixels, decoded it has {picture.width} x {picture.height}"
    return RecordError(origin, reason, "Replace the image, or set such records aside", Fault.broken)
