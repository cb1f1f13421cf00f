"""Label files as records: one JSON file a record, a list of records in one file, or COCO's two lists joined.

For a file with many records only the byte offsets of its items are held, 16 bytes each. An item is read on access.
"""

from __future__ import annotations

import json
import re
from array import array
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from lit_vlm.config.mapping import MappingConfig
from lit_vlm.data.decoding import REMEDY
from lit_vlm.data.lazy_images import format_untrusted
from lit_vlm.data.readers.context import describe_type
from lit_vlm.data.readers.file_catalogue import FileCatalogue
from lit_vlm.data.readers.rows.base import DuplicateKeyError, build_unique_dict
from lit_vlm.types import Fault, RecordError, UserError

_SPACE = re.compile(r"[ \t\r\n]*")
_BOM = b"\xef\xbb\xbf"
_DECODER = json.JSONDecoder()


@dataclass(frozen=True, slots=True)
class LabelFileOffsets:
    """Byte offsets of one label file's records, and of the items that are joined to them."""

    record_spans: np.ndarray  # [records, 2] bytes from and to
    item_spans: np.ndarray  # [items, 2] bytes from and to, in the order of the records that the items name
    item_ends: np.ndarray  # [records] cumulative number of items up to and including this record


class LabelRecords:
    """Records of all label files, by position. `labels[i]` is the parsed JSON object."""

    def __init__(self, catalogue: FileCatalogue, mapping: MappingConfig) -> None:
        self.catalogue, self._mapping = catalogue, mapping
        self._offsets = (
            [self._find_offsets(file) for file in range(len(catalogue))] if mapping.records is not None else None
        )
        counts = [1] * len(catalogue) if self._offsets is None else [len(items.record_spans) for items in self._offsets]
        self.ends = np.cumsum(counts, dtype=np.int64)  # [files] cumulative number of records

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def find_file(self, index: int) -> int:
        """Find the number of the label file that holds a record."""
        return int(np.searchsorted(self.ends, index, "right"))

    def get_origin(self, index: int) -> str:
        """Return the file and, in a list of records, the position of a record, for error messages."""
        file = self.find_file(index)
        return self.catalogue.format_path(file) + (
            "" if self._offsets is None else f"[{self._get_number_in_file(index, file)}]"
        )

    def __getitem__(self, index: int) -> dict[str, Any]:
        file, origin = self.find_file(index), self.get_origin(index)
        if self._mapping.labels is None:
            return {}  # the image is the record
        if self._offsets is None:
            return _parse_record(self.catalogue.read(file, origin), origin)
        offsets, number = self._offsets[file], self._get_number_in_file(index, file)
        record = _parse_record(self._read_span(file, offsets.record_spans[number], origin), origin)
        if self._mapping.join is not None:
            start = offsets.item_ends[number - 1] if number else 0
            joined = (
                self._read_span(file, span, origin) for span in offsets.item_spans[start : offsets.item_ends[number]]
            )
            record[self._mapping.join.rpartition(".")[2]] = [_parse_record(data, origin) for data in joined]
        return record

    def _get_number_in_file(self, index: int, file: int) -> int:
        return index - int(self.ends[file - 1] if file else 0)

    def _read_span(self, file: int, span: np.ndarray, origin: str) -> bytes:
        start, end = map(int, span)
        if self.catalogue.get_archive(file) is not None:
            return _read_unpacked(self.catalogue, file)[start:end]
        try:
            with open(self.catalogue.get_disk_path(file), "rb") as stream:
                stream.seek(start)
                return stream.read(end - start)
        except OSError as error:
            raise RecordError(origin, f"cannot be read: {error.strerror}", REMEDY, Fault.unreadable) from error

    def _find_offsets(self, file: int) -> LabelFileOffsets:
        """Find the byte offsets of a label file's records; raise a UserError if it is no JSON or has no such list."""
        name, mapping = self.catalogue.format_path(file), self._mapping
        try:
            data = self.catalogue.read(file, name)
        except RecordError as error:
            raise UserError(f"{error} A label file of many records must be whole; unpack a large one.") from error
        # Latin-1 maps each byte to one character, so offsets in the text are offsets in the file. Neither UTF-8 nor
        # CP949 has JSON's own characters inside of a multi-byte character.
        text = data.decode("latin-1")
        assert mapping.records is not None
        values: dict[int, dict[str, int]] = {}
        spans = _find_item_spans(text, mapping.records, name, values)
        if mapping.join is None:
            return LabelFileOffsets(spans, spans[:0], np.zeros(len(spans), np.int64))
        return _join_items(text, spans, _find_item_spans(text, mapping.join, name, values), mapping, name)


