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
_WINDOW = 1 << 22  # bytes
_LONGEST_LINE = 1 << 22  # bytes in which a column counts characters; beyond, it counts bytes
_SPACE = re.compile(r"[ \t\r\n]*")
# Characters. If the window's end cuts a literal, a number or an escape, the parser stops at most this far before the end.
_NEAR_THE_END = 16


def elements(path: Path) -> Iterator[tuple[int, int]]:
    """Iterate over the elements of a JSON list as byte spans (from, to). Each element is parsed and then dropped.

    Raises:
        UserError: with line and column, if the file is no JSON list.
    """
    with open(path, "rb") as stream:
        window = _Window(stream, len(BOM) if stream.read(len(BOM)) == BOM else 0)
        try:
            yield from _elements(window)
        except _NotAList as error:
            line, column = _line_and_column(stream, error.at)
            raise UserError(
                f"{path}: not a JSON list of records: {error.reason} at line {line}, column {column}. "
                f"Repair the file; records that stand one to a line belong in a .jsonl file."
            ) from None


class _NotAList(Exception):
    """The file is no JSON list: the reason and the byte offset."""

    def __init__(self, reason: str, at: int) -> None:
        self.reason, self.at = reason, at


class _Window:
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

    def sign(self, at: int) -> tuple[str, int]:
        """Return the next character that is no white space ("" at the file's end), and its offset."""
        while True:
            at = self._start + _SPACE.match(self._text, at - self._start).end()  # type: ignore[union-attr]
            if at < self.end or not self._grow(at):
                return self._text[at - self._start : at - self._start + 1], at

    def element(self, at: int) -> int:
        """Find the end of the value that begins at an offset; raise `_JsonListError` if it is no valid JSON."""
        while True:
            failure: _NotAList | None = None
            try:
                end = needed = self._start + self._decoder.raw_decode(self._text, at - self._start)[1]
            except json.JSONDecodeError as error:
                failure = _NotAList(error.msg, self._start + error.pos)
                needed = self.end if error.msg.startswith("Unterminated string") else failure.at
            except RecursionError:
                raise _NotAList("it is nested too deeply", at) from None
            if needed + _NEAR_THE_END >= self.end and self._grow(at):
                continue
            if failure:
                raise failure
            return end

    def _grow(self, at: int) -> bool:
        """Drop the text before `offset` and read more; return False at the file's end.

        The read is at least as long as the unfinished element, so the window doubles.
        """
        if self.end - at > MAX_ROW_BYTES:
            raise _NotAList(f"an element of more than {MAX_ROW_BYTES:,} bytes", at)
        data = self._stream.read(max(_WINDOW, self.end - at))
        self._text = self._text[at - self._start :] + data.decode("latin-1")
        self._start = at
        return bool(data)


def _elements(window: _Window) -> Iterator[tuple[int, int]]:
    def expect(character: str, offset: int) -> int:
        found, offset = window.sign(offset)
        if found != character:
            raise _NotAList(f"Expecting '{character}'", offset)
        return offset + 1

    character, offset = window.sign(expect("[", window.end))
    while character != "]":
        end = window.element(offset)
        yield offset, end
        character, offset = window.sign(end)
        if character != "]":
            character, offset = "", window.sign(expect(",", offset))[1]
    character, offset = window.sign(offset + 1)
    if character:
        raise _NotAList("Extra data behind the list", offset)


def _line_and_column(stream: BinaryIO, at: int) -> tuple[int, int]:
    """Find the line and column of a byte, both counted from 1; columns count characters."""
    stream.seek(0)
    line, line_start, num_read = 1, 0, 0
    while num_read < at and (data := stream.read(min(_WINDOW, at - num_read))):
        line += data.count(b"\n")
        last_break = data.rfind(b"\n")
        line_start = num_read + last_break + 1 if last_break >= 0 else line_start
        num_read += len(data)
    stream.seek(line_start)
    head = stream.read(min(at - line_start, _LONGEST_LINE))
    return line, len(head.decode("utf-8", "replace")) + 1 + (at - line_start - len(head))
