"""Rows by position, out of files that do not fit into memory: JSON by byte offsets, parquet and Arrow memory-mapped."""

from __future__ import annotations

import bisect
import dataclasses
import glob
import itertools
import json
import re
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lit_vlm.data.images import REMEDY
from lit_vlm.data.readers.record import type_name
from lit_vlm.types import RecordError, UserError

_SPACE = re.compile(r"[ \t\r\n]*")
_BOM = b"\xef\xbb\xbf"


class Rows(Protocol):
    """`origin` names a row for people; `rows[i]` raises RecordError for a row that is no object."""

    def __len__(self) -> int: ...

    def origin(self, index: int) -> str: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


class JsonRows:
    """The rows of one JSON or JSONL file: 16 to 24 bytes of memory each. Opened per row, so forks share nothing."""

    def __init__(self, path: Path, spans: np.ndarray, lines: np.ndarray | None = None) -> None:
        self.path, self._spans, self._lines = path, spans, lines  # [rows, 2] bytes from and to; [rows] line numbers

    def __len__(self) -> int:
        return len(self._spans)

    def origin(self, index: int) -> str:
        return f"{self.path.name}[{index}]" if self._lines is None else f"{self.path.name}:{self._lines[index]}"

    def __getitem__(self, index: int) -> dict[str, Any]:
        start, end = map(int, self._spans[index])
        with open(self.path, "rb") as stream:
            stream.seek(start)
            data = stream.read(end - start)
        return _parse(data, self.origin(index))


class ArrowRows:
    """The rows of a `datasets.Dataset`, images left encoded. `counts` are the rows of each of the files behind it."""

    def __init__(self, dataset: Any, names: Sequence[str], counts: Sequence[int]) -> None:
        self._dataset, self._names = dataset.with_format("arrow"), list(names)
        self._ends = list(itertools.accumulate(counts))
        self._features = type(dataset.features)(_undecoded(dict(dataset.features)))

    def __len__(self) -> int:
        return len(self._dataset)

    def origin(self, index: int) -> str:
        part = bisect.bisect_right(self._ends, index)
        return f"{self._names[part]}[{index - (self._ends[part - 1] if part else 0)}]"

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._features.decode_example(self._dataset[index].to_pylist()[0])


