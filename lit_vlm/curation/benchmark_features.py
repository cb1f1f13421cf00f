"""Pictures and questions of benchmarks, from local files in their published layout, as the search for contamination needs them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lit_vlm.curation.features import IMAGE, PictureHasher
from lit_vlm.curation.text_hashes import hash_shingles, iterate_shingles
from lit_vlm.data.index.build import map_parallel
from lit_vlm.data.lazy_images import BytesImage
from lit_vlm.evaluation.benchmark_files import BenchmarkRows, open_rows
from lit_vlm.evaluation.benchmarks import BENCHMARKS, ColumnKind
from lit_vlm.types import RecordError, UserError

CHARACTER_GRAM, WORD_RUN = 5, 3
MIN_GRAMS = 12  # of a question that is looked for: 16 characters of Hangul, or 14 words
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

    def load_picture(self, number: int) -> Image.Image:
        """Load a picture by its number. Raises RecordError if its row cannot be read."""
        place = self.image_places[number]
        first = number
        while first and self.image_places[first - 1] == place:
            first -= 1
        return self.list_images(place)[number - first].load()

    def list_images(self, place: BenchmarkPlace) -> list[BytesImage]:
        """List the images of a row. Raises RecordError if it cannot be read."""
        rows = self.rows[place.benchmark]
        return list_row_images(rows.read(place.row), place.benchmark, rows.max_pixels)


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
    columns, hasher, num_bad = BENCHMARKS[name].columns, PictureHasher(), 0
    images, places, texts = list[int](), list[int](), list[tuple[int, np.ndarray]]()
    for number in range(start, min(start + _ROWS_PER_TASK, len(rows[name]))):
        try:
            row = rows[name].read(number)
            found = [hasher.add(image) for image in list_row_images(row, name, max_pixels)]
        except RecordError:
            num_bad += 1
            continue
        images += found
        places += [number] * len(found)
        for column in _TEXT_COLUMNS:
            if column in columns:
                lines = row[column] if isinstance(row[column], list) else [row[column]]
                both = dict.fromkeys(text for line in lines for text in (str(line), cut_options(str(line))))
                texts += [(number, hash_grams(text)) for text in both]
    return hasher.get_hashes()[images], places, texts, num_bad


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