def parse_json(data: bytes, origin: str, *, allow_duplicate_keys: bool = False) -> Any:
    """Parse JSON in UTF-8, with or without a byte order mark, or in CP949.

    Args:
        allow_duplicate_keys: use the last value of a duplicate key; for items that are parsed again later.

    Raises:
        RecordError: names the line and column of the error, or the duplicate key.
    """
    for encoding in ("utf-8-sig", "cp949"):
        try:
            return json.loads(
                data.decode(encoding), object_pairs_hook=None if allow_duplicate_keys else build_unique_dict
            )
        except UnicodeDecodeError:
            continue
        except DuplicateKeyError as error:
            raise RecordError(origin, str(error), REMEDY) from None
        except json.JSONDecodeError as error:
            reason = f"not JSON at line {error.lineno}, column {error.colno}: {error.msg}"
            raise RecordError(origin, reason, REMEDY) from None
        except (RecursionError, ValueError) as error:
            raise RecordError(origin, f"not readable as JSON: {error}", REMEDY) from None
    raise RecordError(origin, "neither UTF-8 nor CP949", REMEDY)


def _parse_record(data: bytes, origin: str) -> dict[str, Any]:
    record = parse_json(data, origin)
    if not isinstance(record, dict):
        raise RecordError(origin, f"the record is {describe_type(record)}; it must be an object", REMEDY)
    return record


def _find_item_spans(text: str, path: str, name: str, known_offsets: dict[int, dict[str, int]]) -> np.ndarray:
    """Find the byte spans of the items of the list at `path`, as [items, 2].

    Args:
        known_offsets: results of `_find_value_offsets` by the offset of the object; new results are added to it.
    """
    try:
        offset = _skip_space(text, len(_BOM) if text.startswith(_BOM.decode("latin-1")) else 0)
        for part in path.split(".") if path != "." else ():
            if offset not in known_offsets:
                known_offsets[offset] = _find_value_offsets(text, offset, name)
            if part not in known_offsets[offset]:
                keys = ", ".join(format_untrusted(key, 40) for key in known_offsets[offset]) or "none"
                reason = f"{name}: there is no {part!r} of {path!r} (mapping.records, mapping.join)"
                raise UserError(f"{reason}; the keys are {keys}.")
            offset = known_offsets[offset][part]
        if text[offset : offset + 1] != "[":
            raise UserError(f"{name}: {path!r} (mapping.records, mapping.join) is no list. Name the list of records.")
        spans = array("q")
        for start, end in _iter_item_spans(text, offset):
            spans.extend((start, end))
    except (json.JSONDecodeError, RecursionError) as error:
        reason = getattr(error, "msg", "it is nested too deeply")
        line = text.count("\n", 0, getattr(error, "pos", 0)) + 1
        raise UserError(f"{name}: not JSON: {reason} at line {line}. Repair the file.") from None
    return np.frombuffer(spans, np.int64).reshape(-1, 2)


