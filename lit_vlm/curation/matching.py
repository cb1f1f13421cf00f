"""Search for similar hashes among millions: candidates by locality-sensitive hashing in numpy, confirmed by their distance.

A bucket holds the items that agree in a part of their hash. A very full bucket, such as that of blank pages, is not compared
pair by pair: each item meets its `WINDOW` nearest neighbours in brightness or order, and the number of such buckets is reported.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from lit_vlm.curation.picture_hashes import HASH_BITS, MAX_BITS
from lit_vlm.curation.text_hashes import NUM_PERMUTATIONS, estimate_similarities

WINDOW = 64  # items of a bucket that one item is compared with
MIN_TABLE_BITS = 20
FOUND_BITS, MAX_MISSED = 6, 0.01  # of the pairs that differ in 6 bits of 64 in one view, the tables miss at most 1 %
NUM_BANDS, BAND_ROWS = 21, 6  # at a similarity of 0.8 a pair is missed with 0.2 %
_CHUNK_PAIRS, _CHUNK_TEXT_PAIRS = 1 << 21, 1 << 16  # compared at a time
_CHUNK_QUERIES = 1 << 18  # looked up at a time: their arrays stay in the cache
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
    ranks = np.empty(len(views), np.uint64)
    ranks[np.argsort(brightness, kind="stable")] = np.arange(len(views), dtype=np.uint64)
    views = np.asfortranarray(views)
    everyone = np.arange(len(views))
    asked = [(everyone, everyone)] if others is None else [(everyone, others), (others, everyone)]
    pairs, num_full = PairSet(), 0
    for keys, queries in asked:
        for mask in choose_masks(len(keys)):
            table = HashTable(views[:, 0], keys, ranks, mask)
            num_full += table.num_full_buckets
            for found in table.search(views, queries, max_bits):
                pairs.add(*found)
    return pairs.get_matches(num_full)


def choose_masks(num_keys: int) -> list[np.uint64]:
    """Choose the bits of each table: more for more keys, so that a bucket stays small, and as many tables as the recall needs.

    Tables from one permutation have no bit in common, so they seldom miss the same pair.
    """
    num_bits = max(MIN_TABLE_BITS, math.ceil(math.log2(max(num_keys, 1))) + 1)
    group = HASH_BITS // num_bits
    ways = [
        math.comb(HASH_BITS - count * num_bits, FOUND_BITS) for count in range(group + 1)
    ]  # inclusion and exclusion
    missed = sum((-1) ** count * math.comb(group, count) * one for count, one in enumerate(ways)) / ways[0]
    random = np.random.default_rng(64)
    masks = []
    for _ in range(math.ceil(math.log(MAX_MISSED) / math.log(missed))):
        bits = np.uint64(1) << random.permutation(HASH_BITS).astype(np.uint64)
        masks += [np.bitwise_or.reduce(one) for one in np.split(bits[: group * num_bits], group)]
    return masks


class HashTable:
    """Table of the pictures whose hashes agree in the bits of a mask.

    Args:
        hashes: [N] uint64, of which those of `keys` are in the table.
        ranks: place of each picture in the order of brightness, [N] uint64; the items of a bucket have this order.
    """

    def __init__(self, hashes: np.ndarray, keys: np.ndarray, ranks: np.ndarray, mask: np.uint64) -> None:
        self.mask, self.ranks = mask, ranks
        # A bucket's number is a hash of the masked bits. Twice as many numbers as items keep most other bits out of a bucket
        self.num_bits = max(8, math.ceil(math.log2(max(len(keys), 1))) + 1)
        buckets = self._find_buckets(hashes[keys])
        self.places = buckets << np.uint64(32) | ranks[keys]
        order = np.argsort(self.places)
        self.places, self.numbers = self.places[order], keys[order]
        self.hashes = hashes[self.numbers]
        sizes = np.bincount(buckets.astype(np.int64), minlength=1 << self.num_bits)
        self.starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.uint32)
        self.num_full_buckets = int((sizes > WINDOW).sum())

    def _find_buckets(self, hashes: np.ndarray) -> np.ndarray:
        return ((hashes & self.mask) * _MIX) >> np.uint64(64 - self.num_bits)

    def search(self, views: np.ndarray, queries: np.ndarray, max_bits: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Search for the pictures that are near a view of others: (number, number) of pairs, as two arrays at a time.

        Args:
            views: [N, V] uint64, of which the rows `queries` are searched for.
        """
        for column in range(views.shape[1]):
            for start in range(0, len(queries), _CHUNK_QUERIES):
                owners = queries[start : start + _CHUNK_QUERIES]
                hashes = views[owners, column]
                buckets = self._find_buckets(hashes)
                low, high = self.starts[buckets], self.starts[buckets + np.uint64(1)]
                hit = np.flatnonzero(high > low)
                owners, hashes, buckets = owners[hit], hashes[hit], buckets[hit]
                low, high = low[hit].astype(np.int64), high[hit].astype(np.int64)
                full = np.flatnonzero(high - low > WINDOW)
                if len(full):
                    own = buckets[full] << np.uint64(32) | self.ranks[owners[full]]
                    middle = np.searchsorted(self.places, own)
                    low[full] = np.maximum(low[full], middle - WINDOW // 2)
                    high[full] = np.minimum(high[full], middle + WINDOW // 2)
                for query, place in iterate_ranges(low, high):
                    near = np.flatnonzero(np.bitwise_count(hashes[query] ^ self.hashes[place]) <= max_bits)
                    yield owners[query[near]], self.numbers[place[near]]


class PairSet:
    """Set of pairs of numbers, merged now and then, so that pairs which are found again take no memory."""

    def __init__(self) -> None:
        self.codes, self.waiting, self.num_waiting = np.zeros(0, np.uint64), list[np.ndarray](), 0

    def add(self, first: np.ndarray, second: np.ndarray) -> None:
        """Add pairs, in any order; a number with itself is none."""
        low, high = np.minimum(first, second).astype(np.uint64), np.maximum(first, second).astype(np.uint64)
        codes = (low << np.uint64(32) | high)[low != high]
        self.waiting.append(codes)
        self.num_waiting += len(codes)
        if self.num_waiting > max(len(self.codes), _CHUNK_PAIRS):
            self.merge()

    def merge(self) -> None:
        """Merge the pairs that wait into the set."""
        self.codes = np.unique(np.concatenate([self.codes, *self.waiting]))
        self.waiting, self.num_waiting = [], 0

    def get_matches(self, num_full_buckets: int) -> Matches:
        """Return the pairs, ascending."""
        self.merge()
        first, second = self.codes >> np.uint64(32), self.codes & np.uint64(0xFFFFFFFF)
        return Matches(first.astype(np.int64), second.astype(np.int64), num_full_buckets)


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
    pairs, num_full = PairSet(), 0
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
            pairs.add(first[near], second[near])
    return pairs.get_matches(num_full)
