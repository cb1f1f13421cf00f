"""Parser of tar entries: it reads a member's headers and checks them. Nothing is extracted, no member is trusted.

Headers are parsed here and not by `tarfile`, which takes a damaged header for the archive's end, renames members as their
extended headers say, and follows links. Format: "pax Interchange Format" of POSIX.1-2017, and GNU tar's manual, "Basic Tar
Format".
"""

from __future__ import annotations

import re
import tarfile
from dataclasses import dataclass, replace
from typing import BinaryIO, NamedTuple

from lit_vlm.data.decoding import MAX_FILE_BYTES
from lit_vlm.types import Fault

BLOCK_BYTES = tarfile.BLOCKSIZE  # bytes
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "avif")
TEXT_SUFFIXES = ("txt", "json")
_REGULAR_TYPES = (tarfile.REGTYPE, tarfile.AREGTYPE)
_EXTENDED_HEADER_TYPES = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_TYPE_REASONS = {
    tarfile.LNKTYPE: "is a hard link",
    tarfile.SYMTYPE: "is a symbolic link",
    tarfile.CHRTYPE: "is a device",
    tarfile.BLKTYPE: "is a device",
    tarfile.FIFOTYPE: "is a named pipe",
    tarfile.GNUTYPE_SPARSE: "is a sparse file",
    tarfile.XGLTYPE: "is an extended header that would rename or resize all members after it",
}
_TYPES_WITHOUT_DATA = (
    tarfile.LNKTYPE,
    tarfile.SYMTYPE,
    tarfile.CHRTYPE,
    tarfile.BLKTYPE,
    tarfile.FIFOTYPE,
    tarfile.DIRTYPE,
)
_MAX_EXTENDED_HEADER_BYTES = 1 << 16  # bytes of one extended header
_MAX_HEADERS = 16  # headers of one member
_CONTROL_CHARACTER = re.compile(r"[\x00-\x1f\x7f]")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*:")  # C:, pipe:, http:
# Keys of pax headers that change neither name nor data.
_COMMENT_KEYS = (b"comment", b"mtime", b"atime", b"ctime", b"uname", b"gname", b"uid", b"gid")


@dataclass(frozen=True, slots=True)
class TarEntryFlaw:
    """Reason to refuse an entry; it goes after the entry's name in an error message."""

    reason: str
    fault: Fault = Fault.hostile


@dataclass(frozen=True, slots=True)
class TarEntry:
    """Entry of a tar file, from its first header to the start of the next entry.

    `name` may hold anything if there is a flaw.
    """

    start: int
    name: str
    offset: int  # of its data
    size: int  # bytes
    end: int  # offset of the next entry; -1: unknown
    is_folder: bool = False
    flaw: TarEntryFlaw | None = None

    @property
    def key(self) -> str:
        """The key in WebDataset's sense: the path up to the first dot of its last component."""
        folder, slash, last = self.name.rpartition("/")
        return f"{folder}{slash}{last.partition('.')[0]}"

    @property
    def extension(self) -> str:
        """The part after the key's dot, in lower case: `jpg`, `0.png`."""
        return self.name.rpartition("/")[2].partition(".")[2].lower()

    @property
    def suffix(self) -> str:
        """The part after the last dot of the extension: `png` of `0.png`."""
        return self.extension.rpartition(".")[2]


class _TarHeader(NamedTuple):
    """The fields of one header block that are needed here."""

    name: bytes
    type: bytes
    size: int
    has_nul: bool  # its name holds a NUL byte

    @property
    def text(self) -> str:
        return self.name.decode("utf-8", "surrogateescape")


class _BrokenArchiveError(Exception):
    """The archive cannot be read beyond this offset."""

    def __init__(self, reason: str, fault: Fault = Fault.malformed) -> None:
        self.flaw = TarEntryFlaw(reason, fault)


def read_entry(stream: BinaryIO, start: int, archive_size: int) -> TarEntry | None:
    """Read the entry whose headers begin at the byte `start`.

    Returns:
        The entry, with the reason to refuse it in `flaw`; None at the archive's end.
    """
    stream.seek(start)
    try:
        return _parse_entry(stream, start, archive_size)
    except _BrokenArchiveError as error:
        return TarEntry(start, "", start, 0, -1, flaw=error.flaw)


