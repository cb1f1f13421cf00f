"""Random access to the rows of CSV and TSV files by byte offsets: quotes may hold delimiters and line breaks.

One pass with Python's csv reader finds where each row begins. The delimiter, and whether the text is UTF-8 or CP949 (Excel
in Korean), are found in that pass and stored with the offsets.
"""

from __future__ import annotations

import codecs
import csv
import io
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from lit_vlm.data.lazy_images import REMEDY, format_untrusted
from lit_vlm.data.readers.rows.base import Hasher, get_file_identity
from lit_vlm.data.readers.rows.json_files import BOM, MAX_ROW_BYTES, SpanReader
from lit_vlm.data.readers.rows.offset_cache import StoredArray, load_or_scan
from lit_vlm.formatting import format_count
from lit_vlm.types import RecordError, UserError

DELIMITERS = ",;\t|"
_ENCODINGS = ("utf-8", "cp949")
_NUM_SNIFFED_ROWS = 20  # rows that must agree in their number of fields if several delimiters are possible
_BLOCK_BYTES = 1 << 22
_CHUNK_ROWS = 1 << 16
csv.field_size_limit(MAX_ROW_BYTES)  # the default refuses texts of more than 128 KiB


class CsvRows:
    """Rows of one CSV file, as dicts by the names of its first row. An empty field is a missing value, None.

    Args:
        table: [1 + rows, 3]. The first row has the delimiter, the number of the encoding and the number of columns; each
            other one has the first byte, the end, and the line number of a row; the header is the first of them.
    """

    def __init__(self, path: Path, table: StoredArray) -> None:
        self.path, self._table = path, table
        self._reader, self._last = SpanReader(path), (-2, 0, 0, "")  # the last row that was located
        delimiter, encoding, _ = table.array[0].tolist()
        self._delimiter, self._encoding = chr(delimiter), _ENCODINGS[encoding]
        self._names = self._name_columns(self._read_fields(-1))

    def __len__(self) -> int:
        return len(self._table.array) - 2

    def get_origin(self, index: int) -> str:
        return self._locate(index)[3]

    def __getitem__(self, index: int) -> dict[str, Any]:
        values = self._read_fields(index)
        if len(values) != len(self._names):
            found = f"{format_count(len(values), 'field')} and {format_count(len(self._names), 'column')}"
            reason = f"{found}; a text with {self._delimiter!r} in it must stand in quotes"
            raise RecordError(self.get_origin(index), reason, REMEDY)
        return {name: value or None for name, value in zip(self._names, values, strict=True)}

    def update_hash(self, hasher: Hasher, start: int, stop: int) -> None:
        """Update the hasher with the file's identity and the row numbers: an unchanged file has unchanged rows."""
        hasher.update(repr((get_file_identity(self.path), start, stop)).encode())

    def _read_fields(self, index: int) -> list[str]:
        _, start, end, origin = self._locate(index)
        text = self._reader.read(start, end, origin).decode(self._encoding)
        body = text.rstrip("\r\n")
        if '"' not in body and "\r" not in body and "\n" not in body:
            return body.split(self._delimiter)
        num_lines = text.count("\n", 0, -1) + 1
        lines = (
            [text] if num_lines == 1 else io.StringIO(text, newline="\n")
        )  # str.splitlines has other line breaks too
        try:
            return next(csv.reader(lines, delimiter=self._delimiter, strict=True))
        except csv.Error as error:
            where = f" (the row reaches over {num_lines:,} lines)" if num_lines > 1 else ""
            raise RecordError(origin, f"not readable as CSV: {_explain(error)}{where}", REMEDY) from None

    def _locate(self, index: int) -> tuple[int, int, int, str]:
        """Return number, first byte, end and origin of a row; -1 is the header."""
        last = self._last  # read once: other threads may locate other rows
        if last[0] != index:
            start, end, line = self._table.array[index + 2].tolist()
            self._last = last = index, start, end, f"{self.path.name}:{line}"
        return last

    def _name_columns(self, names: list[str]) -> list[str]:
        names = [name.strip() or f"column {number}" for number, name in enumerate(names, 1)]
        repeated = next((name for name in names if names.count(name) > 1), None)
        if repeated is not None:
            found = f"the column {format_untrusted(repeated, 40)} stands twice in its first line"
            raise UserError(f"{self.path}: {found}; only one of them can be meant. Rename one.")
        return names


def open_csv(path: Path, cache_dir: Path | None = None) -> CsvRows:
    """Open a CSV or TSV file whose first row names the columns.

    Raises:
        UserError: it is empty, has another delimiter or encoding, a column twice, or a quote that is never closed.
    """
    return CsvRows(path, load_or_scan(path, cache_dir, "csv", 3, _scan))


