"""Byte offsets of the elements of a JSON list, found through a sliding window: memory is that of one element."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from lit_vlm.types import UserError

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
