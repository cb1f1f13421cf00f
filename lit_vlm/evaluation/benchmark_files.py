"""Rows of a benchmark: found in local files or on the hub, checked one by one, and written for the harness.

Everything that can be wrong with the data is found here, before a model is loaded.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_vlm.data.lazy_images import BytesImage, FileImage, format_untrusted
from lit_vlm.data.readers.record_files import ROW_OPENERS
from lit_vlm.data.readers.rows import JoinedRows, Rows, arrow_files
from lit_vlm.evaluation.benchmarks import CIRCULAR_STEP, Benchmark, ColumnKind
from lit_vlm.files import handle_write_errors, replace_file
from lit_vlm.formatting import format_count
from lit_vlm.types import RecordError, UserError, find_nearest, format_suggestion

SUFFIXES = (".parquet", ".tsv", ".csv", ".jsonl")
MAX_SHOWN = 5  # bad rows that a message lists
MAX_REFERENCE_CHARACTERS = 16  # an image column with so few characters holds the index of the row that has the image
_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".avif")
# Folders below a benchmark's own that image paths may start from: K-Viscuit's repository has `0.jpg` in dataset/images
_IMAGE_FOLDERS = ("", "images", "dataset/images")
_IMAGE_KINDS = (ColumnKind.image, ColumnKind.images)
_BATCH_ROWS = 64
_OPTION = re.compile(r"\bA\s*[:.)]")

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class BadRow:
    """Row that cannot be used: its number in the files, its place and the reason."""

    number: int
    origin: str
    reason: str


@dataclass(frozen=True, slots=True)
class PreparedRows:
    """Rows that were written for the harness.

    Attributes:
        path: the parquet file.
        numbers: number of each written row in the benchmark's files.
        groups: questions, each with the positions of its rows; more than one row where options are rotated.
        num_available: usable and unusable rows of the files, without the limit.
        bad_rows: rows that were left out.
        digest: SHA-256 of the written rows.
    """

    path: Path
    numbers: list[int]
    groups: list[list[int]]
    num_available: int
    bad_rows: list[BadRow]
    digest: str


def open_rows(name: str, benchmark: Benchmark, files: Path | None, cache_dir: Path) -> tuple[Rows, Path | None]:
    """Open the rows of a benchmark.

    Args:
        files: folder that contains a folder `name`; None: the Hugging Face hub, or its local cache.
        cache_dir: folder for the offsets of rows in text files.

    Returns:
        The rows, and the folder that image paths start from.

    Raises:
        UserError: there is no file, with the way to get it and its licence.
    """
    if files is None:
        return _load_from_hub(name, benchmark), None
    folder = files / name
    paths = find_files(folder, benchmark.split)
    if not paths:
        nearest = None
        if files.is_dir() and not folder.exists():
            nearest = find_nearest(name, (child.name for child in files.iterdir() if child.is_dir()))
        command = f": `hf download {benchmark.hub} --repo-type dataset --local-dir {folder}`" if benchmark.hub else ""
        raise UserError(
            f"{name}: no file ending in {', '.join(SUFFIXES)} in {folder}.{format_suggestion(nearest)} Get it from"
            f" {benchmark.how_to_get}{command}."
        )
    parts = [
        arrow_files.open_parquet([path])
        if path.suffix.lower() == ".parquet"
        else ROW_OPENERS[path.suffix.lower()](path, cache_dir)
        for path in paths
    ]
    return (parts[0] if len(parts) == 1 else JoinedRows(parts)), folder


def _load_from_hub(name: str, benchmark: Benchmark) -> Rows:
    if benchmark.hub is None:
        raise UserError(
            f"{name}: is not on the hub. Get it from {benchmark.how_to_get}, put it into <folder>/{name}, and set"
            " evaluate.files=<folder>."
        )
    try:
        return arrow_files.load_hub_dataset(name, benchmark.hub, benchmark.hub_config, benchmark.split, None)
    except UserError as error:
        reason = str(error.__cause__ or error).strip().partition("\n")[0]
        command = f"hf download {benchmark.hub} --repo-type dataset --local-dir <folder>/{name}"
        raise UserError(
            f"{name}: cannot be loaded from the hub: {reason}. Its files are at {benchmark.how_to_get}. Without a network,"
            f" download them beforehand (`{command}`) and set evaluate.files=<folder>."
        ) from error


def find_files(folder: Path, split: str) -> list[Path]:
    """Find the files of a split below a folder, sorted: those whose names begin with it, or all if none does."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    paths = [path for path in paths if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    return [path for path in paths if path.name.startswith(split)] or paths


