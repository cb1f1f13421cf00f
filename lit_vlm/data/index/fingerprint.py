"""What a record says, which pictures it has, and whether their files are the ones that were read: as 64-bit numbers."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable

from lit_vlm.data.content import digest_of_pixels
from lit_vlm.data.images import ArrayImage, BytesImage, FileImage, locate
from lit_vlm.types import Control, ImageSlot, ImageSource, Message, PreferencePair, Record, RecordError


def digests(record: Record) -> tuple[int, int]:
    """(digest, group): of messages and pictures; and of the pictures alone, where there are some, else the same."""
    pictures = [picture_name(record, number) for number in range(len(record.images))]
    if isinstance(record, PreferencePair):
        messages = (*record.prompt, record.chosen, record.rejected)
    else:
        messages = record.messages
    digest = _number([*(part for message in messages for part in _words(message)), *pictures])
    return digest, _number(pictures) if pictures else digest


def picture_name(record: Record, number: int) -> bytes:
    """What tells a record's picture from others of its source: its path, or its content."""
    image = record.images[number]
    match image:
        case FileImage():
            return os.fsencode(image.path)
        case BytesImage():
            return hashlib.blake2b(image.data, digest_size=16).digest()
        case ArrayImage():
            return digest_of_pixels(image.array)
    name = getattr(image, "name", f"{record.source}/{record.id}#{number}")  # of an archive's member
    return name.encode(errors="surrogatepass")


def stamp(record: Record) -> int:
    """Another one when a picture's file is another: by size and time of change. 0 where nothing lies in files."""
    stats = [part for image in record.images for part in _status(image)]
    return _number([repr(stats).encode()]) if any(stats) else 0


def _status(image: ImageSource) -> tuple[int, int]:
    member = getattr(image, "member", None)
    try:
        if isinstance(image, FileImage):
            status = _file_status(image)
        elif member is not None:
            status = os.stat(member.archive)
        else:
            return 0, 0
    except (OSError, RecordError):  # whoever reads it says why
        return 0, 0
    return status.st_size, status.st_mtime_ns


def _file_status(image: FileImage) -> os.stat_result:
    try:
        return os.stat(f"{image.root}/{image.path}")
    except (OSError, ValueError):  # under another spelling of its name, or not at all
        return locate(image.path, image.root, image.origin).stat()


def _words(message: Message) -> Iterable[bytes]:
    yield message.role.encode()
    if not message.trained:
        yield b"untrained"
    for piece in message.content:
        match piece:
            case str():
                yield b"t" + piece.encode(errors="surrogatepass")
            case Control():
                yield b"c" + piece.token.encode()
            case ImageSlot():
                yield b"i%d" % piece.index


def _number(parts: Iterable[bytes]) -> int:
    return int.from_bytes(hashlib.blake2b(b"\x1f".join(parts), digest_size=8).digest(), "big")