def _parse_entry(stream: BinaryIO, start: int, archive_size: int) -> TarEntry | None:
    offset, long_name, flaw = start, None, None
    for _ in range(_MAX_HEADERS):
        stream.seek(offset)
        block = stream.read(BLOCK_BYTES)
        if offset == start and block.count(0) == len(block):
            return _check_archive_end(stream, len(block))
        header = _parse_header(block)
        offset += BLOCK_BYTES
        if header.type not in _EXTENDED_HEADER_TYPES:
            entry = TarEntry(start, header.text, offset, header.size, offset, flaw=flaw)
            return _check_entry(header, entry, long_name, archive_size)
        data = _read_extended_header(stream, header.size, archive_size - offset)
        offset += _pad_to_block(header.size)
        if header.type == tarfile.XGLTYPE:
            if any(key not in _COMMENT_KEYS for key in _parse_pax_records(data)):
                return TarEntry(start, header.text, offset, 0, offset, flaw=TarEntryFlaw(_TYPE_REASONS[header.type]))
            start = offset  # this header is only a comment, so the entry begins after it
        elif header.type == tarfile.GNUTYPE_LONGNAME:
            long_name = data.rstrip(b"\0")
        elif header.type == tarfile.XHDTYPE:
            records = _parse_pax_records(data)
            long_name, flaw = records.get(b"path", long_name), flaw or _find_pax_flaw(records)
    raise _BrokenArchiveError(f"more than {_MAX_HEADERS} extended headers in a row", Fault.hostile)


def _parse_header(block: bytes) -> _TarHeader:
    if len(block) < BLOCK_BYTES:
        raise _BrokenArchiveError("the archive ends within a header; it is cut off", Fault.broken)
    try:
        size, checksum = tarfile.nti(block[124:136]), tarfile.nti(block[148:156])  # type: ignore[attr-defined]
    except tarfile.HeaderError:
        size = checksum = -1
    if checksum != sum(block) - sum(block[148:156]) + 8 * ord(" "):
        raise _BrokenArchiveError("no member's header is there (wrong checksum or size); nothing behind it can be read")
    if size < 0:
        raise _BrokenArchiveError("its size is below zero; nothing behind it can be read", Fault.hostile)
    name, _, after_nul = block[:100].partition(b"\0")
    prefix = block[345:500].partition(b"\0")[0] if block[257:263] == b"ustar\0" else b""
    type_flag = block[156:157]
    if type_flag == tarfile.AREGTYPE and name.endswith(b"/"):  # old archives mark a folder by this, not by a type
        type_flag = tarfile.DIRTYPE
    return _TarHeader(prefix + b"/" + name if prefix else name, type_flag, size, bool(after_nul.strip(b"\0")))


def _read_extended_header(stream: BinaryIO, size: int, num_bytes_left: int) -> bytes:
    if size > min(num_bytes_left, _MAX_EXTENDED_HEADER_BYTES):
        raise _BrokenArchiveError(f"has an extended header of {size:,} bytes", Fault.hostile)
    return stream.read(size)


def _parse_pax_records(data: bytes) -> dict[bytes, bytes]:
    """Parse the records of a pax header: `length key=value`, where length counts the bytes of the whole record."""
    records = {}
    while data.strip(b"\0"):
        length, space, _ = data.partition(b" ")
        if not (space and length.isdigit() and len(length) < 7 and len(length) + 2 < int(length) <= len(data)):
            raise _BrokenArchiveError("has an extended header that cannot be parsed", Fault.hostile)
        key, _, value = data[len(length) + 1 : int(length) - 1].partition(b"=")
        records[key] = value
        data = data[int(length) :]
    return records


def _find_pax_flaw(records: dict[bytes, bytes]) -> TarEntryFlaw | None:
    if any(key.startswith(b"GNU.sparse") for key in records):
        return TarEntryFlaw("is a sparse file")
    moving = sorted(key.decode(errors="replace") for key in records if key in (b"size", b"linkpath", b"hdrcharset"))
    return TarEntryFlaw(f"has an extended header that changes its {', '.join(moving)}") if moving else None