def prepare_rows(
    name: str,
    benchmark: Benchmark,
    rows: Rows,
    image_root: Path | None,
    output: Path,
    *,
    max_pixels: int,
    limit: int | None = None,
    excluded: frozenset[int] = frozenset(),
) -> PreparedRows:
    """Check all rows up to the limit and write those that can be used.

    Args:
        limit: number of questions; a question with rotated options counts once.
        excluded: numbers of rows to leave out, with the other rows of their questions.

    Raises:
        UserError: a column is missing, or no row can be used.
    """
    if len(rows) == 0:
        raise UserError(f"{name}: the files have no rows. Get them from {benchmark.how_to_get}.")
    reader = _RowReader(name, benchmark, rows, image_root, max_pixels)
    chosen = reader.choose_rows(limit)
    bad_rows = reader.find_bad_rows(chosen)
    left_out = excluded | {row.number for row in bad_rows}
    groups = [group for group in chosen if not left_out & set(group)]
    if not groups:
        shown = "; ".join(f"{row.origin}: {row.reason}" for row in bad_rows[:MAX_SHOWN])
        raise UserError(f"{name}: no row can be used. {shown}")
    numbers = sorted(number for group in groups for number in group)
    positions = {number: position for position, number in enumerate(numbers)}
    digest = reader.write(numbers, output)
    found_groups = [[positions[number] for number in group] for group in groups]
    return PreparedRows(output, numbers, found_groups, reader.num_rows, bad_rows, digest)


def format_bad_rows(name: str, bad_rows: Sequence[BadRow]) -> str:
    """Format the message about rows that cannot be used."""
    shown = "\n".join(f"  {row.origin}: {row.reason}" for row in bad_rows[:MAX_SHOWN])
    more = f"\n  and {len(bad_rows) - MAX_SHOWN} more" if len(bad_rows) > MAX_SHOWN else ""
    return (
        f"{name}: {format_count(len(bad_rows), 'row')} cannot be used:\n{shown}{more}\nGet the files again, or score without"
        " these rows with evaluate.leave_out=true; they are counted beside the score."
    )


class BenchmarkRows:
    """Rows of a benchmark by number, in the form that its task reads.

    Args:
        max_pixels: of an image that is decoded.

    Raises:
        UserError: a column is missing.
    """

    def __init__(self, name: str, benchmark: Benchmark, rows: Rows, image_root: Path | None, max_pixels: int) -> None:
        self.max_pixels = max_pixels
        self._rows, self._reader = rows, _RowReader(name, benchmark, rows, image_root, max_pixels)

    def __len__(self) -> int:
        return len(self._rows)

    def get_origin(self, number: int) -> str:
        """Return the file and position of a row."""
        return self._rows.get_origin(number)

    def read(self, number: int) -> Row:
        """Read a row: column -> value; an image is {bytes, path}.

        Raises:
            RecordError: the row cannot be used.
        """
        try:
            return self._reader.convert(number)
        except _BadValueError as error:
            raise RecordError(self.get_origin(number), str(error)) from error


