"""Contamination: records of a mixture that have the picture or the question of a benchmark.

Pictures are compared as in `duplicates`, and those that show the same also by their details. A question is found, with or without
its options, by the share of its n-grams that a record contains: five characters of Hangul without its spaces, three words of other
scripts. Short questions, and those that several rows of the benchmark share ("What is in this picture?"), say nothing and are not
looked for.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from lit_vlm.config.choices import Certainty
from lit_vlm.config.curation import CurateConfig
from lit_vlm.curation.duplicates import Evidence, PictureLoader, confirm_details, confirm_views, find_first
from lit_vlm.curation.features import IMAGE, IMAGE_FIELDS, Features, OnProgress, fill_image
from lit_vlm.curation.matching import match_pictures
from lit_vlm.curation.mixture import CuratedMixture, CurationResult, Example, ExampleRecord, choose_examples
from lit_vlm.curation.picture_hashes import PictureHash
from lit_vlm.curation.text_hashes import hash_shingles, iterate_shingles, list_messages
from lit_vlm.data.index.build import map_parallel
from lit_vlm.data.index.shard_cache import ShardRange, list_shard_ranges
from lit_vlm.data.lazy_images import BytesImage
from lit_vlm.evaluation.benchmark_files import BenchmarkRows, open_rows
from lit_vlm.evaluation.benchmarks import BENCHMARKS, ColumnKind
from lit_vlm.formatting import format_count
from lit_vlm.types import RecordError, Source, UserError

CHARACTER_GRAM, WORD_RUN = 5, 3
MIN_GRAMS = 12  # of a question that is looked for: 16 characters of Hangul, or 14 words
SURE_GRAMS = 40  # of a question that is taken for a leak without its picture
MAX_SHARING_ROWS = 2  # rows of a benchmark that may share a question
_TEXT_COLUMNS = ("question", "captions")
_ROWS_PER_TASK = 256
_OPTIONS = re.compile(r"(?:\b(?i:options|choices)\b|옵션|선택지|보기)?\s*:?\s*\(?\bA\s*[:.)].*\bB\s*[:.)]", re.DOTALL)


@dataclass(frozen=True, slots=True)
class BenchmarkPlace:
    """Row of a benchmark: name, number in its files, and file and position."""

    benchmark: str
    row: int
    origin: str


class TextMatch(NamedTuple):
    """Question that a record contains: the number of its n-grams, and the share of them."""

    num_grams: int
    overlap: float


NO_TEXT = TextMatch(0, 0.0)


@dataclass(slots=True)
class BenchmarkFeatures:
    """Pictures and questions of benchmarks.

    Attributes:
        rows: opened rows, by name.
        images: [M] of IMAGE.
        image_places: row of each picture.
        grams: hashes of n-grams, ascending, and the number of the question of each.
        text_places: row of each question; num_grams: number of its n-grams.
        unchecked: name -> reason why a benchmark was not checked.
        num_bad_rows: name -> rows that cannot be read.
    """

    rows: dict[str, BenchmarkRows]
    images: np.ndarray
    image_places: list[BenchmarkPlace]
    grams: np.ndarray
    gram_questions: np.ndarray
    text_places: list[BenchmarkPlace]
    num_grams: np.ndarray
    unchecked: dict[str, str]
    num_bad_rows: dict[str, int]


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
    picture: Evidence | None
    overlap: float
    certainty: Certainty


def read_benchmarks(
    names: Sequence[str], files: Path, cache_dir: Path, *, max_pixels: int, workers: int
) -> BenchmarkFeatures:
    """Read the pictures and questions of benchmarks from local files. A benchmark that cannot be read is not checked, with the reason."""
    rows, unchecked = dict[str, BenchmarkRows](), dict[str, str]()
    for name in names:
        if not (files / name).is_dir():
            unchecked[name] = f"there is no folder {files / name}"
            continue
        try:
            opened, root = open_rows(name, BENCHMARKS[name], files, cache_dir)
            if not len(opened):
                raise UserError("the files have no rows")
            rows[name] = BenchmarkRows(name, BENCHMARKS[name], opened, root, max_pixels)
        except UserError as error:
            unchecked[name] = str(error)
    tasks = [(name, start) for name, one in rows.items() for start in range(0, len(one), _ROWS_PER_TASK)]
    read = dict(map_parallel(partial(_read_rows, rows, max_pixels), tasks, workers))
    images, image_places = [np.zeros(0, IMAGE)], list[BenchmarkPlace]()
    questions, text_places, bad = list[np.ndarray](), list[BenchmarkPlace](), Counter[str]()
    for name, start in tasks:
        found, places, texts, num_bad = read[name, start]
        images.append(found)
        image_places += [BenchmarkPlace(name, number, rows[name].get_origin(number)) for number in places]
        questions += [hashes for _, hashes in texts]
        text_places += [BenchmarkPlace(name, number, rows[name].get_origin(number)) for number, _ in texts]
        bad[name] += num_bad
    for name, one in rows.items():
        if bad[name] == len(one):
            unchecked[name] = "no row can be read"
    chosen = _choose_questions(questions, text_places)
    questions, text_places = [questions[number] for number in chosen], [text_places[number] for number in chosen]
    grams = np.concatenate([np.zeros(0, np.uint64), *questions])
    owners = np.repeat(np.arange(len(questions)), [len(one) for one in questions])
    order = np.argsort(grams, kind="stable")
    sizes = np.array([len(one) for one in questions], np.int64)
    joined = np.concatenate(images)
    return BenchmarkFeatures(
        {name: one for name, one in rows.items() if name not in unchecked},
        joined,
        image_places,
        grams[order],
        owners[order],
        text_places,
        sizes,
        unchecked,
        dict(+bad),
    )


def _read_rows(
    rows: dict[str, BenchmarkRows], max_pixels: int, task: tuple[str, int]
) -> tuple[np.ndarray, list[int], list[tuple[int, np.ndarray]], int]:
    """Read some rows: hashes of pictures, the row of each, n-grams of each question with its row, and unreadable rows."""
    name, start = task
    columns, hashed, num_bad = BENCHMARKS[name].columns, dict[bytes, PictureHash](), 0
    images, places, texts = list[np.ndarray](), list[int](), list[tuple[int, np.ndarray]]()
    for number in range(start, min(start + _ROWS_PER_TASK, len(rows[name]))):
        try:
            row = rows[name].read(number)
            found = np.zeros(len(pictures := list_row_images(row, name, max_pixels)), IMAGE)
            for values, image in zip(found, pictures, strict=True):
                fill_image(values, image, hashed)
        except RecordError:
            num_bad += 1
            continue
        images.append(found)
        places += [number] * len(found)
        for column in _TEXT_COLUMNS:
            if column in columns:
                lines = row[column] if isinstance(row[column], list) else [row[column]]
                both = dict.fromkeys(text for line in lines for text in (str(line), cut_options(str(line))))
                texts += [(number, hash_grams(text)) for text in both]
    return np.concatenate([np.zeros(0, IMAGE), *images]), places, texts, num_bad


def list_row_images(row: dict[str, Any], name: str, max_pixels: int) -> list[BytesImage]:
    """List the images of a benchmark's row."""
    images: list[BytesImage] = []
    for column, kind in BENCHMARKS[name].columns.items():
        if kind in (ColumnKind.image, ColumnKind.images):
            values = row[column] if isinstance(row[column], list) else [row[column]]
            images += [BytesImage(value["bytes"], name, max_pixels) for value in values]
    return images


