"""Search for similar hashes among millions: candidates by locality-sensitive hashing in numpy, confirmed by their distance.

A bucket holds the items that agree in a part of their hash. A very full bucket, such as that of blank pages, is not compared
pair by pair: each item meets its `WINDOW` nearest neighbours in brightness or order, and the number of such buckets is reported.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from lit_vlm.curation.picture_hashes import HASH_BITS, MAX_BITS
from lit_vlm.curation.text_hashes import NUM_PERMUTATIONS, estimate_similarities

WINDOW = 64  # items of a bucket that one item is compared with
NUM_TABLES, TABLE_BITS = 40, 20  # at 6 differing bits of 64 a pair is missed with 0.2 %, at 10 with 25 %
NUM_BANDS, BAND_ROWS = 21, 6  # at a similarity of 0.8 a pair is missed with 0.2 %
_CHUNK_PAIRS, _CHUNK_TEXT_PAIRS = 1 << 21, 1 << 16  # compared at a time
_MIX = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, slots=True)
class Matches:
    """Pairs of similar items, by their numbers.

    Attributes:
        first, second: [n] int64, first < second, each pair once.
        num_full_buckets: buckets that held more than `WINDOW` items.
    """

    first: np.ndarray
    second: np.ndarray
    num_full_buckets: int


def match_pictures(
    views: np.ndarray, brightness: np.ndarray, others: np.ndarray | None = None, max_bits: int = MAX_BITS
) -> Matches:
    """Find pairs of pictures of which a view of one is near the whole of the other.

    Args:
        views: [N, V] uint64; column 0 is the hash of the whole picture.
        brightness: mean level of each picture, 0 to 255; orders full buckets.
        others: numbers of the pictures that a pair needs at least one of, such as those of benchmarks; None: any pair.
    """
    num_pictures, num_views = views.shape
    owners = np.tile(np.arange(num_pictures), num_views)
    queries, order = views.T.ravel(), brightness.astype(np.float64)
    is_other = np.ones(num_pictures, bool)
    if others is not None:
        is_other[:] = False
        is_other[others] = True
    random = np.random.default_rng(64)
    found, num_full = [np.zeros(0, np.uint64)], 0
    for _ in range(NUM_TABLES):
        mask = np.bitwise_or.reduce(np.uint64(1) << random.permutation(HASH_BITS)[:TABLE_BITS].astype(np.uint64))
        pairs, full = _match_table(views[:, 0], queries, owners, order, mask, max_bits, is_other)
        num_full += full
        found.append(pairs)
    codes = np.unique(np.concatenate(found))
    return Matches(
        (codes >> np.uint64(32)).astype(np.int64), (codes & np.uint64(0xFFFFFFFF)).astype(np.int64), num_full
    )


def _match_table(
    keys: np.ndarray,
    queries: np.ndarray,
    owners: np.ndarray,
    order: np.ndarray,
    mask: np.uint64,
    max_bits: int,
    is_other: np.ndarray,
) -> tuple[np.ndarray, int]:
    """Match queries with keys that agree in the bits of a mask. Returns [n] codes of pairs, and the number of full buckets."""
    buckets, numbers, sizes = np.unique(keys & mask, return_inverse=True, return_counts=True)
    places = numbers * 1024.0 + order  # brightness is below 1024, so a bucket is one run of the sorted places
    sorted_keys = np.argsort(places, kind="stable")
    places = places[sorted_keys]
    starts = np.concatenate([[0], np.cumsum(sizes)])
    wanted = queries & mask
    bucket = np.minimum(np.searchsorted(buckets, wanted), len(buckets) - 1)
    hit = np.flatnonzero(buckets[bucket] == wanted)
    bucket, owner = bucket[hit], owners[hit]
    low, high = starts[bucket], starts[bucket + 1]
    full = np.flatnonzero(high - low > WINDOW)
    if len(full):
        middle = np.searchsorted(places, bucket[full] * 1024.0 + order[owner[full]])
        low[full] = np.maximum(low[full], middle - WINDOW // 2)
        high[full] = np.minimum(high[full], middle + WINDOW // 2)
    codes = [np.zeros(0, np.uint64)]
    for query, place in iterate_ranges(low, high):
        first, second = owner[query], sorted_keys[place]
        near = np.bitwise_count(queries[hit[query]] ^ keys[second]) <= max_bits
        near &= (first != second) & (is_other[first] | is_other[second])
        first, second = first[near], second[near]
        codes.append(
            np.minimum(first, second).astype(np.uint64) << np.uint64(32) | np.maximum(first, second).astype(np.uint64)
        )
    return np.unique(np.concatenate(codes)), int((sizes > WINDOW).sum())


def iterate_ranges(
    low: np.ndarray, high: np.ndarray, chunk: int = _CHUNK_PAIRS
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Iterate over all (number of a range, place in it) of ranges low to high - 1, as pairs of arrays in chunks."""
    lengths = np.maximum(high - low, 0)
    ends = np.cumsum(lengths)
    start = 0
    while start < len(low):
        base = int(ends[start - 1]) if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, base + chunk, side="right")))
        counts = lengths[start:stop]
        numbers = np.repeat(np.arange(start, stop), counts)
        offsets = np.arange(len(numbers)) - np.repeat(np.cumsum(counts) - counts, counts)
        yield numbers, low[numbers] + offsets
        start = stop


def match_texts(signatures: np.ndarray, numbers: np.ndarray, min_similarity: float) -> Matches:
    """Find pairs of texts with equal numbers whose estimated Jaccard similarity reaches a threshold.

    Args:
        signatures: [N, P] uint32.
        numbers: digest of the numbers of each text, [N] uint64.
    """
    assert signatures.shape[1] == NUM_PERMUTATIONS
    found, num_full = [np.zeros(0, np.uint64)], 0
    for band in range(NUM_BANDS):
        keys = numbers.copy()
        for row in range(band * BAND_ROWS, (band + 1) * BAND_ROWS):
            keys = (keys ^ (keys >> np.uint64(29)) ^ signatures[:, row]) * _MIX
        order = np.argsort(keys, kind="stable")
        ordered = keys[order]
        starts = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))
        sizes = np.diff(np.append(starts, len(ordered)))
        num_full += int((sizes > WINDOW).sum())
        ends = np.repeat(starts + sizes, sizes)
        low = np.arange(len(ordered)) + 1
        for one, other in iterate_ranges(low, np.minimum(ends, low + WINDOW), _CHUNK_TEXT_PAIRS):
            first, second = order[one], order[other]
            near = estimate_similarities(signatures[first], signatures[second]) >= min_similarity
            near &= numbers[first] == numbers[second]
            first, second = np.minimum(first, second)[near], np.maximum(first, second)[near]
            found.append(first.astype(np.uint64) << np.uint64(32) | second.astype(np.uint64))
        found = [np.unique(np.concatenate(found))]
    codes = found[0]
    return Matches(
        (codes >> np.uint64(32)).astype(np.int64), (codes & np.uint64(0xFFFFFFFF)).astype(np.int64), num_full
    )
