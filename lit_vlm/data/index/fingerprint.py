"""Fingerprints of records: 64-bit hashes of text, image names, and size and modification time of image files."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable

from lit_vlm.data.content import digest_of_pixels
from lit_vlm.data.images import ArrayImage, BytesImage, FileImage, locate
from lit_vlm.types import Control, ImageSlot, ImageSource, Message, PreferencePair, Record, RecordError


def digests(record: Record) -> tuple[int, int]:
    """Compute (digest, group): hash of messages and images, and hash of the images alone (without images: the digest)."""
    pictures = [picture_name(record, number) for number in range(len(record.images))]
    if isinstance(record, PreferencePair):
        messages = (*record.prompt, record.chosen, record.rejected)
    else:
        messages = record.messages
    digest = _number([*(part for message in messages for part in _words(message)), *pictures])
    return digest, _number(pictures) if pictures else digest


def picture_name(record: Record, number: int) -> bytes:
    """Get the key of an image within its source: its path, or its content."""
    image = record.images[number]
    match image:
        case FileImage():
            return os.fsencode(image.path)
        case BytesImage():
            return hashlib.blake2b(image.data, digest_size=16).digest()
        case ArrayImage():
            return digest_of_pixels(image.array)
    name = getattr(image, "name", f"{record.source}/{record.id}#{number}")  # name of an archive member
    return name.encode(errors="surrogatepass")


def stamp(record: Record) -> int:
    """Compute a stamp of the size and modification time of the record's image files; 0 without files."""
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
    except (OSError, RecordError):  # reading the image reports the error
        return 0, 0
    return status.st_size, status.st_mtime_ns


def _file_status(image: FileImage) -> os.stat_result:
    try:
        return os.stat(f"{image.root}/{image.path}")
    except (OSError, ValueError):  # the name has another Unicode form, or does not exist
        return locate(image.path, image.root, image.origin).stat()


def _words(message: Message) -> Iterable[bytes]:
    """Yield the parts of a message for hashing."""
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
