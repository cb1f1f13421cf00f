"""Contamination: records of a mixture that have the picture or the question of a benchmark.

Pictures are compared as in `duplicates`, and those that show the same also by their details; on request by the features of a
tower as well. A question is found, with or without its options, by the share of its n-grams that a record contains: five characters
of Hangul without its spaces, three words of other scripts. Short questions, and those that several rows of the benchmark share
("What is in this picture?"), say nothing and are not looked for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lit_vlm.config.choices import Certainty
from lit_vlm.config.curation import CurateConfig
from lit_vlm.curation.benchmark_features import BenchmarkFeatures, BenchmarkPlace, hash_grams, list_row_images
from lit_vlm.curation.duplicates import (
    Evidence,
    PictureLoader,
    confirm_details,
    confirm_views,
    digest_pixels,
    find_first,
)
from lit_vlm.curation.embeddings import (
    BLOCK_RECORDS,
    EmbeddingStore,
    NearPairs,
    PictureEncoder,
    embed_pictures,
    join_embeddings,
    match_other_embeddings,
)
from lit_vlm.curation.features import IMAGE_FIELDS, Features, OnProgress
from lit_vlm.curation.matching import match_pictures
from lit_vlm.curation.mixture import CuratedMixture, CurationResult, Example, ExampleRecord, choose_examples
from lit_vlm.curation.text_hashes import list_messages
from lit_vlm.data.index.build import map_parallel
from lit_vlm.data.index.shard_cache import ShardRange, list_shard_ranges
from lit_vlm.data.lazy_images import BytesImage
from lit_vlm.formatting import format_count
from lit_vlm.types import RecordError, Source

SURE_GRAMS = 40  # of a question that is taken for a leak without its picture


class TextMatch(NamedTuple):
    """Question that a record contains: the number of its n-grams, and the share of them."""

    num_grams: int
    overlap: float


NO_TEXT = TextMatch(0, 0.0)


class PictureEvidence(NamedTuple):
    """How two pictures match; the cosine of their features, if these are what is near."""

    kind: Evidence
    cosine: float | None = None


@dataclass(frozen=True, slots=True)
class Leak:
    """Record that has the picture or the question of a benchmark's row.

    Attributes:
        record: number of the record.
        picture: how the pictures match; None: only the question was found.
        overlap: share of the question's n-grams that the record contains; 0 if it was not found.
    """

    record: int
    place: BenchmarkPlace
    picture: PictureEvidence | None
    overlap: float
    certainty: Certainty

    @property
    def rank(self) -> tuple[int, float, float]:
        """Rank among the leaks of a record: the surest first, then by question and picture."""
        cosine = self.picture.cosine if self.picture else None
        return tuple(Certainty).index(self.certainty), -self.overlap, -(cosine or 0.0)


def find_leaks(
    sources: Sequence[Source],
    features: Features,
    benchmarks: BenchmarkFeatures,
    index_dir: Path,
    *,
    min_overlap: float,
    workers: int,
    near: NearPairs | None = None,
    on_progress: OnProgress | None = None,
) -> list[Leak]:
    """Find the records that have a picture or a question of a benchmark: the surest leak of each, in the order of the records.

    Args:
        near: of `find_near_pictures`.
    """
    pictures = _match_benchmark_pictures(sources, features, benchmarks, near, workers)
    texts = _find_questions(sources, benchmarks, index_dir, min_overlap, workers, on_progress)
    starts = _find_source_starts(features, len(sources))
    best: dict[int, Leak] = {}
    for record, evidence, place in pictures:
        key = int(features.source_ids[record]), int(features.positions[record])
        overlap = texts.get(key, {}).get(place, NO_TEXT).overlap
        _keep_best(best, Leak(record, place, evidence, overlap, judge_picture(evidence.kind, overlap)))
    for (source_id, position), places in texts.items():
        for place, match in places.items():
            certainty = Certainty.likely if match.num_grams >= SURE_GRAMS else Certainty.possible
            _keep_best(best, Leak(starts[source_id] + position, place, None, match.overlap, certainty))
    return [best[record] for record in sorted(best)]


def _find_source_starts(features: Features, num_sources: int) -> list[int]:
    return np.searchsorted(features.source_ids, np.arange(num_sources)).tolist()


def judge_picture(evidence: Evidence, overlap: float) -> Certainty:
    """Judge how sure a match of pictures is. Near features alone are no more than possible: a tower sees things, not pictures."""
    if evidence is Evidence.embedding:
        return Certainty.likely if overlap else Certainty.possible
    return Certainty.likely if evidence is Evidence.view else Certainty.certain


def _keep_best(best: dict[int, Leak], leak: Leak) -> None:
    known = best.get(leak.record)
    if known is None or leak.rank < known.rank:
        best[leak.record] = leak


def find_near_pictures(
    sources: Sequence[Source],
    features: Features,
    benchmarks: BenchmarkFeatures,
    encoder: PictureEncoder,
    index_dir: Path,
    min_cosine: float,
    *,
    batch_size: int,
    workers: int,
    on_progress: OnProgress | None = None,
) -> NearPairs:
    """Find the pictures of records, and those of benchmarks, whose features are near. Arguments as of `embed_pictures`."""
    options: dict[str, Any] = {"batch_size": batch_size, "workers": workers, "on_progress": on_progress}
    own = embed_pictures(sources, features, encoder, index_dir, **options)
    parts, contents = list[np.ndarray](), benchmarks.images["content"]
    with ThreadPoolExecutor(workers) as pool:
        store = EmbeddingStore(encoder, index_dir, batch_size, pool)
        for start in range(0, len(contents), BLOCK_RECORDS):
            places = benchmarks.image_places[start : start + BLOCK_RECORDS]
            parts.append(
                store.embed(contents[start : start + BLOCK_RECORDS], partial(_list_images, benchmarks, places))
            )
    return match_other_embeddings(own, join_embeddings(parts), min_cosine)


def _list_images(benchmarks: BenchmarkFeatures, places: Sequence[BenchmarkPlace]) -> list[BytesImage]:
    """List the images of rows that follow each other, one for each time that its row is named."""
    return [image for place, same in groupby(places) for image in benchmarks.list_images(place)[: len(list(same))]]


def _match_benchmark_pictures(
    sources: Sequence[Source], features: Features, benchmarks: BenchmarkFeatures, near: NearPairs | None, workers: int
) -> list[tuple[int, PictureEvidence, BenchmarkPlace]]:
    """Match the pictures of the records with those of benchmarks: (record, evidence, row of the benchmark)."""
    num_images = len(features.images["views"])
    owners = np.repeat(np.arange(len(features.rows)), features.rows["num_images"])
    joined = {name: np.concatenate([features.images[name], benchmarks.images[name]]) for name in IMAGE_FIELDS}
    same_bytes, same_reduction = (
        _match_digests(features.images[name], benchmarks.images[name]) for name in ("content", "reduction")
    )
    found = dict.fromkeys(same_bytes, PictureEvidence(Evidence.bytes))
    firsts = find_first(features.images["content"]).tolist()
    load = PictureLoader(sources, features).load
    pairs = [pair for pair in same_reduction if pair not in found]
    own = digest_pixels(sorted({firsts[picture] for picture, _ in pairs}), load, workers)
    others = digest_pixels(sorted({other for _, other in pairs}), benchmarks.load_picture, workers)
    for picture, other in pairs:
        if other in others and own.get(firsts[picture]) == others[other]:
            found[picture, other] = PictureEvidence(Evidence.pixels)
    matches = match_pictures(joined["views"], joined["brightness"], np.arange(num_images, len(joined["views"])))
    crosses = (matches.first < num_images) & (matches.second >= num_images)
    both = replace(features, images=joined, thumbnails=[*features.thumbnails, benchmarks.images["thumbnail"]])
    first, second = confirm_views(both, matches.first[crosses], matches.second[crosses])
    pairs = list(zip(first.tolist(), (second - num_images).tolist(), strict=True))
    # Those of several records with one picture are compared once
    asked = list(dict.fromkeys((firsts[picture], other) for picture, other in pairs if (picture, other) not in found))
    same = set(confirm_details(asked, load, benchmarks.load_picture, workers))
    for picture, other in pairs:
        if (firsts[picture], other) in same:
            found.setdefault((picture, other), PictureEvidence(Evidence.view))
    for picture, other, cosine in zip(*near, strict=True) if near else ():
        found.setdefault((int(picture), int(other)), PictureEvidence(Evidence.embedding, float(cosine)))
    return [
        (int(owners[picture]), evidence, benchmarks.image_places[other]) for (picture, other), evidence in found.items()
    ]


def _match_digests(pictures: np.ndarray, others: np.ndarray) -> list[tuple[int, int]]:
    """Match equal digests, [N, 2] and [M, 2] uint64: pairs of numbers."""
    by_digest: dict[tuple[int, int], list[int]] = {}
    for number, digest in enumerate(map(tuple, others.tolist())):
        by_digest.setdefault(digest, []).append(number)
    wanted = np.flatnonzero(np.isin(pictures[:, 0], others[:, 0]))
    return [(int(number), other) for number in wanted for other in by_digest.get(tuple(pictures[number].tolist()), ())]


def _find_questions(
    sources: Sequence[Source],
    benchmarks: BenchmarkFeatures,
    index_dir: Path,
    min_overlap: float,
    workers: int,
    on_progress: OnProgress | None,
) -> dict[tuple[int, int], dict[BenchmarkPlace, TextMatch]]:
    """Find the questions that records contain: (source, position) -> row of a benchmark -> its longest question there."""
    result: dict[tuple[int, int], dict[BenchmarkPlace, TextMatch]] = {}
    if not len(benchmarks.grams):
        return result
    function = partial(_search_shard, sources, benchmarks, min_overlap)
    for source_id, source in enumerate(sources):
        done = 0
        for shard, hits in map_parallel(function, list_shard_ranges(source_id, source, index_dir), workers):
            for position, question, overlap in hits:
                places = result.setdefault((source_id, position), {})
                place = benchmarks.text_places[question]
                match = TextMatch(int(benchmarks.num_grams[question]), overlap)
                places[place] = max(match, places.get(place, NO_TEXT))
            done += len(shard)
            if on_progress:
                on_progress(source.name, done, len(source))
    return result


def _search_shard(
    sources: Sequence[Source], benchmarks: BenchmarkFeatures, min_overlap: float, shard: ShardRange
) -> list[tuple[int, int, float]]:
    """Search the records of a shard for questions: (position, question, share of its n-grams)."""
    hits = []
    for position in range(shard.start, shard.stop):
        try:
            record = sources[shard.source_id][position]
        except RecordError:
            continue
        grams = hash_grams(" ".join(message.text for message in list_messages(record)))
        low = np.searchsorted(benchmarks.grams, grams, side="left")
        high = np.searchsorted(benchmarks.grams, grams, side="right")
        found = [benchmarks.gram_questions[one:other] for one, other in zip(low, high, strict=True) if other > one]
        if not found:
            continue
        questions, counts = np.unique(np.concatenate(found), return_counts=True)
        shares = counts / benchmarks.num_grams[questions]
        hits += [
            (position, int(question), float(share))
            for question, share in zip(questions, shares, strict=True)
            if share >= min_overlap
        ]
    return hits


def search_leaks(
    mixture: CuratedMixture,
    settings: CurateConfig,
    benchmarks: BenchmarkFeatures,
    index_dir: Path,
    *,
    max_pixels: int,
    workers: int,
    near: NearPairs | None = None,
    on_progress: OnProgress,
) -> CurationResult:
    """Search for the pictures and questions of benchmarks. Arguments as of `find_leaks`."""
    options: dict[str, Any] = {"min_overlap": settings.min_overlap, "workers": workers, "on_progress": on_progress}
    leaks = find_leaks(mixture.sources, mixture.features, benchmarks, index_dir, near=near, **options)
    leaks = [leak for leak in leaks if not mixture.is_out[leak.record]]
    limit = tuple(Certainty).index(settings.min_certainty)
    is_sure = [tuple(Certainty).index(leak.certainty) <= limit for leak in leaks]
    sure = [leak for leak, sure in zip(leaks, is_sure, strict=True) if sure]
    unsure = [leak for leak, sure in zip(leaks, is_sure, strict=True) if not sure]
    counts = [(f"{certainty.value}", sum(leak.certainty is certainty for leak in leaks)) for certainty in Certainty]
    by_benchmark = Counter(leak.place.benchmark for leak in leaks)
    counts += [
        (f"{name}: {format_count(len(benchmarks.rows[name]), 'row')}", by_benchmark[name]) for name in benchmarks.rows
    ]
    lines = [describe_leak(mixture, leak) | {"left_out": sure} for leak, sure in zip(leaks, is_sure, strict=True)]
    shown = [
        [
            Example(format_leak(leak), (mixture.show("record", leak.record), show_row(benchmarks, leak, max_pixels)))
            for leak in choose_examples(some, [leak.place.benchmark for leak in some], settings.num_shown)
        ]
        for some in (sure, unsure)
    ]
    notes = [f"{name} was not checked: {reason}" for name, reason in benchmarks.unchecked.items()]
    notes += [
        f"{name}: {format_count(count, 'row')} cannot be read and were not checked"
        for name, count in benchmarks.num_bad_rows.items()
    ]
    return CurationResult([leak.record for leak in sure], lines, counts, shown[0], shown[1], [], notes)


def describe_leak(mixture: CuratedMixture, leak: Leak) -> dict[str, Any]:
    """Describe a leak in the list."""
    return mixture.describe(leak.record) | {
        "certainty": leak.certainty.value,
        "picture": leak.picture.kind.value if leak.picture else None,
        "cosine": round(leak.picture.cosine, 4) if leak.picture and leak.picture.cosine is not None else None,
        "overlap": round(leak.overlap, 4),
        **asdict(leak.place),
    }


def format_leak(leak: Leak) -> str:
    """Format a leak for the page."""
    picture = "no picture"
    if leak.picture:
        kind, cosine = leak.picture
        picture = f"picture: same {kind.value}" if cosine is None else f"picture: near, cosine {cosine:.3f}"
    return f"{leak.certainty.value}; {picture}; {leak.overlap:.0%} of the question's n-grams; {leak.place.benchmark}"


def show_row(benchmarks: BenchmarkFeatures, leak: Leak, max_pixels: int) -> ExampleRecord:
    """Prepare a benchmark's row for the page."""
    name = leak.place.benchmark
    row = benchmarks.rows[name].read(leak.place.row)
    text = str(row.get("question") or row.get("captions") or "")
    return ExampleRecord(name, leak.place.origin, text, tuple(list_row_images(row, name, max_pixels)))