def cut_options(question: str) -> str:
    """Cut the options "A. ..., B. ..." from the end of a question; who copies it may write them in another form, or not at all."""
    found = _OPTIONS.search(question)
    return question[: found.start()] if found else question


def hash_grams(text: str) -> np.ndarray:
    """Hash the n-grams of a question or of a record: [n] uint64, ascending."""
    return hash_shingles(iterate_shingles(text, CHARACTER_GRAM, (WORD_RUN,)))


def _choose_questions(questions: list[np.ndarray], places: list[BenchmarkPlace]) -> list[int]:
    """Choose the questions that identify a row: long enough, and of at most `MAX_SHARING_ROWS` rows; each text of a row once."""
    keys = [
        (place.benchmark, hashes.tobytes()) if len(hashes) >= MIN_GRAMS else None
        for hashes, place in zip(questions, places, strict=True)
    ]
    rows = Counter({key: len({places[n].row for n in numbers}) for key, numbers in _group(keys).items()})
    first = dict[tuple[tuple[str, bytes], int], int]()
    for number, key in enumerate(keys):
        if key is not None and rows[key] <= MAX_SHARING_ROWS:
            first.setdefault((key, places[number].row), number)
    return sorted(first.values())


def _group(keys: list[tuple[str, bytes] | None]) -> dict[tuple[str, bytes], list[int]]:
    groups: dict[tuple[str, bytes], list[int]] = {}
    for number, key in enumerate(keys):
        if key is not None:
            groups.setdefault(key, []).append(number)
    return groups


def find_leaks(
    sources: Sequence[Source],
    features: Features,
    benchmarks: BenchmarkFeatures,
    index_dir: Path,
    *,
    min_overlap: float,
    workers: int,
    on_progress: OnProgress | None = None,
) -> list[Leak]:
    """Find the records that have a picture or a question of a benchmark: the surest leak of each, in the order of the records."""
    pictures = _match_benchmark_pictures(sources, features, benchmarks, workers)
    texts = _find_questions(sources, benchmarks, index_dir, min_overlap, workers, on_progress)
    starts = _find_source_starts(features, len(sources))
    best: dict[int, Leak] = {}
    for record, evidence, place in pictures:
        key = int(features.source_ids[record]), int(features.positions[record])
        overlap = texts.get(key, {}).get(place, NO_TEXT).overlap
        certainty = Certainty.likely if evidence is Evidence.view else Certainty.certain
        _keep_best(best, Leak(record, place, evidence, overlap, certainty))
    for (source_id, position), places in texts.items():
        for place, match in places.items():
            certainty = Certainty.likely if match.num_grams >= SURE_GRAMS else Certainty.possible
            _keep_best(best, Leak(starts[source_id] + position, place, None, match.overlap, certainty))
    return [best[record] for record in sorted(best)]


