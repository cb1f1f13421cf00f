"""Duplicates in a mixture: the first record of each group stays, in the order of the sources.

A duplicate record has the same pictures and the same turns as a record that stays. Two pictures are the same by their bytes,
their pixels, or their view and its details. A record is only compared with records that stay, so a chain of small changes removes nothing
that differs from what is left.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
from PIL import Image

from lit_vlm.config.choices import DuplicateKind, PictureMatch
from lit_vlm.config.curation import CurateConfig
from lit_vlm.curation.embeddings import match_embeddings
from lit_vlm.curation.features import Features
from lit_vlm.curation.matching import match_pictures, match_texts
from lit_vlm.curation.mixture import CuratedMixture, CurationResult, Example, choose_examples
from lit_vlm.curation.picture_details import MIN_DETAIL, compare_details
from lit_vlm.curation.picture_hashes import find_same_views
from lit_vlm.curation.text_hashes import estimate_similarities
from lit_vlm.data.index.build import map_parallel
from lit_vlm.data.lazy_images import hash_pixels
from lit_vlm.formatting import format_count
from lit_vlm.types import RecordError, Source


class Evidence(StrEnum):
    """Evidence that two records are the same, from the surest on."""

    text = "text"  # the same turns, without a picture
    bytes = "bytes"  # the pictures have the same bytes
    pixels = "pixels"  # the pictures have the same pixels
    view = "view"  # the pictures show the same view
    embedding = "embedding"  # the pictures are near in the features of a tower
    similar_text = "similar_text"  # the turns are nearly the same


_ORDER = tuple(Evidence)
_PAIRS_PER_TASK = 64  # of pictures whose details are compared, or pictures whose pixels are


@dataclass(frozen=True, slots=True)
class Duplicate:
    """Record that another record, which stays, makes needless.

    Attributes:
        record, kept: numbers of the two records.
        similarity: estimated Jaccard similarity of the turns; 1 if they are equal.
    """

    record: int
    kept: int
    evidence: Evidence
    similarity: float = 1.0


@dataclass(slots=True)
class PictureGroups:
    """Pictures by what they show.

    Attributes:
        contents, pixels: number of the first picture with the same bytes, and with the same pixels, [N].
        neighbours: for the number of a first picture, those of other first pictures with the same view, or near features.
        num_full_buckets: see `Matches`.
        evidence: what makes two pictures neighbours.
    """

    contents: np.ndarray
    pixels: np.ndarray
    neighbours: dict[int, list[int]]
    num_full_buckets: int
    evidence: Evidence = Evidence.view

    def list_same(self, picture: int) -> list[int]:
        """List the first pictures that are the same as a picture, its own first."""
        first = int(self.pixels[picture])
        return [first, *self.neighbours.get(first, ())]

    def compare(self, first: int, second: int) -> Evidence | None:
        """Compare two pictures; None: they differ."""
        if self.contents[first] == self.contents[second]:
            return Evidence.bytes
        one, other = int(self.pixels[first]), int(self.pixels[second])
        if one == other:
            return Evidence.pixels
        return self.evidence if other in self.neighbours.get(one, ()) else None


def group_pictures(
    sources: Sequence[Source],
    features: Features,
    match: PictureMatch,
    embeddings: np.ndarray | None = None,
    min_cosine: float = 1.0,
    *,
    workers: int,
) -> PictureGroups:
    """Group all pictures of the records by bytes, pixels and view, or features of a tower, as far as `match` asks.

    Args:
        embeddings: features of all pictures, [N, E], for `PictureMatch.embedding`.
        min_cosine: of two pictures that are the same by their features.
    """
    contents = find_first(features.images["content"])
    if match is PictureMatch.bytes:
        return PictureGroups(contents, contents, {}, 0)
    loader = PictureLoader(sources, features)
    pixels = find_same_pixels(features.images["reduction"], contents, loader.load, workers)
    if match is PictureMatch.pixels:
        return PictureGroups(contents, pixels, {}, 0)
    firsts = np.unique(pixels)
    if embeddings is not None:
        pairs, evidence = match_embeddings(embeddings[firsts], min_cosine), Evidence.embedding
        same = list(zip(firsts[pairs.first].tolist(), firsts[pairs.second].tolist(), strict=True))
    else:
        pairs, evidence = (
            match_pictures(features.images["views"][firsts], features.images["brightness"][firsts]),
            Evidence.view,
        )
        first, second = confirm_views(features, firsts[pairs.first], firsts[pairs.second])
        views = list(zip(first.tolist(), second.tolist(), strict=True))
        same = list(confirm_details(views, loader.load, loader.load, workers))
    neighbours = defaultdict[int, list[int]](list)
    for one, other in same:
        neighbours[one].append(other)
        neighbours[other].append(one)
    return PictureGroups(contents, pixels, dict(neighbours), pairs.num_full_buckets, evidence)


def confirm_views(features: Features, first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Confirm candidate pairs of pictures by their thumbnails. Returns the pairs that show the same view."""
    kept: list[np.ndarray] = [np.zeros(0, bool)]
    for start in range(0, len(first), 1 << 14):
        part = slice(start, start + (1 << 14))
        numbers, places = np.unique(np.concatenate([first[part], second[part]]), return_inverse=True)
        kept.append(find_same_views(features.read_thumbnails(numbers), *np.split(places, 2)))
    same = np.concatenate(kept)
    return first[same], second[same]


