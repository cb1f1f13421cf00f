"""Random access to WebDataset tar shards: a sample's members share a key, and are read in place.

One pass over the headers finds the offsets of the entries of each key (they need not be adjacent). Only that table is
stored. A read parses the headers again, so a refused member is named when its sample is read.
"""

from __future__ import annotations

import hashlib
import io
import time
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from lit_vlm.data.decoding import REMEDY
from lit_vlm.data.lazy_images import EncodedImage, format_untrusted
from lit_vlm.data.readers.context import EmbeddedImage
from lit_vlm.data.readers.formats import detect_record_format
from lit_vlm.data.readers.rows.base import Hasher, get_file_identity
from lit_vlm.data.readers.rows.json_files import parse_record
from lit_vlm.data.readers.rows.offset_cache import StoredArray, load_or_scan
from lit_vlm.data.readers.rows.tar_headers import IMAGE_SUFFIXES, TarEntry, read_entry
from lit_vlm.types import Fault, RecordError, UserError

MAX_MEMBERS_PER_KEY = 256  # of one key
_PARSED_SECONDS = 0.1  # for which the headers of a row serve after its origin; later they are parsed again
_REPACK_REMEDY = "Pack the archive again from plain files, or set such records aside with data.on_bad_record=quarantine"
_COMPRESSION_TOOLS = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}


class TarMemberStream(io.RawIOBase):
    """Stream of a byte range of a file."""

    def __init__(self, path: Path, offset: int, size: int) -> None:
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed with the stream
        self._offset, self._size, self._position = offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def]
        self._file.seek(self._offset + self._position)
        data = self._file.read(max(0, min(len(buffer), self._size - self._position)))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


@dataclass(frozen=True)
class TarMember(EmbeddedImage):
    """Image member of a tar file, as a row carries it."""

    archive: Path
    name: str
    offset: int
    size: int  # bytes

    def make_image(self, origin: str, max_pixels: int) -> TarImage:
        return TarImage(self, origin, max_pixels)


@dataclass(frozen=True)
class TarImage(EncodedImage):
    """Image in a tar file. It passes the same checks as an image file."""

    member: TarMember
    origin: str
    max_pixels: int

    @property
    def name(self) -> str:
        """Name that is unique among the images of its source."""
        return f"{self.member.archive.name}/{self.member.name}"

    @property
    def _description(self) -> str:  # type: ignore[override]
        return f"image {format_untrusted(self.member.name)}"

    def _open(self) -> BinaryIO:
        member = self.member
        try:
            return io.BufferedReader(TarMemberStream(member.archive, member.offset, member.size))
        except OSError as error:
            reason = f"{self._description} cannot be opened: {error.strerror}"
            raise RecordError(self.origin, reason, REMEDY, Fault.unreadable) from error


class TarRows:
    """Rows of one tar file: a row for each sample, in the order in which their keys first appear.

    Args:
        table: [1 + (S + 1) + M, 1]: the number of samples S, the start of each sample's entries (S + 1 bounds), then the
            byte offsets of the M entries.
    """

    def __init__(self, path: Path, table: StoredArray) -> None:
        self.path, self._table = path, table
        self._last = (-1, "")  # the last read row and its origin, which the caller needs together
        # Row of the last origin, time, origin and entries, which serve once
        self._parsed: tuple[int, float, str, list[TarEntry]] = (-1, 0.0, "", [])

    def __len__(self) -> int:
        return int(self._table.array[0, 0])

    def get_origin(self, index: int) -> str:
        last, origin = self._last
        if index == last:
            return origin
        try:
            with open(self.path, "rb") as stream:
                entries = self._read_entries(stream, index)
                origin = self._format_origin(entries)
                self._last, self._parsed = (index, origin), (index, time.monotonic(), origin, entries)
                return origin
        except OSError:
            return f"{self.path.name}[{index}]"

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            with open(self.path, "rb") as stream:
                row, parsed_at, origin, entries = self._parsed
                if row != index or time.monotonic() - parsed_at > _PARSED_SECONDS:
                    entries = self._read_entries(stream, index)
                    origin = self._format_origin(entries)
                    self._last = index, origin
                self._parsed = (-1, 0.0, "", [])
                return _read_row(self.path, entries, origin, stream)
        except OSError as error:
            reason = f"{self.path} cannot be read: {error.strerror}"
            raise RecordError(f"{self.path.name}[{index}]", reason, REMEDY, Fault.unreadable) from error

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_parsed": (-1, 0.0, "", [])}

    def update_hash(self, hasher: Hasher, start: int, stop: int) -> None:
        """Update the hasher with the file's identity and the row numbers: an unchanged file has unchanged samples."""
        hasher.update(repr((get_file_identity(self.path), start, stop)).encode())

    def _format_origin(self, entries: Sequence[TarEntry]) -> str:
        first = entries[0]
        has_name = first.name and not (first.flaw and first.flaw.fault is Fault.broken)
        return f"{self.path.name}/{first.key or first.name}" if has_name else f"{self.path.name} at byte {first.start}"

    def _read_entries(self, stream: BinaryIO, index: int) -> list[TarEntry]:
        """Read the headers of a sample's entries: at least 1, at most MAX_MEMBERS_PER_KEY + 1."""
        table, size = self._table.array[:, 0], stream.seek(0, io.SEEK_END)
        first, last = table[1 + index : 3 + index].tolist()
        starts = table[len(self) + 2 :][first : min(last, first + MAX_MEMBERS_PER_KEY + 1)]
        found = [read_entry(stream, int(start), size) for start in starts]
        if any(entry is None for entry in found):
            reason = "is not what it was when it was opened"
            raise RecordError(
                f"{self.path.name}[{index}]", reason, "Start again when nothing writes to it", Fault.changed
            )
        return [entry for entry in found if entry is not None]