def _find_source_starts(features: Features, num_sources: int) -> list[int]:
    return np.searchsorted(features.source_ids, np.arange(num_sources)).tolist()


def _keep_best(best: dict[int, Leak], leak: Leak) -> None:
    known = best.get(leak.record)
    order = tuple(Certainty).index
    if known is None or (order(leak.certainty), -leak.overlap) < (order(known.certainty), -known.overlap):
        best[leak.record] = leak


def _match_benchmark_pictures(
    sources: Sequence[Source], features: Features, benchmarks: BenchmarkFeatures, workers: int
) -> list[tuple[int, Evidence, BenchmarkPlace]]:
    """Match the pictures of the records with those of benchmarks: (record, evidence, row of the benchmark)."""
    num_images = len(features.images["views"])
    owners = np.repeat(np.arange(len(features.rows)), features.rows["num_images"])
    joined = {name: np.concatenate([features.images[name], benchmarks.images[name]]) for name in IMAGE_FIELDS}
    found: dict[tuple[int, int], Evidence] = {}
    for name, evidence in (("content", Evidence.bytes), ("pixels", Evidence.pixels)):
        for picture, other in _match_digests(joined[name][:num_images], joined[name][num_images:]):
            found.setdefault((picture, other), evidence)
    pairs = match_pictures(joined["views"], joined["brightness"], np.arange(num_images, len(joined["views"])))
    crosses = (pairs.first < num_images) & (pairs.second >= num_images)
    both = Features(
        features.source_ids,
        features.positions,
        features.rows,
        features.first_images,
        joined,
        [*features.thumbnails, benchmarks.images["thumbnail"]],
        [],
    )
    first, second = confirm_views(both, pairs.first[crosses], pairs.second[crosses])
    views = list(zip(first.tolist(), (second - num_images).tolist(), strict=True))
    for pair in _confirm_details(sources, features, benchmarks, [pair for pair in views if pair not in found], workers):
        found[pair] = Evidence.view
    return [
        (int(owners[picture]), evidence, benchmarks.image_places[other]) for (picture, other), evidence in found.items()
    ]


def _confirm_details(
    sources: Sequence[Source],
    features: Features,
    benchmarks: BenchmarkFeatures,
    pairs: list[tuple[int, int]],
    workers: int,
) -> list[tuple[int, int]]:
    """Confirm pairs of (picture, picture of a benchmark) by their details; those of several records with one picture once."""
    starts: dict[BenchmarkPlace, int] = {}
    for number, place in enumerate(benchmarks.image_places):
        starts.setdefault(place, number)

    def load_other(number: int) -> Image.Image:
        place = benchmarks.image_places[number]
        rows = benchmarks.rows[place.benchmark]
        return list_row_images(rows.read(place.row), place.benchmark, rows.max_pixels)[number - starts[place]].load()

    firsts = find_first(features.images["content"]).tolist()
    asked = list(dict.fromkeys((firsts[picture], other) for picture, other in pairs))
    same = set(confirm_details(asked, PictureLoader(sources, features).load, load_other, workers))
    return [(picture, other) for picture, other in pairs if (firsts[picture], other) in same]


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
    on_progress: OnProgress,
) -> CurationResult:
    """Search for the pictures and questions of benchmarks."""
    options: dict[str, Any] = {"min_overlap": settings.min_overlap, "workers": workers, "on_progress": on_progress}
    leaks = find_leaks(mixture.sources, mixture.features, benchmarks, index_dir, **options)
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
        "picture": leak.picture.value if leak.picture else None,
        "overlap": round(leak.overlap, 4),
        **asdict(leak.place),
    }


def format_leak(leak: Leak) -> str:
    """Format a leak for the page."""
    picture = f"picture: same {leak.picture.value}" if leak.picture else "no picture"
    return f"{leak.certainty.value}; {picture}; {leak.overlap:.0%} of the question's n-grams; {leak.place.benchmark}"


def show_row(benchmarks: BenchmarkFeatures, leak: Leak, max_pixels: int) -> ExampleRecord:
    """Prepare a benchmark's row for the page."""
    name = leak.place.benchmark
    row = benchmarks.rows[name].read(leak.place.row)
    text = str(row.get("question") or row.get("captions") or "")
    return ExampleRecord(name, leak.place.origin, text, tuple(list_row_images(row, name, max_pixels)))