class PictureLoader:
    """Loader of the pictures of records by their number."""

    def __init__(self, sources: Sequence[Source], features: Features) -> None:
        self.sources, self.features = sources, features
        self.owners = np.repeat(np.arange(len(features.rows)), features.rows["num_images"])

    def load(self, picture: int) -> Image.Image:
        """Load a picture. Raises RecordError if its record or its file cannot be read."""
        features, record = self.features, int(self.owners[picture])
        found = self.sources[features.source_ids[record]][int(features.positions[record])]
        return found.images[picture - int(features.first_images[record])].load()


def confirm_details(
    pairs: list[tuple[int, int]],
    load_first: Callable[[int], Image.Image],
    load_second: Callable[[int], Image.Image],
    workers: int,
) -> list[tuple[int, int]]:
    """Confirm pairs of pictures by their details. Returns the pairs that stay, in their order."""

    def compare(pair: tuple[int, int]) -> bool:
        try:
            return compare_details(load_first(pair[0]), load_second(pair[1])) >= MIN_DETAIL
        except RecordError:  # changed since it was hashed: its thumbnail decides
            return True

    tasks = [tuple(pairs[start : start + _PAIRS_PER_TASK]) for start in range(0, len(pairs), _PAIRS_PER_TASK)]
    same = dict(map_parallel(lambda task: [compare(pair) for pair in task], tasks, workers))
    return [pair for task in tasks for pair, is_same in zip(task, same[task], strict=True) if is_same]


def find_first(digests: np.ndarray) -> np.ndarray:
    """Find the number of the first equal digest for each one: [N] int64 of [N, 2] uint64."""
    view = np.ascontiguousarray(digests).view([("a", "u8"), ("b", "u8")]).ravel()
    _, first, inverse = np.unique(view, return_index=True, return_inverse=True)
    return first[inverse.ravel()].astype(np.int64)


def find_same_pixels(
    reductions: np.ndarray, contents: np.ndarray, load: Callable[[int], Image.Image], workers: int
) -> np.ndarray:
    """Find the number of the first picture with the same pixels for each one: [N] int64.

    Only pictures of an equal reduction and other bytes are decoded; there are few besides copies.

    Args:
        reductions: digests of the pictures' size and reduction, [N, 2] uint64.
        contents: number of the first picture with the same bytes, [N].
    """
    firsts = np.unique(contents)
    _, groups, sizes = np.unique(find_first(reductions[firsts]), return_inverse=True, return_counts=True)
    digests = digest_pixels(firsts[sizes[groups.ravel()] > 1].tolist(), load, workers)
    same, result = dict[bytes, int](), np.arange(len(contents))
    for picture, digest in digests.items():
        result[picture] = same.setdefault(digest, picture)
    return result[contents]


