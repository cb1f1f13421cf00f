"""Random access to members of zip files: nothing is unpacked to disk, no file stays open, and no stated size is trusted.

A member is an offset in its file (`archives.py` finds it). So hundreds of thousands of members cost one row of numbers
each, and processes share no file position.
"""

from __future__ import annotations

import io
import stat
import struct
import unicodedata
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path, PurePosixPath
from typing import BinaryIO, cast

from PIL import Image

from lit_vlm.data.decoding import MAX_FILE_BYTES, REMEDY, describe_error
from lit_vlm.data.lazy_images import EncodedImage, format_untrusted
from lit_vlm.types import Fault, RecordError, UserError

UTF8_FLAG = 0x800
_LOCAL_HEADER = struct.Struct("<4s2xHH16xHH")  # signature, flags, method, lengths of name and extra field
_CHUNK_BYTES = 1 << 16


class ZipMemberFlaw(IntEnum):
    """Reason to refuse a zip member. The values are stored in digests."""

    none = 0
    encrypted = 1
    link = 2  # a symbolic link, a device, ...
    elsewhere = 3  # an absolute name, or a name with '..'
    method = 4
    too_large = 5
    ratio = 6
    duplicate = 7

    @property
    def reason(self) -> str:
        """The reason in words, to go after the member's name in an error message."""
        return {
            ZipMemberFlaw.encrypted: "is encrypted",
            ZipMemberFlaw.link: "is a link or a device, no regular file",
            ZipMemberFlaw.elsewhere: "has a name that leads out of the archive",
            ZipMemberFlaw.method: "is compressed by a method that is not read; stored and deflated are",
            ZipMemberFlaw.too_large: f"has more than {MAX_FILE_BYTES:,} bytes",
            ZipMemberFlaw.ratio: "claims to unpack to more than its bytes can hold",
            ZipMemberFlaw.duplicate: "is in the archive twice",
        }.get(self, "")

    @property
    def fault(self) -> Fault:
        """The `Fault` under which the record is counted."""
        faults = {
            ZipMemberFlaw.encrypted: Fault.unreadable,
            ZipMemberFlaw.method: Fault.unreadable,
            ZipMemberFlaw.too_large: Fault.too_large,
        }
        return faults.get(self, Fault.hostile)


@dataclass(frozen=True, slots=True)
class ZipMember:
    """Member of a zip file. `name` is in NFC."""

    archive: Path
    name: str
    offset: int  # of its local header
    compressed_size: int  # bytes
    size: int  # bytes after unpacking, as stated in the directory
    crc: int
    flaw: ZipMemberFlaw = ZipMemberFlaw.none

    @property
    def display_name(self) -> str:
        return f"{self.archive.name}/{self.name}"

    def open(self, origin: str) -> ZipMemberStream:
        """Open a stream of the unpacked bytes.

        Raises:
            RecordError: the member is refused, or is not at the offset that the directory states.
        """
        if self.flaw:
            remedy = "Fix the archive, or set such records aside with data.on_bad_record=quarantine"
            raise RecordError(
                origin, f"{format_untrusted(self.display_name)} {self.flaw.reason}", remedy, self.flaw.fault
            )
        try:
            return ZipMemberStream(self, origin)
        except OSError as error:
            reason = f"{format_untrusted(self.display_name)} cannot be read: {describe_error(error)}"
            raise RecordError(origin, reason, REMEDY, Fault.unreadable) from error

    def read(self, origin: str) -> bytes:
        """Read all unpacked bytes."""
        with self.open(origin) as stream:
            return stream.read()


class ZipMemberStream(io.RawIOBase):
    """Stream of a zip member's bytes, unpacked only as far as they are read: an image's header costs a few kilobytes.

    More or fewer bytes than the directory states, or another checksum, raise a RecordError.
    """

    def __init__(self, member: ZipMember, origin: str) -> None:
        self._member, self._origin = member, origin
        self._num_unread, self._data, self._position, self._is_checked = member.compressed_size, bytearray(), 0, False
        # Kept here, because a decoder that reads this stream may replace the error by its own.
        self.error: RecordError | None = None
        self._file = open(member.archive, "rb")  # noqa: SIM115 - closed with the stream
        try:
            self._decompressor = zlib.decompressobj(-zlib.MAX_WBITS) if self._open_data() else None
        except BaseException:
            self._file.close()
            raise

    def _open_data(self) -> bool:
        """Seek to the compressed bytes, and return True if they are deflated."""
        self._file.seek(self._member.offset)
        header = self._file.read(_LOCAL_HEADER.size)
        if len(header) == _LOCAL_HEADER.size:
            signature, flags, method, name_length, extra_length = _LOCAL_HEADER.unpack(header)
            name = decode_name(self._file.read(name_length), flags)
            if signature == b"PK\x03\x04" and name == self._member.name:
                self._file.seek(extra_length, io.SEEK_CUR)
                return method == zipfile.ZIP_DEFLATED
        raise self._make_error("is not where the archive's directory says", Fault.hostile)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._member.size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        end = self._member.size if size is None or size < 0 else self._position + size
        self._unpack_until(end)
        data = bytes(self._data[self._position : end])
        self._position += len(data)
        return data

    def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def]
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()

    def _unpack_until(self, end: int) -> None:
        member = self._member
        while len(self._data) < min(end, member.size) or (end >= member.size and not self._is_checked):
            if not self._unpack_chunk():
                self._is_checked = True
                self._check_data()

    def _unpack_chunk(self) -> bool:
        """Unpack one more chunk; return False if there is none."""
        member, max_bytes = self._member, self._member.size + 1 - len(self._data)
        try:
            if self._decompressor is None:
                chunk = self._read_compressed(min(_CHUNK_BYTES, max_bytes))
            else:
                pending = self._decompressor.unconsumed_tail or self._read_compressed(_CHUNK_BYTES)
                chunk = (
                    self._decompressor.decompress(pending, max(1, max_bytes)) if pending else self._decompressor.flush()
                )
                if not chunk and not self._decompressor.eof and pending:
                    return True  # this chunk of input gave no output
        except zlib.error as error:
            raise self._make_error(f"cannot be unpacked: {error}", Fault.broken) from None
        self._data += chunk
        if len(self._data) > member.size:
            raise self._make_error(f"unpacks to more than the {member.size:,} bytes that it claims", Fault.hostile)
        return bool(chunk)

    def _read_compressed(self, max_bytes: int) -> bytes:
        data = self._file.read(min(max_bytes, self._num_unread))
        self._num_unread -= len(data)
        return data

    def _check_data(self) -> None:
        if len(self._data) != self._member.size:
            claimed = self._member.size
            raise self._make_error(
                f"ends after {len(self._data):,} of the {claimed:,} bytes that it claims", Fault.broken
            )
        if zlib.crc32(self._data) != self._member.crc:
            raise self._make_error("is damaged: its checksum is another", Fault.broken)

    def _make_error(self, finding: str, fault: Fault) -> RecordError:
        self.error = RecordError(
            self._origin, f"{format_untrusted(self._member.display_name)} {finding}", REMEDY, fault
        )
        return self.error


