"""Random access to members of zip files: nothing is unpacked to disk, no file stays open, and no stated size is trusted.

A member is an offset in its file (`archives.py` finds it). So hundreds of thousands of members cost one row of numbers
each, and processes share no file position.
"""

from __future__ import annotations

import io
import struct
import unicodedata
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import BinaryIO, cast

from PIL import Image

from lit_vlm.data.decoding import MAX_FILE_BYTES, REMEDY, cause, parsed
from lit_vlm.data.images import EncodedImage, shown
from lit_vlm.types import Fault, RecordError

UTF8_FLAG = 0x800
_LOCAL = struct.Struct("<4s2xHH16xHH")  # signature, flags, method, lengths of name and extra field
_CHUNK = 1 << 16


class Flaw(IntEnum):
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
    def meaning(self) -> str:
        """The reason in words, to go after the member's name in an error message."""
        return {
            Flaw.encrypted: "is encrypted",
            Flaw.link: "is a link or a device, no regular file",
            Flaw.elsewhere: "has a name that leads out of the archive",
            Flaw.method: "is compressed by a method that is not read; stored and deflated are",
            Flaw.too_large: f"has more than {MAX_FILE_BYTES:,} bytes",
            Flaw.ratio: "claims to unpack to more than its bytes can hold",
            Flaw.duplicate: "is in the archive twice",
        }.get(self, "")

    @property
    def fault(self) -> Fault:
        """The `Fault` under which the record is counted."""
        faults = {Flaw.encrypted: Fault.unreadable, Flaw.method: Fault.unreadable, Flaw.too_large: Fault.too_large}
        return faults.get(self, Fault.hostile)


@dataclass(frozen=True, slots=True)
class Member:
    """Member of a zip file. `name` is in NFC."""

    archive: Path
    name: str
    offset: int  # of its local header
    packed: int  # bytes
    size: int  # bytes after unpacking, as stated in the directory
    crc: int
    flaw: Flaw = Flaw.none

    @property
    def shown(self) -> str:
        return f"{self.archive.name}/{self.name}"

    def open(self, origin: str) -> MemberStream:
        """Open a stream of the unpacked bytes.

        Raises:
            RecordError: the member is refused, or is not at the offset that the directory states.
        """
        if self.flaw:
            remedy = "Fix the archive, or set such records aside with data.on_bad_record=quarantine"
            raise RecordError(origin, f"{shown(self.shown)} {self.flaw.meaning}", remedy, self.flaw.fault)
        try:
            return MemberStream(self, origin)
        except OSError as error:
            reason = f"{shown(self.shown)} cannot be read: {cause(error)}"
            raise RecordError(origin, reason, REMEDY, Fault.unreadable) from error

    def read(self, origin: str) -> bytes:
        """Read all unpacked bytes."""
        with self.open(origin) as stream:
            return stream.read()


class MemberStream(io.RawIOBase):
    """Stream of a zip member's bytes, unpacked only as far as they are read: an image's header costs a few kilobytes.

    More or fewer bytes than the directory states, or another checksum, raise a RecordError.
    """

    def __init__(self, member: Member, origin: str) -> None:
        self._member, self._origin = member, origin
        self._left, self._data, self._at, self._whole = member.packed, bytearray(), 0, False
        # Kept here, because a decoder that reads this stream may replace the error by its own.
        self.fault: RecordError | None = None
        self._file = open(member.archive, "rb")  # noqa: SIM115 - closed with the stream
        try:
            self._inflate = zlib.decompressobj(-zlib.MAX_WBITS) if self._enter() else None
        except BaseException:
            self._file.close()
            raise

    def _enter(self) -> bool:
        """Seek to the compressed bytes, and return True if they are deflated."""
        self._file.seek(self._member.offset)
        header = self._file.read(_LOCAL.size)
        if len(header) == _LOCAL.size:
            signature, flags, method, name_length, extra_length = _LOCAL.unpack(header)
            name = decoded_name(self._file.read(name_length), flags)
            if signature == b"PK\x03\x04" and name == self._member.name:
                self._file.seek(extra_length, io.SEEK_CUR)
                return method == zipfile.ZIP_DEFLATED
        raise self._fault("is not where the archive's directory says", Fault.hostile)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._member.size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        end = self._member.size if size is None or size < 0 else self._at + size
        self._unpack_to(end)
        data = bytes(self._data[self._at : end])
        self._at += len(data)
        return data

    def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def]
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()

    def _unpack_to(self, end: int) -> None:
        member = self._member
        while len(self._data) < min(end, member.size) or (end >= member.size and not self._whole):
            if not self._grow():
                self._whole = True
                self._check()

    def _grow(self) -> bool:
        """Unpack one more chunk; return False if there is none."""
        member, max_bytes = self._member, self._member.size + 1 - len(self._data)
        try:
            if self._inflate is None:
                chunk = self._packed(min(_CHUNK, max_bytes))
            else:
                pending = self._inflate.unconsumed_tail or self._packed(_CHUNK)
                chunk = self._inflate.decompress(pending, max(1, max_bytes)) if pending else self._inflate.flush()
                if not chunk and not self._inflate.eof and pending:
                    return True  # this chunk of input gave no output
        except zlib.error as error:
            raise self._fault(f"cannot be unpacked: {error}", Fault.broken) from None
        self._data += chunk
        if len(self._data) > member.size:
            raise self._fault(f"unpacks to more than the {member.size:,} bytes that it claims", Fault.hostile)
        return bool(chunk)

    def _packed(self, most: int) -> bytes:
        data = self._file.read(min(most, self._left))
        self._left -= len(data)
        return data

    def _check(self) -> None:
        if len(self._data) != self._member.size:
            claimed = self._member.size
            raise self._fault(f"ends after {len(self._data):,} of the {claimed:,} bytes that it claims", Fault.broken)
        if zlib.crc32(self._data) != self._member.crc:
            raise self._fault("is damaged: its checksum is another", Fault.broken)

    def _fault(self, finding: str, fault: Fault) -> RecordError:
        self.fault = RecordError(self._origin, f"{shown(self._member.shown)} {finding}", REMEDY, fault)
        return self.fault


@dataclass(frozen=True)
class ZipImage(EncodedImage):
    """Image in a zip file. It passes the same checks as an image file."""

    member: Member
    origin: str
    max_pixels: int

    @property
    def name(self) -> str:
        """Name that is unique among the images of its source."""
        return self.member.shown

    @property
    def _what(self) -> str:  # type: ignore[override]
        return f"image {shown(self.member.shown)}"

    def content(self) -> bytes:
        """Return size and checksum from the archive's directory as the content digest. Reading verifies them."""
        return struct.pack("<QL", self.member.size, self.member.crc)

    @contextmanager
    def _parsed(self) -> Iterator[tuple[Image.Image, BinaryIO]]:
        with self.member.open(self.origin) as stream:
            binary = cast(BinaryIO, stream)
            try:
                with parsed(binary, self._what, self.origin, self.max_pixels) as image:
                    yield image, binary
            except RecordError as error:
                raise stream.fault or error from None


def decoded_name(raw: bytes, flags: int) -> str:
    """Decode a member's name to NFC, with slashes. Each name is decoded by itself: one archive may mix encodings."""
    for encoding in ("utf-8",) if flags & UTF8_FLAG else ("utf-8", "cp949"):
        try:
            return _tidy(raw.decode(encoding))
        except UnicodeDecodeError:
            continue
    return _tidy(raw.decode("cp437"))  # the encoding that the format prescribes; it accepts any bytes


def _tidy(name: str) -> str:
    return unicodedata.normalize("NFC", name.replace("\\", "/"))