class JoinedRows:
    """The rows of several files, one after the other."""

    def __init__(self, parts: Sequence[Rows]) -> None:
        self._parts, self._ends = list(parts), list(itertools.accumulate(map(len, parts)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def origin(self, index: int) -> str:
        part, index = self._find(index)
        return part.origin(index)

    def __getitem__(self, index: int) -> dict[str, Any]:
        part, index = self._find(index)
        return part[index]

    def _find(self, index: int) -> tuple[Rows, int]:
        part = bisect.bisect_right(self._ends, index)
        return self._parts[part], index - (self._ends[part - 1] if part else 0)


def json_lines(path: Path) -> JsonRows:
    """One record a line; blank lines are no records, yet count as lines."""
    spans, lines, at = array("q"), array("q"), 0
    with open(path, "rb") as stream:
        for number, line in enumerate(stream, 1):
            if not line.isspace() and line != _BOM:
                spans.extend((at + (len(_BOM) if at == 0 and line.startswith(_BOM) else 0), at + len(line)))
                lines.append(number)
            at += len(line)
    return JsonRows(path, _pairs(spans), np.frombuffer(lines, np.int64))


def json_list(path: Path) -> JsonRows:
    """A file that is one JSON list. UserError with line and column when it does not parse."""
    data = path.read_bytes()
    # Latin-1 maps each byte to one character and leaves JSON's own signs alone, so positions in the text are
    # positions in the file.
    text = data.decode("latin-1")
    try:
        return JsonRows(path, _pairs(_elements(text, len(_BOM) if data.startswith(_BOM) else 0)))
    except (json.JSONDecodeError, RecursionError) as error:
        at = getattr(error, "pos", 0)
        line, start = data.count(b"\n", 0, at) + 1, data.rfind(b"\n", 0, at) + 1
        column = len(data[start:at].decode("utf-8", "replace")) + 1
        reason = getattr(error, "msg", "it is nested too deeply")
        raise UserError(
            f"{path}: not a JSON list of records: {reason} at line {line}, column {column}. "
            f"Repair the file; records that stand one to a line belong in a .jsonl file."
        ) from None


def parquet(paths: Sequence[Path]) -> Rows:
    """Parquet has no cheap access by row; `datasets` writes it once into its cache as Arrow, which has."""
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        counts = [pq.read_metadata(path).num_rows for path in paths]
        filled = [
            path for path, count in zip(paths, counts, strict=True) if count
        ]  # `datasets` fails on a file without rows
        if not filled:
            return JoinedRows(())
        dataset = datasets.Dataset.from_parquet([glob.escape(str(path.resolve())) for path in filled])
    except (OSError, pa.ArrowException, datasets.exceptions.DatasetsError) as error:
        cause = error.__cause__ or error
        raise UserError(f"{_named(paths)}: cannot be read as parquet: {cause}. Repair or replace it.") from error
    return ArrowRows(dataset, [path.name for path in paths], counts)


def arrow(paths: Sequence[Path]) -> ArrowRows:
    import datasets
    import pyarrow as pa

    try:
        parts = [datasets.Dataset.from_file(str(path)) for path in paths]
        dataset = datasets.concatenate_datasets(parts)
    except (OSError, pa.ArrowException, ValueError) as error:
        raise UserError(f"{_named(paths)}: cannot be read as Arrow: {error}. Repair or replace it.") from error
    return ArrowRows(dataset, [path.name for path in paths], [len(part) for part in parts])


def saved_dataset(folder: Path) -> ArrowRows:
    """A folder of `Dataset.save_to_disk`."""
    import datasets

    try:
        dataset = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder}: cannot be read as a saved dataset: {error}. Save it again.") from error
    return ArrowRows(dataset, [folder.name], [len(dataset)])


def _elements(text: str, at: int) -> array:
    """Where each element of the list begins and ends; parsed to find that out, and let go."""
    decoder, spans = json.JSONDecoder(), array("q")

    def after_space(at: int) -> int:
        return _SPACE.match(text, at).end()

    def expect(sign: str, at: int) -> int:
        if text[at : at + 1] != sign:
            raise json.JSONDecodeError(f"Expecting '{sign}'", text, at)
        return after_space(at + 1)

    at = expect("[", after_space(at))
    while text[at : at + 1] != "]" or spans:
        _, end = decoder.raw_decode(text, at)
        spans.extend((at, end))
        at = after_space(end)
        if text[at : at + 1] == "]":
            break
        at = expect(",", at)
    if expect("]", at) != len(text):
        raise json.JSONDecodeError("Extra data behind the list", text, after_space(at + 1))
    return spans


def _parse(data: bytes, origin: str) -> dict[str, Any]:
    try:
        row = json.loads(data.decode("utf-8").rstrip())  # behind the line's end, columns would count from 1 again
    except UnicodeDecodeError as error:
        raise RecordError(origin, f"not UTF-8 at byte {error.start + 1}: {data[error.start]:#04x}", REMEDY) from None
    except json.JSONDecodeError as error:
        raise RecordError(origin, f"not JSON at column {error.colno}: {error.msg}", REMEDY) from None
    except (RecursionError, ValueError) as error:  # nested too deeply; a number of thousands of digits
        raise RecordError(origin, f"not readable as JSON: {error}", REMEDY) from None
    if not isinstance(row, dict):
        raise RecordError(origin, f"the record is {type_name(row)}; it must be an object", REMEDY)
    return row


def _pairs(spans: array) -> np.ndarray:
    return np.frombuffer(spans, np.int64).reshape(-1, 2)


def _undecoded(feature: Any) -> Any:
    """The feature with its media left as {bytes, path}; Json columns are still parsed."""
    if isinstance(feature, dict):
        return {key: _undecoded(inner) for key, inner in feature.items()}
    if hasattr(feature, "feature"):
        return dataclasses.replace(feature, feature=_undecoded(feature.feature))
    is_media = getattr(feature, "decode", False) and type(feature).__name__ != "Json"
    return dataclasses.replace(feature, decode=False) if is_media else feature


def _named(paths: Sequence[Path]) -> str:
    return str(paths[0]) if len(paths) == 1 else f"{paths[0].parent} ({len(paths)} files)"