def digest_pixels(pictures: list[int], load: Callable[[int], Image.Image], workers: int) -> dict[int, bytes]:
    """Digest size and pixels of pictures by their number. One that cannot be read any more is missing."""

    def digest(picture: int) -> bytes | None:
        try:
            return hash_pixels(np.asarray(load(picture)))
        except RecordError:
            return None

    tasks = [tuple(pictures[start : start + _PAIRS_PER_TASK]) for start in range(0, len(pictures), _PAIRS_PER_TASK)]
    found = dict(map_parallel(lambda task: [digest(picture) for picture in task], tasks, workers))
    both = ((picture, one) for task in tasks for picture, one in zip(task, found[task], strict=True))
    return {picture: one for picture, one in both if one is not None}


def find_duplicates(
    features: Features, groups: PictureGroups, kind: DuplicateKind, min_similarity: float, is_out: np.ndarray
) -> list[Duplicate]:
    """Find the duplicates among the records, in their order.

    Args:
        is_out: records that an earlier selection leaves out already, [R] bool; they take no part.
    """
    usable = (features.rows["is_bad"] == 0) & ~is_out
    if kind is DuplicateKind.texts:
        return _find_similar_texts(features, np.flatnonzero(usable), min_similarity)
    return list(_find_same_records(features, groups, np.flatnonzero(usable), with_turns=kind is DuplicateKind.rows))


def _find_same_records(
    features: Features, groups: PictureGroups, records: np.ndarray, *, with_turns: bool
) -> Iterator[Duplicate]:
    texts, counts, firsts = features.rows["text"].tolist(), features.rows["num_images"].tolist(), features.first_images
    kept: dict[tuple[int, int, int], list[int]] = {}  # (text, number of pictures, first picture) -> records that stay
    for record in records.tolist():
        count, text = counts[record], texts[record] if with_turns else 0
        if count == 0 and not with_turns:
            continue
        first = int(firsts[record])
        same = groups.list_same(first) if count else [-1]
        best: Duplicate | None = None
        for picture in same:
            for other in kept.get((text, count, picture), ()):
                evidence = _compare_pictures(groups, count, first, int(firsts[other]))
                if evidence and (best is None or _ORDER.index(evidence) < _ORDER.index(best.evidence)):
                    best = Duplicate(record, other, evidence)
        if best:
            yield best
        else:
            kept.setdefault((text, count, same[0]), []).append(record)


def _compare_pictures(groups: PictureGroups, count: int, first: int, second: int) -> Evidence | None:
    """Compare the pictures of two records one by one. Returns the weakest evidence; None if a pair differs."""
    found = [groups.compare(first + number, second + number) for number in range(count)]
    if None in found:
        return None
    return max((one for one in found if one), key=_ORDER.index, default=Evidence.text)


def _find_similar_texts(features: Features, records: np.ndarray, min_similarity: float) -> list[Duplicate]:
    """Find records whose turns are nearly those of a record that stays; equal turns count first."""
    rows = features.rows
    _, first, inverse = np.unique(rows["text"][records], return_index=True, return_inverse=True)
    equal = {
        int(records[n]): int(records[first[group]]) for n, group in enumerate(inverse.ravel()) if first[group] != n
    }
    unique = records[np.sort(first)]
    unique = unique[rows["num_shingles"][unique] > 0]
    pairs = match_texts(rows["signature"][unique], rows["numbers"][unique], min_similarity)
    earlier = defaultdict[int, list[int]](list)
    for one, other in zip(unique[pairs.first].tolist(), unique[pairs.second].tolist(), strict=True):
        earlier[other].append(one)
    kept_for: dict[int, int] = {}
    for record in sorted(earlier):
        kept = next((one for one in sorted(earlier[record]) if one not in kept_for), None)
        if kept is not None:
            kept_for[record] = kept
    found = []
    for record in sorted({*equal, *kept_for}):
        if record in kept_for:
            kept, evidence = kept_for[record], Evidence.similar_text
        else:
            kept, evidence = kept_for.get(equal[record], equal[record]), Evidence.text
        signatures = rows["signature"][[record]], rows["signature"][[kept]]
        found.append(Duplicate(record, kept, evidence, float(estimate_similarities(*signatures)[0])))
    return found