def _find_value_offsets(text: str, offset: int, name: str) -> dict[str, int]:
    """Find the offset of the value of each key of an object. Values are skipped, a list item by item.

    Raises:
        UserError: the object has a duplicate key.
    """
    value_offsets: dict[str, int] = {}
    if text[offset : offset + 1] != "{":
        return value_offsets
    offset = _skip_space(text, offset + 1)
    while text[offset : offset + 1] != "}":
        key, offset = _DECODER.raw_decode(text, offset)
        offset = _skip_character(text, offset, ":")
        key = parse_json(json.dumps(key, ensure_ascii=False).encode("latin-1"), name)
        if key in value_offsets:
            raise UserError(
                f"{name}: the key {format_untrusted(key, 40)} stands twice in one object. Take one of the two away."
            )
        value_offsets[key] = offset
        offset = _skip_value(text, offset)
        if text[offset : offset + 1] == ",":
            offset = _skip_space(text, offset + 1)
        elif text[offset : offset + 1] != "}":
            raise json.JSONDecodeError("Expecting ',' or '}'", text, offset)
    return value_offsets


def _skip_value(text: str, offset: int) -> int:
    if text[offset : offset + 1] != "[":
        return _skip_space(text, _DECODER.raw_decode(text, offset)[1])
    ends = deque((end for _, end in _iter_item_spans(text, offset)), maxlen=1)
    return _skip_character(text, ends[0] if ends else offset + 1, "]")


def _iter_item_spans(text: str, offset: int) -> Iterator[tuple[int, int]]:
    offset = _skip_space(text, offset + 1)
    while text[offset : offset + 1] != "]":
        _, end = _DECODER.raw_decode(text, offset)
        yield offset, end
        offset = _skip_space(text, end)
        if text[offset : offset + 1] == ",":
            offset = _skip_space(text, offset + 1)
        elif text[offset : offset + 1] != "]":
            raise json.JSONDecodeError("Expecting ',' or ']'", text, offset)


def _skip_space(text: str, offset: int) -> int:
    found = _SPACE.match(text, offset)
    return found.end() if found else offset


def _skip_character(text: str, offset: int, character: str) -> int:
    offset = _skip_space(text, offset)
    if text[offset : offset + 1] != character:
        raise json.JSONDecodeError(f"Expecting '{character}'", text, offset)
    return _skip_space(text, offset + 1)


def _join_items(
    text: str, records: np.ndarray, items: np.ndarray, mapping: MappingConfig, name: str
) -> LabelFileOffsets:
    """Join each record with the items that name it. Items that name no record are dropped.

    Raises:
        UserError: two records have the same key, or no item at all names a record.
    """

    def read_keys(spans: np.ndarray, key: str, setting: str) -> list[str]:
        found = []
        for start, end in spans.tolist():
            value = parse_json(text[start:end].encode("latin-1"), name, allow_duplicate_keys=True)
            if not isinstance(value, dict) or not isinstance(value.get(key), str | int):
                raise UserError(f"{name}: an item without {key!r}, which mapping.{setting} needs, at byte {start}.")
            found.append(str(value[key]))
        return found

    number_by_key = {key: number for number, key in enumerate(read_keys(records, mapping.join_record, "join_record"))}
    if len(number_by_key) < len(records):
        raise UserError(f"{name}: two records have the same {mapping.join_record!r} (mapping.join_record).")
    named_keys = read_keys(items, mapping.join_item, "join_item")
    numbers = np.fromiter((number_by_key.get(key, -1) for key in named_keys), np.int64, len(named_keys))
    if len(numbers) and not (numbers >= 0).any():
        found = f"{mapping.join_item}={format_untrusted(named_keys[0])}"
        reason = f"{name}: no item of {mapping.join!r} names a record, the first says {found}"
        raise UserError(f"{reason}. Check mapping.join_item and mapping.join_record.")
    order = np.argsort(numbers, kind="stable")[(numbers < 0).sum() :]
    return LabelFileOffsets(records, items[order], np.cumsum(np.bincount(numbers[order], minlength=len(records))))


@lru_cache(maxsize=2)
def _read_unpacked(catalogue: FileCatalogue, file: int) -> bytes:
    """Read and unpack a whole label file of a zip, cached in each process: a zip member has no random access."""
    return catalogue.read(file, catalogue.format_path(file))