def open_tar(path: Path, cache_dir: Path | None = None) -> TarRows:
    """Open a tar file; raise a UserError if it is none or is compressed.

    A damaged or hostile member is an error of its own sample, not of the file.
    """
    with open(path, "rb") as stream:
        head = stream.read(8)
        for magic, tool in _COMPRESSION_TOOLS.items():
            if head.startswith(magic):
                raise UserError(
                    f"{path}: is compressed, so its members cannot be reached one by one. "
                    f"Unpack it to a plain .tar once (`{tool}`); pictures hardly shrink."
                )
        first = read_entry(stream, 0, stream.seek(0, io.SEEK_END))
    if first is not None and first.flaw is not None and first.end < 0:
        raise UserError(f"{path}: cannot be read as a tar file: {first.flaw.reason}. Repair or replace it.")
    return TarRows(path, load_or_scan(path, cache_dir, "tar", 1, _build_table))


def _build_table(path: Path) -> Iterator[np.ndarray]:
    keys, starts = array("Q"), array("q")
    with open(path, "rb") as stream:
        offset, size = 0, stream.seek(0, io.SEEK_END)
        while offset >= 0 and (entry := read_entry(stream, offset, size)) is not None:
            offset = entry.end
            if not entry.is_folder or entry.flaw:
                keys.append(_hash_key(entry))
                starts.append(entry.start)
    yield _group_by_key(np.array(keys, np.uint64), np.array(starts, np.int64))


def _hash_key(entry: TarEntry) -> int:
    # An entry without a key is a sample of its own.
    key = entry.key.encode("utf-8", "surrogateescape") or str(entry.start).encode() + b"/"
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")


def _group_by_key(keys: np.ndarray, starts: np.ndarray) -> np.ndarray:
    _, first, sample, counts = np.unique(keys, return_index=True, return_inverse=True, return_counts=True)
    order = np.argsort(first)  # by first appearance
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    bounds = np.concatenate(([len(order), 0], np.cumsum(counts[order])))
    return np.concatenate((bounds, starts[np.argsort(rank[sample], kind="stable")]))[:, None]


def _read_row(path: Path, entries: Sequence[TarEntry], origin: str, stream: BinaryIO) -> dict[str, Any]:
    _check_entries(entries, origin)
    images = sorted((entry for entry in entries if entry.suffix in IMAGE_SUFFIXES), key=lambda entry: entry.name)
    texts = {ending: [entry for entry in entries if entry.suffix == ending] for ending in ("txt", "json")}
    for ending, members in texts.items():
        if len(members) > 1:
            raise RecordError(origin, f"{len(members)} .{ending} members of one key; one is read", _REPACK_REMEDY)
    row: dict[str, Any] = {}
    if texts["json"]:
        row = parse_record(_read_bytes(stream, texts["json"][0]), origin)
    if texts["txt"] and detect_record_format(row) in (
        None,
        "caption",
    ):  # the .json next to it is metadata of the downloader
        row = {
            "id": row.get("id"),
            "caption": _decode_text(_read_bytes(stream, texts["txt"][0]), texts["txt"][0], origin),
        }
    if not texts["txt"] and not texts["json"]:
        raise RecordError(origin, "a picture without a .txt or .json of its key", _REPACK_REMEDY, Fault.no_answer)
    record_id = row.get("id")
    identified = {"id": f"{path.stem}/{entries[0].key}" if record_id is None or record_id == "" else record_id}
    rest = {key: value for key, value in row.items() if key not in ("id", "image", "images")}
    return {**identified, **rest, "images": [TarMember(path, entry.name, entry.offset, entry.size) for entry in images]}


def _check_entries(entries: Sequence[TarEntry], origin: str) -> None:
    """Raise a RecordError for a sample with a refused member, a duplicate one, or too many members."""
    for entry in entries:
        if entry.flaw:
            reason = f"member {format_untrusted(entry.name)} {entry.flaw.reason}" if entry.name else entry.flaw.reason
            raise RecordError(origin, reason, _REPACK_REMEDY, entry.flaw.fault)
    if len(entries) > MAX_MEMBERS_PER_KEY:
        raise RecordError(origin, f"more than {MAX_MEMBERS_PER_KEY} members of one key", _REPACK_REMEDY, Fault.hostile)
    names = [entry.name for entry in entries]
    duplicate = next((name for name in names if names.count(name) > 1), None)
    if duplicate:
        raise RecordError(
            origin, f"member {format_untrusted(duplicate)} is in the archive twice", _REPACK_REMEDY, Fault.hostile
        )
    if len({entry.key for entry in entries}) > 1:
        raise RecordError(origin, "is not what it was when it was opened", _REPACK_REMEDY, Fault.changed)


def _read_bytes(stream: BinaryIO, entry: TarEntry) -> bytes:
    stream.seek(entry.offset)
    return stream.read(entry.size)


def _decode_text(data: bytes, entry: TarEntry, origin: str) -> str:
    try:
        return data.decode().removeprefix("\ufeff").strip("\r\n")
    except UnicodeDecodeError as error:
        reason = f"member {format_untrusted(entry.name)} is not UTF-8 at byte {error.start + 1}"
        raise RecordError(origin, reason, REMEDY) from None