class _RowReader:
    """Reader of a benchmark's rows in the form that its task reads."""

    def __init__(self, name: str, benchmark: Benchmark, rows: Rows, image_root: Path | None, max_pixels: int) -> None:
        self.benchmark, self.rows, self.image_root, self.max_pixels = benchmark, rows, image_root, max_pixels
        self.names = _match_columns(name, benchmark, rows)
        self.num_rows = 0
        self._by_index: dict[str, int] | None = None

    def choose_rows(self, limit: int | None) -> list[list[int]]:
        """Choose the rows of the first questions. Returns the numbers of each question's rows; counts the rows of the set."""
        if self.benchmark.only_rows is None and not self.benchmark.is_circular:  # no row has to be read
            self.num_rows = len(self.rows)
            return [[number] for number in range(self.num_rows)[:limit]]
        groups: dict[Any, list[int]] = {}
        for number in range(len(self.rows)):
            row = self._read(number)
            if self.benchmark.only_rows is not None and row is not None:
                column, value = self.benchmark.only_rows
                if str(row.get(self.names[column])) != value:
                    continue
            self.num_rows += 1
            groups.setdefault(self._get_question(number, row), []).append(number)
        return list(groups.values())[:limit]

    def _get_question(self, number: int, row: Mapping[str, Any] | None) -> Any:
        if not self.benchmark.is_circular or row is None:
            return ("row", number)
        try:
            return int(row[self.names["index"]]) % CIRCULAR_STEP
        except (TypeError, ValueError, KeyError):
            return ("row", number)

    def _read(self, number: int) -> Mapping[str, Any] | None:
        try:
            return self.rows[number]
        except RecordError:
            return None  # find_bad_rows reads it again, and keeps the error

    def find_bad_rows(self, groups: Sequence[Sequence[int]]) -> list[BadRow]:
        """Find rows that cannot be used; each image is decoded."""
        found = []
        for number in sorted(number for group in groups for number in group):
            try:
                row = self.convert(number)
                for name, kind in self.benchmark.columns.items():
                    if kind in _IMAGE_KINDS:
                        images = row[name] if kind is ColumnKind.images else [row[name]]
                        for image in images:
                            BytesImage(image["bytes"], "", self.max_pixels).load()
            except RecordError as error:
                found.append(BadRow(number, self.rows.get_origin(number), error.reason))
            except _BadValueError as error:
                found.append(BadRow(number, self.rows.get_origin(number), str(error)))
        return found

    def convert(self, number: int) -> Row:
        """Convert a row: its columns by the task's names, values of the right types, images as encoded bytes."""
        row = self.rows[number]
        converted: Row = {}
        for name, kind in self.benchmark.columns.items():
            value = row.get(self.names[name])
            converted[name] = self._convert_value(name, kind, value)
        answers, answer = self.benchmark.answers, converted.get("answer")
        if answers is not None and not {str(answer).strip(), str(answer).strip().lower()} & answers:
            raise _BadValueError(
                f"answer is {format_untrusted(answer)}, and one of {', '.join(sorted(answers))} is needed"
            )
        return converted | dict(self.benchmark.constants)

    def _convert_value(self, name: str, kind: ColumnKind, value: Any) -> Any:
        if kind in _IMAGE_KINDS:
            values = value if isinstance(value, list) else [value]
            images = [self._read_image(name, one) for one in values]
            if kind is ColumnKind.image and len(images) != 1:
                raise _BadValueError(f"{name} holds {format_count(len(images), 'image')}, and one is needed")
            return images if kind is ColumnKind.images else images[0]
        if kind is ColumnKind.optional_text:
            return None if value is None else str(value)
        if value is None or (isinstance(value, str) and not value.strip()):
            raise _BadValueError(f"{name} is empty")
        if kind is ColumnKind.integer:
            try:
                return int(value)
            except (TypeError, ValueError):
                raise _BadValueError(f"{name} is {format_untrusted(value)}, and a whole number is needed") from None
        if kind is ColumnKind.texts:
            return [str(one) for one in value] if isinstance(value, list) else [str(value)]
        if isinstance(value, list):
            return "\n".join(map(str, value))
        return str(value)

    def _read_image(self, name: str, value: Any) -> dict[str, Any]:
        """Read the encoded bytes of an image: bytes, {bytes, path}, base64, a path, or the index of another row."""
        if isinstance(value, Mapping):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes):
            return {"bytes": value, "path": None}
        if not isinstance(value, str) or not value.strip():
            raise _BadValueError(f"{name} is empty")
        if value.lower().endswith(_IMAGE_SUFFIXES) and self.image_root is not None:
            roots = [self.image_root / folder for folder in _IMAGE_FOLDERS]
            root = next((root for root in roots if (root / value).is_file()), self.image_root)
            return {"bytes": FileImage(value, root, "", self.max_pixels).read_encoded()[0], "path": None}
        if len(value) <= MAX_REFERENCE_CHARACTERS and (other := self._find_row(value)) is not None:
            return self._read_image(name, self.rows[other][self.names[name]])
        payload = value.partition(",")[2] if value.startswith("data:") else value
        try:
            return {"bytes": base64.b64decode(payload, validate=True), "path": None}
        except (binascii.Error, ValueError) as error:
            raise _BadValueError(f"{name} is no base64: {error}") from None

    def _find_row(self, index: str) -> int | None:
        """Find the row with an index whose image column does not refer to another row."""
        if self._by_index is None:
            self._by_index = {}
            column, image = self.names.get("index"), self.names["image"]
            for number in range(len(self.rows)):
                row = self._read(number)
                if column is not None and row is not None and len(str(row.get(image) or "")) > MAX_REFERENCE_CHARACTERS:
                    self._by_index[str(row.get(column))] = number
        return self._by_index.get(index)

    def write(self, numbers: Sequence[int], output: Path) -> str:
        """Write rows as parquet in the layout of `datasets`. Returns the digest of their values."""
        import datasets
        import pyarrow as pa
        import pyarrow.parquet as pq

        schema = datasets.Features(_make_features(self.benchmark)).arrow_schema
        hasher = hashlib.sha256()
        output.parent.mkdir(parents=True, exist_ok=True)
        with (
            handle_write_errors(output.parent, "The benchmark's rows", "run_dir"),
            replace_file(output, durable=False) as temporary,
            pq.ParquetWriter(temporary, schema) as writer,
        ):
            for batch in _split_into_batches(numbers):
                rows = [self.convert(number) for number in batch]
                for row in rows:
                    hasher.update(json.dumps(row, sort_keys=True, default=_digest_bytes).encode())
                writer.write_table(pa.Table.from_pylist(rows, schema=schema))
        return hasher.hexdigest()


