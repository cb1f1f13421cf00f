"""Random access to rows of JSON and JSONL files by byte offsets.

A file of any size is scanned once; then each row is one read.
"""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lit_vlm.data.images import REMEDY
from lit_vlm.data.readers.place import describe_type
from lit_vlm.data.readers.rows.base import DuplicateKeyError, Hasher, build_unique_dict
from lit_vlm.data.readers.rows.json_list import BOM, MAX_ROW_BYTES, iter_elements
from lit_vlm.data.readers.rows.stored import StoredArray, load_or_scan
from lit_vlm.types import Fault, RecordError

_BLOCK_BYTES = 1 << 22  # bytes of one read while scanning and hashing
_NEWLINE = 10
_IS_BLANK = np.zeros(256, bool)
_IS_BLANK[list(b" \t\n\r\x0b\x0c")] = True


class JsonRows:
    """Rows of one JSON or JSONL file. The file is opened for each row, so forked processes share nothing.

    Args:
        spans: [rows, 2] bytes from and to, or [rows, 3] with line numbers.
    """

    def __init__(self, path: Path, spans: StoredArray) -> None:
        self.path, self._spans = path, spans

    def __len__(self) -> int:
        return len(self._spans.array)

    def get_origin(self, index: int) -> str:
        row = self._spans.array[index]
        return f"{self.path.name}[{index}]" if len(row) == 2 else f"{self.path.name}:{row[2]}"

    def __getitem__(self, index: int) -> dict[str, Any]:
        start, end = self._spans.array[index, :2].tolist()
        return parse_record(_read_span(self.path, start, end, self.get_origin(index)), self.get_origin(index))

    def update_hash(self, hasher: Hasher, start: int, stop: int) -> None:
        """Update the hasher with the bytes from the first row to the last. Their offset in the file does not count."""
        offset, end = int(self._spans.array[start, 0]), int(self._spans.array[stop - 1, 1])
        with open(self.path, "rb") as stream:
            stream.seek(offset)
            while offset < end and (data := stream.read(min(_BLOCK_BYTES, end - offset))):
                hasher.update(data)
                offset += len(data)


def open_json_lines(path: Path, cache_dir: Path | None = None) -> JsonRows:
    """Open a JSONL file with one record a line. Blank lines are no records, but they count as lines."""
    return JsonRows(path, load_or_scan(path, cache_dir, "lines", 3, _find_line_spans))


def open_json_list(path: Path, cache_dir: Path | None = None) -> JsonRows:
    """Open a file that is one JSON list; raise a UserError with line and column if it cannot be parsed."""
    return JsonRows(path, load_or_scan(path, cache_dir, "list", 2, _find_list_spans))


def parse_record(data: bytes, origin: str) -> dict[str, Any]:
    """Parse the bytes of one record as a JSON object; raise a RecordError if they are anything else."""
    try:
        text = data.decode("utf-8").rstrip()  # after a line break json would count columns from 1 again
        row = json.loads(text, object_pairs_hook=build_unique_dict)
    except DuplicateKeyError as error:
        raise RecordError(origin, str(error), REMEDY) from None
    except UnicodeDecodeError as error:
        raise RecordError(origin, f"not UTF-8 at byte {error.start + 1}: {data[error.start]:#04x}", REMEDY) from None
    except json.JSONDecodeError as error:
        raise RecordError(origin, f"not JSON at column {error.colno}: {error.msg}", REMEDY) from None
    except (RecursionError, ValueError) as error:  # nested too deeply; a number of thousands of digits
        raise RecordError(origin, f"not readable as JSON: {error}", REMEDY) from None
    if not isinstance(row, dict):
        raise RecordError(origin, f"the record is {describe_type(row)}; it must be an object", REMEDY)
    return row


def _read_span(path: Path, start: int, end: int, origin: str) -> bytes:
    if end - start > MAX_ROW_BYTES:
        reason = f"has {end - start:,} bytes, at most {MAX_ROW_BYTES:,} are read"
        raise RecordError(origin, reason, REMEDY, Fault.too_large)
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            data = os.pread(descriptor, end - start, start)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise RecordError(origin, f"{path} cannot be read: {error.strerror}", REMEDY, Fault.unreadable) from error
    if len(data) != end - start:
        reason = f"{path} has become shorter since it was opened"
        raise RecordError(origin, reason, "Start again when nothing writes to it any more", Fault.changed)
    return data


def _find_list_spans(path: Path) -> Iterator[np.ndarray]:
    spans = array("q")
    for span in iter_elements(path):
        spans.extend(span)
        if len(spans) >= 1 << 17:
            yield np.array(spans).reshape(-1, 2)
            spans = array("q")
    yield np.array(spans).reshape(-1, 2)


def _find_line_spans(path: Path) -> Iterator[np.ndarray]:
    """Yield [n, 3] for the lines that are not blank: first byte, end (line break included), and line number."""
    start, number, is_blank = 0, 1, True  # of the line that a block's end cuts: offset, line number, blank so far
    with open(path, "rb") as stream:
        offset = start = len(BOM) if stream.read(len(BOM)) == BOM else 0
        stream.seek(offset)
        while data := stream.read(_BLOCK_BYTES):
            values = np.frombuffer(data, np.uint8)
            breaks = np.flatnonzero(values == _NEWLINE)
            starts = np.concatenate(([0], breaks + 1))  # the last one begins the line that the next block continues
            blanks = _find_blank_lines(values, starts)
            blanks[0] &= is_blank
            spans = np.stack((offset + starts[:-1], offset + starts[1:], number + np.arange(len(breaks))), axis=1)
            if len(breaks):
                spans[0, 0] = start
                start = offset + int(starts[-1])
            yield spans[~blanks[:-1]]
            offset, number, is_blank = offset + len(data), number + len(breaks), bool(blanks[-1])
    if not is_blank:
        yield np.array([[start, offset, number]])


def _find_blank_lines(data: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Find the blank lines of a block, as [lines] bool.

    For nearly every line the first byte decides; the few others are checked whole.
    """
    ends = np.append(starts[1:], len(data))
    blanks = np.ones(len(starts), bool)
    filled = starts < ends
    blanks[filled] = _IS_BLANK[data[starts[filled]]]
    for line in np.flatnonzero(blanks & (ends - starts > 1)):
        blanks[line] = _IS_BLANK[data[starts[line] : ends[line]]].all()
    return blanks
