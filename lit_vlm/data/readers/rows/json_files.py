"""Byte offsets of the elements of a JSON list, found through a sliding window: memory is that of one element."""

from __future__ import annotations

import json
import os
import re
import time
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from lit_vlm.data.lazy_images import REMEDY
from lit_vlm.data.readers.context import describe_type
from lit_vlm.data.readers.rows.base import DuplicateKeyError, Hasher, build_unique_dict
from lit_vlm.data.readers.rows.offset_cache import StoredArray, load_or_scan
from lit_vlm.types import Fault, RecordError, UserError

BOM = b"\xef\xbb\xbf"
MAX_ROW_BYTES = 1 << 30
_WINDOW_BYTES = 1 << 22  # bytes
_MAX_LINE_BYTES = 1 << 22  # bytes in which a column counts characters; beyond, it counts bytes
_SPACE = re.compile(r"[ \t\r\n]*")
# Characters. If the window's end cuts a literal, a number or an escape, the parser stops at most this far before the end.
_END_MARGIN = 16


def iter_elements(path: Path) -> Iterator[tuple[int, int]]:
    """Iterate over the elements of a JSON list as byte spans (from, to). Each element is parsed and then dropped.

    Raises:
        UserError: with line and column, if the file is no JSON list.
    """
    with open(path, "rb") as stream:
        window = _FileWindow(stream, len(BOM) if stream.read(len(BOM)) == BOM else 0)
        try:
            yield from _iter_element_spans(window)
        except _JsonListError as error:
            line, column = _find_line_and_column(stream, error.offset)
            raise UserError(
                f"{path}: not a JSON list of records: {error.reason} at line {line}, column {column}. "
                f"Repair the file; records that stand one to a line belong in a .jsonl file."
            ) from None


class _JsonListError(Exception):
    """The file is no JSON list: the reason and the byte offset."""

    def __init__(self, reason: str, offset: int) -> None:
        self.reason, self.offset = reason, offset


class _FileWindow:
    """Window of the file as Latin-1 text.

    Latin-1 maps each byte to one character and keeps JSON's own characters, so offsets in the text are offsets in the
    file. All offsets that go in and out are those of the file.
    """

    def __init__(self, stream: BinaryIO, start: int) -> None:
        self._stream, self._start, self._text = stream, start, ""
        # The values of numbers are not needed here, and Python's int refuses a number of thousands of digits.
        self._decoder = json.JSONDecoder(parse_int=len, parse_float=len)
        stream.seek(start)

    @property
    def end(self) -> int:
        return self._start + len(self._text)

    def next_character(self, offset: int) -> tuple[str, int]:
        """Return the next character that is no white space ("" at the file's end), and its offset."""
        while True:
            offset = self._start + _SPACE.match(self._text, offset - self._start).end()  # type: ignore[union-attr]
            if offset < self.end or not self._read_more(offset):
                return self._text[offset - self._start : offset - self._start + 1], offset

    def find_element_end(self, offset: int) -> int:
        """Find the end of the value that begins at an offset; raise `_JsonListError` if it is no valid JSON."""
        while True:
            failure: _JsonListError | None = None
            try:
                end = needed = self._start + self._decoder.raw_decode(self._text, offset - self._start)[1]
            except json.JSONDecodeError as error:
                failure = _JsonListError(error.msg, self._start + error.pos)
                needed = self.end if error.msg.startswith("Unterminated string") else failure.offset
            except RecursionError:
                raise _JsonListError("it is nested too deeply", offset) from None
            if needed + _END_MARGIN >= self.end and self._read_more(offset):
                continue
            if failure:
                raise failure
            return end

    def _read_more(self, offset: int) -> bool:
        """Drop the text before `offset` and read more; return False at the file's end.

        The read is at least as long as the unfinished element, so the window doubles.
        """
        if self.end - offset > MAX_ROW_BYTES:
            raise _JsonListError(f"an element of more than {MAX_ROW_BYTES:,} bytes", offset)
        data = self._stream.read(max(_WINDOW_BYTES, self.end - offset))
        self._text = self._text[offset - self._start :] + data.decode("latin-1")
        self._start = offset
        return bool(data)


def _iter_element_spans(window: _FileWindow) -> Iterator[tuple[int, int]]:
    def require_character(character: str, offset: int) -> int:
        found, offset = window.next_character(offset)
        if found != character:
            raise _JsonListError(f"Expecting '{character}'", offset)
        return offset + 1

    character, offset = window.next_character(require_character("[", window.end))
    while character != "]":
        end = window.find_element_end(offset)
        yield offset, end
        character, offset = window.next_character(end)
        if character != "]":
            character, offset = "", window.next_character(require_character(",", offset))[1]
    character, offset = window.next_character(offset + 1)
    if character:
        raise _JsonListError("Extra data behind the list", offset)