@dataclass(frozen=True)
class ZipImage(EncodedImage):
    """Image in a zip file. It passes the same checks as an image file."""

    member: ZipMember
    origin: str
    max_pixels: int

    @property
    def name(self) -> str:
        """Name that is unique among the images of its source."""
        return self.member.display_name

    @property
    def _description(self) -> str:  # type: ignore[override]
        return f"image {format_untrusted(self.member.display_name)}"

    def content(self) -> bytes:
        """Return size and checksum from the archive's directory as the content digest. Reading verifies them."""
        return struct.pack("<QL", self.member.size, self.member.crc)

    def _hash(self, stream: BinaryIO) -> bytes:
        return self.content()

    def _open(self) -> BinaryIO:
        return cast(BinaryIO, self.member.open(self.origin))

    @contextmanager
    def _read_image(self, stream: BinaryIO) -> Iterator[Image.Image]:
        try:
            with super()._read_image(stream) as image:
                yield image
        except RecordError as error:
            raise cast(ZipMemberStream, stream).error or error from None


def decode_name(raw: bytes, flags: int) -> str:
    """Decode a member's name to NFC, with slashes. Each name is decoded by itself: one archive may mix encodings."""
    for encoding in ("utf-8",) if flags & UTF8_FLAG else ("utf-8", "cp949"):
        try:
            return _normalize_name(raw.decode(encoding))
        except UnicodeDecodeError:
            continue
    return _normalize_name(raw.decode("cp437"))  # the encoding that the format prescribes; it accepts any bytes


def _normalize_name(name: str) -> str:
    return unicodedata.normalize("NFC", name.replace("\\", "/"))


MAX_COMPRESSION_RATIO = 1100  # limit against zip bombs; deflate expands one byte to at most 1032
_ENCRYPTED_FLAG = 0x1


def iter_members(archive: Path) -> Iterator[ZipMember]:
    """Iterate over the files of a zip, in the order of its directory.

    Raises:
        UserError: it is no zip, or holds zips itself.
    """
    try:
        with zipfile.ZipFile(archive) as directory:
            entries = [entry for entry in directory.infolist() if not entry.is_dir()]
    except (zipfile.BadZipFile, zipfile.LargeZipFile, OSError, ValueError, NotImplementedError, struct.error) as error:
        reason = f"{archive}: cannot be opened as a zip file: {describe_error(error)}"
        raise UserError(f"{reason}. It may be cut off; download it again, or take it away.") from error
    names = [_decode_entry_name(entry) for entry in entries]
    counts = Counter(names)
    if nested_zips := sorted(name for name in counts if name.lower().endswith(".zip")):
        found = ", ".join(nested_zips[:3]) + (", ..." if len(nested_zips) > 3 else "")
        raise UserError(
            f"{archive}: holds zip files itself ({found}). Unpack it once; zips inside zips are not opened."
        )
    for entry, name in zip(entries, names, strict=True):
        flaw = ZipMemberFlaw.duplicate if counts[name] > 1 else _find_flaw(entry, name)
        yield ZipMember(archive, name, entry.header_offset, entry.compress_size, entry.file_size, entry.CRC, flaw)


def _decode_entry_name(entry: zipfile.ZipInfo) -> str:
    # The library reads a name without the UTF-8 flag as CP437, which keeps every byte. Its own `metadata_encoding`
    # applies to a whole archive, and fails at the first name of another encoding.
    raw = entry.orig_filename.encode("utf-8" if entry.flag_bits & UTF8_FLAG else "cp437")
    return decode_name(raw, entry.flag_bits)


def _find_flaw(entry: zipfile.ZipInfo, name: str) -> ZipMemberFlaw:
    mode = entry.external_attr >> 16
    if entry.flag_bits & _ENCRYPTED_FLAG:
        return ZipMemberFlaw.encrypted
    if stat.S_IFMT(mode) not in (0, stat.S_IFREG):
        return ZipMemberFlaw.link
    if name.startswith("/") or ".." in PurePosixPath(name).parts or name[1:2] == ":" or "\0" in name:
        return ZipMemberFlaw.elsewhere
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return ZipMemberFlaw.method
    if entry.file_size > MAX_FILE_BYTES:
        return ZipMemberFlaw.too_large
    if entry.file_size > MAX_COMPRESSION_RATIO * max(1, entry.compress_size):
        return ZipMemberFlaw.ratio
    return ZipMemberFlaw.none