def _check_entry(header: _TarHeader, entry: TarEntry, long_name: bytes | None, archive_size: int) -> TarEntry:
    flaw = entry.flaw
    if long_name is not None:
        if not _is_shortened_name(header.name, long_name):
            new_name = long_name[:200].decode(errors="replace")
            flaw = flaw or TarEntryFlaw(f"is renamed by an extended header, to {new_name!r}")
        entry = replace(entry, name=long_name.decode("utf-8", "surrogateescape"))
    if header.type == tarfile.DIRTYPE:
        return replace(entry, size=0, is_folder=True, flaw=flaw or _find_name_flaw(entry.name))
    if header.type in _TYPES_WITHOUT_DATA:
        return replace(entry, size=0, flaw=TarEntryFlaw(_TYPE_REASONS[header.type]))
    entry = TarEntry(
        entry.start, entry.name, entry.offset, entry.size, entry.offset + _pad_to_block(entry.size), flaw=entry.flaw
    )
    if entry.offset + entry.size > archive_size:
        reason = f"is said to have {entry.size:,} bytes, but the archive ends before"
        return replace(entry, end=-1, flaw=TarEntryFlaw(reason, Fault.broken))
    if header.type not in _REGULAR_TYPES:
        return replace(
            entry, flaw=TarEntryFlaw(_TYPE_REASONS.get(header.type, f"is of the unknown type {header.type!r}"))
        )
    if header.has_nul:
        flaw = flaw or TarEntryFlaw("has a NUL within its name")
    flaw = flaw or _find_name_flaw(entry.name) or _find_file_flaw(entry)
    return entry if flaw is None else replace(entry, flaw=flaw)


def _is_shortened_name(short: bytes, long_name: bytes) -> bool:
    """Return True if a header's own name is the truncated long name, as writers of tar files leave it there."""
    plain = long_name.decode("utf-8", "replace").encode("ascii", "replace")  # Python's form of names that are not ASCII
    return short == long_name or short in (long_name[:100], long_name[:99], plain[:100])


def _find_name_flaw(name: str) -> TarEntryFlaw | None:
    try:
        name.encode()
    except UnicodeEncodeError:
        return TarEntryFlaw("has a name that is no UTF-8")
    if not name or _CONTROL_CHARACTER.search(name):
        return TarEntryFlaw("has a name with control characters" if name else "has no name")
    if name.startswith("/") or ".." in name.split("/"):
        return TarEntryFlaw("has a name that leads out of the archive")
    if "\\" in name or _SCHEME.match(name):
        return TarEntryFlaw("has a name with a backslash, a drive or a scheme")
    return None


def _find_file_flaw(entry: TarEntry) -> TarEntryFlaw | None:
    if not entry.key.rpartition("/")[2]:
        return TarEntryFlaw("has no key before its first dot", Fault.malformed)
    if entry.suffix not in IMAGE_SUFFIXES + TEXT_SUFFIXES:
        return TarEntryFlaw(
            f"ends in '.{entry.extension}'; only .{', .'.join(IMAGE_SUFFIXES + TEXT_SUFFIXES)} are read"
        )
    if entry.size > MAX_FILE_BYTES:
        return TarEntryFlaw(f"has {entry.size:,} bytes, at most {MAX_FILE_BYTES:,} are read", Fault.too_large)
    return None


def _check_archive_end(stream: BinaryIO, num_bytes: int) -> TarEntry | None:
    """Check that the archive ends with a block of zeros and that only zeros follow."""
    if num_bytes < BLOCK_BYTES:
        raise _BrokenArchiveError("the archive ends without its end mark; it may be cut off", Fault.broken)
    while rest := stream.read(1 << 20):
        if rest.count(0) != len(rest):
            raise _BrokenArchiveError(
                "bytes follow the archive's end; archives joined into one are not read", Fault.hostile
            )
    return None


def _pad_to_block(size: int) -> int:
    return -(-size // BLOCK_BYTES) * BLOCK_BYTES