class _BadValueError(ValueError):
    """Error of one value of a row."""


def _match_columns(name: str, benchmark: Benchmark, rows: Rows) -> dict[str, str]:
    """Match the columns of a task with those of the files.

    Raises:
        UserError: lists the missing columns and the ones that are there.
    """
    first = next((row for number in range(min(len(rows), 20)) if (row := _read_or_none(rows, number)) is not None), {})
    found, missing = {}, []
    for column in benchmark.columns:
        names = [column, benchmark.other_names.get(column, column)]
        if (match := next((one for one in names if one in first), None)) is not None:
            found[column] = match
        elif benchmark.columns[column] is ColumnKind.optional_text:
            found[column] = column
        else:
            missing.append(column)
    if missing:
        raise UserError(
            f"{name}: {rows.get_origin(0)}: lacks {format_count(len(missing), 'column')}, {', '.join(missing)}. It has"
            f" {format_untrusted(', '.join(map(str, first)), 300)}. Get the files from {benchmark.how_to_get}."
        )
    if benchmark.has_inline_options and "A" in first and not _OPTION.search(str(first.get("question"))):
        raise UserError(
            f"{name}: {rows.get_origin(0)}: the options are in columns of their own, and the task takes them from the question, so"
            f" the model would not see them. Get the files from {benchmark.how_to_get}."
        )
    return found


def _read_or_none(rows: Rows, number: int) -> Mapping[str, Any] | None:
    try:
        return rows[number]
    except RecordError:
        return None


def _make_features(benchmark: Benchmark) -> dict[str, Any]:
    import datasets

    text = datasets.Value("string")
    kinds: dict[ColumnKind, Any] = {
        ColumnKind.text: text,
        ColumnKind.optional_text: text,
        ColumnKind.integer: datasets.Value("int64"),
        ColumnKind.texts: datasets.List(text),
        ColumnKind.image: datasets.Image(),
        ColumnKind.images: datasets.List(datasets.Image()),
    }
    columns = {name: kinds[kind] for name, kind in benchmark.columns.items()}
    return columns | dict.fromkeys(benchmark.constants, text)


def _split_into_batches(numbers: Sequence[int]) -> Iterator[Sequence[int]]:
    for start in range(0, len(numbers), _BATCH_ROWS):
        yield numbers[start : start + _BATCH_ROWS]


def _digest_bytes(value: Any) -> str:
    assert isinstance(value, bytes)
    return hashlib.sha256(value).hexdigest()
