"""Fingerprints of records: 64-bit hashes of text, image names, and size and modification time of image files."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable

from lit_vlm.data.content import hash_pixels
from lit_vlm.data.images import ArrayImage, BytesImage, FileImage, resolve_image_path
from lit_vlm.types import ControlToken, ImagePlaceholder, LazyImage, Message, PreferencePair, Record, RecordError


def compute_digests(record: Record) -> tuple[int, int]:
    """Compute (digest, group): hash of messages and images, and hash of the images alone (without images: the digest)."""
    pictures = [get_image_key(record, number) for number in range(len(record.images))]
    if isinstance(record, PreferencePair):
        messages = (*record.prompt, record.chosen, record.rejected)
    else:
        messages = record.messages
    digest = _hash_parts([*(part for message in messages for part in _iter_message_bytes(message)), *pictures])
    return digest, _hash_parts(pictures) if pictures else digest


def get_image_key(record: Record, number: int) -> bytes:
    """Get the key of an image within its source: its path, or its content."""
    image = record.images[number]
    match image:
        case FileImage():
            return os.fsencode(image.path)
        case BytesImage():
            return hashlib.blake2b(image.data, digest_size=16).digest()
        case ArrayImage():
            return hash_pixels(image.array)
    name = getattr(image, "name", f"{record.source}/{record.id}#{number}")  # name of an archive member
    return name.encode(errors="surrogatepass")


def compute_stamp(record: Record) -> int:
    """Compute a stamp of the size and modification time of the record's image files; 0 without files."""
    stats = [part for image in record.images for part in _get_size_and_mtime(image)]
    return _hash_parts([repr(stats).encode()]) if any(stats) else 0


def _get_size_and_mtime(image: LazyImage) -> tuple[int, int]:
    member = getattr(image, "member", None)
    try:
        if isinstance(image, FileImage):
            status = _get_file_status(image)
        elif member is not None:
            status = os.stat(member.archive)
        else:
            return 0, 0
    except (OSError, RecordError):  # reading the image reports the error
        return 0, 0
    return status.st_size, status.st_mtime_ns


def _get_file_status(image: FileImage) -> os.stat_result:
    try:
        return os.stat(f"{image.root}/{image.path}")
    except (OSError, ValueError):  # the name has another Unicode form, or does not exist
        return resolve_image_path(image.path, image.root, image.origin).stat()


def _iter_message_bytes(message: Message) -> Iterable[bytes]:
    """Yield the parts of a message for hashing."""
    yield message.role.encode()
    if not message.supervised:
        yield b"untrained"
    for piece in message.content:
        match piece:
            case str():
                yield b"t" + piece.encode(errors="surrogatepass")
            case ControlToken():
                yield b"c" + piece.token.encode()
            case ImagePlaceholder():
                yield b"i%d" % piece.index


def _hash_parts(parts: Iterable[bytes]) -> int:
    return int.from_bytes(hashlib.blake2b(b"\x1f".join(parts), digest_size=8).digest(), "big")