def _scan(path: Path) -> Iterator[np.ndarray]:
    with open(path, "rb") as stream:
        encoding = _find_encoding(path, stream)
        offset = len(BOM) if _read_head(stream, len(BOM)) == BOM else 0
        delimiter = _find_delimiter(path, stream, offset, _ENCODINGS[encoding])
        yield np.array([[ord(delimiter), encoding, 0]])
        rows = array("q")
        for start, end, line in _iter_spans(path, stream, offset, delimiter):
            rows.extend((start, end, line))
            if len(rows) >= 3 * _CHUNK_ROWS:
                yield np.array(rows).reshape(-1, 3)
                rows = array("q")
        yield np.array(rows, np.int64).reshape(-1, 3)


def _iter_spans(path: Path, stream: BinaryIO, offset: int, delimiter: str) -> Iterator[tuple[int, int, int]]:
    """Yield first byte, end and line number of each row that is not blank.

    The lines are read as Latin-1, in which each byte is a character: delimiters, quotes and line breaks are the same bytes in
    UTF-8 and in CP949.
    """
    stream.seek(offset)
    lines = _CountedLines(stream, offset)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        start, line = lines.end, lines.number + 1
        if (plain := lines.read_plain()) is not None:
            if plain:
                yield start, lines.end, line
            continue
        try:
            fields = next(reader, None)
        except csv.Error as error:
            if lines.is_finished:
                remedy = "Close it, or write a quote inside a text twice"
                raise UserError(f"{path}:{line}: a quote is opened here and never closed. {remedy}.") from error
            fields = [""]  # the row is read again when it is asked for, and says then what is wrong with it
        if fields is None:
            return
        if fields:
            yield start, lines.end, line


class _CountedLines:
    """Lines of a stream as Latin-1, with the offset of the end and the number of the last one."""

    def __init__(self, stream: BinaryIO, offset: int) -> None:
        self._stream, self.end, self.number, self.is_finished = stream, offset, 0, False
        self._next: bytes | None = None  # a line that was looked at

    def __iter__(self) -> _CountedLines:
        return self

    def __next__(self) -> str:
        line, self._next = self._stream.readline() if self._next is None else self._next, None
        if not line:
            self.is_finished = True
            raise StopIteration
        self.end += len(line)
        self.number += 1
        return line.decode("latin-1")

    def read_plain(self) -> bytes | None:
        """Read a line without quotes, which is a row of its own; return it without its line break.

        None: the next line has a quote or a carriage return inside, or there is none. It is left for `next`.
        """
        line = self._stream.readline() if self._next is None else self._next
        body = line.rstrip(b"\r\n")
        if not line or b'"' in body or b"\r" in body:
            self._next = line
            return None
        self._next = None
        self.end += len(line)
        self.number += 1
        return body


def _find_encoding(path: Path, stream: BinaryIO) -> int:
    """Return the number of the first encoding that decodes the whole file."""
    if _read_head(stream, 2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        raise UserError(f"{path}: is UTF-16. Save it as UTF-8 (Excel: 'CSV UTF-8').")
    for number, encoding in enumerate(_ENCODINGS):
        decoder = codecs.getincrementaldecoder(encoding)()
        stream.seek(0)
        try:
            while data := stream.read(_BLOCK_BYTES):
                decoder.decode(data)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            continue
        return number
    raise UserError(f"{path}: is neither UTF-8 nor CP949. Save it as UTF-8.")


def _find_delimiter(path: Path, stream: BinaryIO, offset: int, encoding: str) -> str:
    """Find the delimiter that splits the first line into columns; of several, the one on which the first rows agree."""
    stream.seek(offset)
    header = stream.readline().decode(encoding, "replace").strip("\r\n")
    if not header.strip():
        raise UserError(f"{path}: its first line is empty; it must name the columns.")
    if path.suffix.lower() == ".tsv":
        return "\t"
    counts = {delimiter: _count_fields(stream, offset, delimiter) for delimiter in DELIMITERS}
    possible = {delimiter: found for delimiter, found in counts.items() if found and found[0] > 1}
    agreeing = [delimiter for delimiter, found in possible.items() if len(set(found)) == 1]
    chosen = list(possible) if len(possible) == 1 else agreeing
    if len(chosen) != 1:
        which = f"{', '.join(map(repr, chosen))} all split it alike" if chosen else "none splits it into columns"
        known = ", ".join(map(repr, DELIMITERS))
        raise UserError(
            f"{path}: cannot tell the delimiter from its first line {format_untrusted(header, 80)}: "
            f"of {known} {which}. Save it with one of these."
        )
    return chosen[0]


def _count_fields(stream: BinaryIO, offset: int, delimiter: str) -> list[int]:
    """Count the fields of the first rows."""
    stream.seek(offset)
    counts: list[int] = []
    reader = csv.reader(_CountedLines(stream, offset), delimiter=delimiter)
    try:
        for fields in reader:
            if fields:
                counts.append(len(fields))
            if len(counts) >= _NUM_SNIFFED_ROWS:
                break
    except csv.Error:
        pass
    return counts


def _read_head(stream: BinaryIO, num_bytes: int) -> bytes:
    stream.seek(0)
    return stream.read(num_bytes)


def _explain(error: csv.Error) -> str:
    text = str(error)
    return f"{text}; a quote inside a quoted text must be written twice" if "expected after" in text else text
