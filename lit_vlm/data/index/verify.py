"""Image verification: decode every image once, before training, to find images that cannot be decoded.

It is separate from the index, because it reads all bytes: it takes hours where the index takes minutes. Its result is
stored next to the index, and `build_index` then excludes the bad records.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from lit_vlm.data.index.build import OnProgress, compute_verified_key, map_parallel
from lit_vlm.data.index.fingerprint import compute_stamp, get_image_key
from lit_vlm.data.index.sample_index import SampleIndex
from lit_vlm.data.index.shard_cache import (
    BadRecord,
    Shard,
    ShardCache,
    ShardRange,
    list_shard_ranges,
    lock_source,
    open_shard_cache,
)
from lit_vlm.types import Fault, LazyImage, Record, RecordError, Source


def verify_images(
    data: SampleIndex | Sequence[Source], store: Path | None, *, workers: int = 1, on_progress: OnProgress | None = None
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
    sources = data.sources if isinstance(data, SampleIndex) else data
    cache, errors = open_shard_cache(store), list[tuple[str, RecordError]]()
    function = partial(_verify_shard, sources, cache)
    for source_id, source in enumerate(sources):
        with lock_source(source, store, "verify"):
            shard_ranges, done = list_shard_ranges(source_id, source, store), 0
            bad: dict[int, list[BadRecord]] = {}  # by the start of the shard; shards finish in any order
            for shard_range, shard in map_parallel(function, shard_ranges, workers):
                cache.put(compute_verified_key(shard_range), shard)
                bad[shard_range.start] = shard.bad_records
                done += len(shard_range)
                if on_progress:
                    on_progress(source.name, done, len(source))
        errors += [(source.name, record.to_error(source, start)) for start in sorted(bad) for record in bad[start]]
    return errors


def _verify_shard(sources: Sequence[Source], cache: ShardCache, shard_range: ShardRange) -> Shard:
    """Verify a shard: stamp of each record, and records with a bad image. Images known to be good are not decoded."""
    source, previous = sources[shard_range.source_id], cache.get(compute_verified_key(shard_range))
    stamps, bad = np.zeros(len(shard_range), np.uint64), list[BadRecord]()
    suspects = {record.position for record in previous.bad_records} if previous else set()
    known_faults: dict[bytes, RecordError | None] = {}  # by image
    for position in range(len(shard_range)):
        try:
            record = source[shard_range.start + position]
        except RecordError:  # the index has this error
            continue
        stamps[position] = compute_stamp(record)
        if previous and previous.columns["stamp"][position] == stamps[position] and position not in suspects:
            continue
        fault = find_image_fault(record, known_faults)
        if fault is not None:
            bad.append(BadRecord.from_error(position, fault))
    return Shard({"stamp": stamps}, bad)


def find_image_fault(record: Record, known_faults: dict[bytes, RecordError | None]) -> RecordError | None:
    """Decode the record's images, except those in `known_faults`; return the first error, or None."""
    for number, image in enumerate(record.images):
        name = get_image_key(record, number)
        if name not in known_faults:
            known_faults[name] = _check_decoding(image, record.origin)
        if known_faults[name] is not None:
            return known_faults[name]
    return None


def _check_decoding(image: LazyImage, origin: str) -> RecordError | None:
    """Decode an image; return the error, or None."""
    try:
        size = height, width = image.size
        verify = getattr(image, "verify", None)  # an image of a custom source may have no such method
        decoded = verify() if verify else image.load().size[::-1]
    except RecordError as error:
        return error
    if decoded == size:
        return None
    reason = f"its image's header says {width} x {height} pixels, decoded it has {decoded[1]} x {decoded[0]}"
    return RecordError(origin, reason, "Replace the image, or set such records aside", Fault.broken)
