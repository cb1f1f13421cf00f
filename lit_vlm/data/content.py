"""Content hashes of images, computed from their bytes alone: independent of file name and modification time."""

from __future__ import annotations

import hashlib
import os
from typing import BinaryIO

import numpy as np

from lit_vlm.types import ImageSource, Record

BLOCKS, BLOCK_BYTES = 4, 1 << 14  # files that are no longer than all blocks together are read completely


def content_of(record: Record) -> int:
    """Compute a 64-bit content hash of the record's images; 0 without images.

    Raises:
        RecordError: an image cannot be read.
    """
    if not record.images:
        return 0
    contents = [_content(image) for image in record.images]
    return int.from_bytes(hashlib.blake2b(b"".join(contents), digest_size=8).digest(), "big")


def digest_of_stream(stream: BinaryIO) -> bytes:
    """Hash a file by its length and by blocks spread over it, which include the first and the last bytes.

    Images that were encoded again differ in length or nearly everywhere, and a PNG ends with a checksum of its pixels.
    Not detected: a few bytes in the middle of a longer file that were changed in place. BMP is not compressed, so it is
    hashed completely.
    """
    size = stream.seek(0, os.SEEK_END)
    hasher = hashlib.blake2b(size.to_bytes(8, "big"), digest_size=16)
    stream.seek(0)
    first = stream.read(BLOCK_BYTES)
    hasher.update(first)
    if size <= BLOCKS * BLOCK_BYTES or first.startswith(b"BM"):
        hasher.update(stream.read())
        return hasher.digest()
    for number in range(1, BLOCKS):
        stream.seek((size - BLOCK_BYTES) * number // (BLOCKS - 1))
        hasher.update(stream.read(BLOCK_BYTES))
    return hasher.digest()


def digest_of_pixels(pixels: np.ndarray) -> bytes:
    """Hash decoded pixels and their shape: 16 bytes."""
    return hashlib.blake2b(f"{pixels.shape}".encode() + pixels.tobytes(), digest_size=16).digest()


def _content(image: ImageSource) -> bytes:
    """Hash one image; an image of a custom source may have a method `content` (digest of its bytes), else it is decoded."""
    content = getattr(image, "content", None)
    return content() if content else digest_of_pixels(np.asarray(image.load()))