def _find_line_and_column(stream: BinaryIO, offset: int) -> tuple[int, int]:
    """Find the line and column of a byte, both counted from 1; columns count characters."""
    stream.seek(0)
    line, line_start, num_read = 1, 0, 0
    while num_read < offset and (data := stream.read(min(_WINDOW_BYTES, offset - num_read))):
        line += data.count(b"\n")
        last_break = data.rfind(b"\n")
        line_start = num_read + last_break + 1 if last_break >= 0 else line_start
        num_read += len(data)
    stream.seek(line_start)
    head = stream.read(min(offset - line_start, _MAX_LINE_BYTES))
    return line, len(head.decode("utf-8", "replace")) + 1 + (offset - line_start - len(head))


_BLOCK_BYTES = 1 << 22  # bytes of one read while scanning and hashing
_NEWLINE = 10
_MAX_GAP_BYTES = 64  # between ranges that follow each other: a comma, blank lines
_DECODER = json.JSONDecoder(object_pairs_hook=build_unique_dict)  # made once: json.loads would make one for each record
_IS_BLANK = np.zeros(256, bool)
_IS_BLANK[list(b" \t\n\r\x0b\x0c")] = True


_MAX_BLOCK_BYTES = 1 << 16
_BLOCK_SECONDS = 0.1


class SpanReader:
    """Reader of byte ranges of a file. The file is opened for each read, so forked processes share nothing.

    Ranges that follow each other are served from a block that is read ahead; it doubles up to 64 KiB, and it is read again
    after a tenth of a second, so that a changed file is noticed. Ranges in any order are read one by one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._block = (0, b"", 0, 0.0)  # first byte, data, end of the last range, time of reading

    def read(self, start: int, end: int, origin: str) -> bytes:
        """Read a range; raise a RecordError as `read_span`."""
        first, data, last_end, read_at = self._block  # first <= last_end
        stop = first + len(data)
        if last_end <= start and end <= stop and time.monotonic() - read_at < _BLOCK_SECONDS:
            # The file's last range frees the block
            self._block = (first, data, end, read_at) if end < stop else (end, b"", end, 0.0)
            return data[start - first : end - first]
        follows = 0 <= start - last_end <= _MAX_GAP_BYTES and last_end > 0
        size = min(2 * max(len(data), end - start), _MAX_BLOCK_BYTES) if follows else 0
        data = read_span(self.path, start, end, origin, ahead=max(0, size - (end - start)))
        self._block = (start, data, end, time.monotonic())
        return data if len(data) == end - start else data[: end - start]

    def __reduce__(self):
        return SpanReader, (self.path,)


class JsonRows:
    """Rows of one JSON or JSONL file.

    Args:
        spans: [rows, 2] bytes from and to, or [rows, 3] with line numbers.
    """

    def __init__(self, path: Path, spans: StoredArray) -> None:
        self.path, self._spans = path, spans
        self._name, self._reader = path.name, SpanReader(path)
        self._last = (-1, 0, 0, "")  # the last row that was located: its callers need place and origin together

    def __len__(self) -> int:
        return len(self._spans.array)

    def get_origin(self, index: int) -> str:
        return self._locate(index)[3]

    def __getitem__(self, index: int) -> dict[str, Any]:
        _, start, end, origin = self._locate(index)
        return parse_record(self._reader.read(start, end, origin), origin)

    def _locate(self, index: int) -> tuple[int, int, int, str]:
        """Return number, first byte, end and origin of a row."""
        last = self._last  # read once: other threads may locate other rows
        if last[0] != index:
            start, end, *line = self._spans.array[index].tolist()
            self._last = last = index, start, end, f"{self._name}:{line[0]}" if line else f"{self._name}[{index}]"
        return last

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
        row, end = _DECODER.raw_decode(text) if text[:1] == "{" else (None, -1)
        if end != len(text):  # white space before the object, another value, or text behind it
            row = _DECODER.decode(text)
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


def read_span(path: Path, start: int, end: int, origin: str, ahead: int = 0) -> bytes:
    """Read a range of bytes of a file, and up to `ahead` bytes behind it.

    Raises:
        RecordError: the range cannot be read, or the file has become shorter.
    """
    if end - start > MAX_ROW_BYTES:
        reason = f"has {end - start:,} bytes, at most {MAX_ROW_BYTES:,} are read"
        raise RecordError(origin, reason, REMEDY, Fault.too_large)
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            data = os.pread(descriptor, end - start + ahead, start)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise RecordError(origin, f"{path} cannot be read: {error.strerror}", REMEDY, Fault.unreadable) from error
    if len(data) < end - start:
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
