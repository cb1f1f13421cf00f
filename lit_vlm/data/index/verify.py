"""`verify`: decode every picture once, before training meets one that cannot be decoded.

Apart from the index, since it reads all bytes and takes hours where the index takes minutes. What it finds is kept
beside the index, and `build_index` leaves those records out from then on.
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
    """Decode each picture that was not decoded yet, or has another size or time since.

    Interrupted, it goes on with the shard where it stopped.

    Args:
        data: an index, or its sources.
        store: where the index is kept; None: nothing is remembered.
        workers: processes that decode.

    Returns:
        (source name, what is wrong) of the records with pictures that cannot be decoded whole.
    """
    sources = data.sources if isinstance(data, Index) else data
    shelf, found = shelf_of(store), list[tuple[str, RecordError]]()
    work = partial(_verified, sources, shelf)
    for number, source in enumerate(sources):
        with alone(source, store, "verify"):
            spans, done = spans_of(number, source, store), 0
            bad: dict[int, list[Bad]] = {}  # by the span's start; they come in any order
            for span, shard in parallel(work, spans, workers):
                shelf.put(verified_key(span), shard)
                bad[span.start] = shard.bad
                done += len(span)
                if on_progress:
                    on_progress(source.name, done, len(source))
        found += [(source.name, record.error(source, start)) for start in sorted(bad) for record in bad[start]]
    return found


def _verified(sources: Sequence[Source], shelf: Shelf, span: Span) -> Shard:
    """The stamp of each record's pictures, and the records with a bad one. Those found good before are not decoded."""
    source, before = sources[span.source], shelf.get(verified_key(span))
    stamps, bad = np.zeros(len(span), np.uint64), list[Bad]()
    suspects = {record.position for record in before.bad} if before else set()
    seen: dict[bytes, RecordError | None] = {}  # by picture
    for position in range(len(span)):
        try:
            record = source[span.start + position]
        except RecordError:  # the index says so
            continue
        stamps[position] = stamp(record)
        if before and before.columns["stamp"][position] == stamps[position] and position not in suspects:
            continue
        fault = find_fault(record, seen)
        if fault is not None:
            bad.append(Bad.of(position, fault))
    return Shard({"stamp": stamps}, bad)


def find_fault(record: Record, seen: dict[bytes, RecordError | None]) -> RecordError | None:
    """Decode the record's pictures, but those that were `seen`; the first that cannot be decoded whole."""
    for number, image in enumerate(record.images):
        name = picture_name(record, number)
        if name not in seen:
            seen[name] = _decoded(image, record.origin)
        if seen[name] is not None:
            return seen[name]
    return None


def _decoded(image: ImageSource, origin: str) -> RecordError | None:
    """What is wrong with the picture."""
    try:
        height, width = image.size
        picture = image.load()
    except RecordError as error:
        return error
    if picture.size == (width, height):
        return None
    reason = f"its image's header says {width} x {height} pixels, decoded it has {picture.width} x {picture.height}"
    return RecordError(origin, reason, "Replace the image, or set such records aside", Fault.broken)