def list_shared_pictures(features: Features, groups: PictureGroups, left_out: Sequence[int]) -> list[list[int]]:
    """List the groups of records that stay and share a picture; their turns differ, so none of them is a duplicate record.

    A group is named by the first of its pictures; a record with several pictures may be in several groups.
    """
    out = set(left_out)
    records = defaultdict[int, list[int]](list)
    for record in np.flatnonzero(features.rows["num_images"] > 0).tolist():
        if record in out:
            continue
        for picture in range(
            int(features.first_images[record]),
            int(features.first_images[record]) + int(features.rows["num_images"][record]),
        ):
            same = groups.list_same(picture)
            key = next((one for one in same if one in records), same[0])
            if not records[key] or records[key][-1] != record:
                records[key].append(record)
    return [group for group in records.values() if len(group) > 1]


def search_duplicates(
    mixture: CuratedMixture, settings: CurateConfig, embeddings: np.ndarray | None = None, *, workers: int
) -> CurationResult:
    """Search for duplicates within and across the sources. `embeddings` as of `group_pictures`."""
    features = mixture.features
    options: dict[str, Any] = {"embeddings": embeddings, "min_cosine": settings.min_cosine or 1.0, "workers": workers}
    groups = group_pictures(mixture.sources, features, settings.pictures, **options)
    found = find_duplicates(features, groups, settings.duplicates, settings.min_similarity, mixture.is_out)
    left_out = [one.record for one in found]
    shared: list[list[int]] = []
    if settings.duplicates is DuplicateKind.rows:
        shared = list_shared_pictures(features, groups, [*left_out, *np.flatnonzero(mixture.is_out).tolist()])
    by_evidence = Counter(one.evidence for one in found)
    counts = [(f"duplicates by {evidence.replace('_', ' ')}", count) for evidence, count in by_evidence.most_common()]
    counts.append(("records that share a picture and stay", sum(map(len, shared))))
    lines = [
        {**mixture.describe(one.record), "evidence": one.evidence.value, "similarity": one.similarity}
        | {"same_as": mixture.describe(one.kept)}
        for one in found
    ]
    examples = [
        Example(
            f"{one.evidence.replace('_', ' ')}, similarity of the turns {one.similarity:.2f}",
            (mixture.show("left out", one.record), mixture.show("stays", one.kept)),
        )
        for one in choose_examples(found, [one.evidence for one in found], settings.num_shown)
    ]
    kept = [
        Example("the same picture, other turns", tuple(mixture.show("stays", record) for record in group[:2]))
        for group in choose_examples(shared, [""] * len(shared), settings.num_shown)
    ]
    notes = []
    if groups.num_full_buckets and groups.evidence is Evidence.embedding:
        notes.append(
            f"{format_count(groups.num_full_buckets, 'picture')} had more than 64 near ones, and met the 64 nearest of them."
        )
    elif groups.num_full_buckets:
        notes.append(
            f"{format_count(groups.num_full_buckets, 'bucket')} of similar hashes held more than 64 pictures, such as blank pages; "
            "in these each picture was compared with the 64 of the nearest brightness."
        )
    return CurationResult(left_out, lines, counts, examples, kept, shared, notes)
