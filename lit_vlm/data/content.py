"""Content hashes of images, computed from their bytes alone: independent of file name and modification time."""

from __future__ import annotations

import hashlib
import os
from typing import BinaryIO

import numpy as np

from lit_vlm.types import LazyImage, Record

NUM_HASHED_BLOCKS, HASHED_BLOCK_BYTES = (
    4,
    1 << 14,
)  # files that are no longer than all blocks together are read completely


def compute_image_hash(record: Record) -> int:
    """Compute a 64-bit content hash of the record's images; 0 without images.

    Raises:
        RecordError: an image cannot be read.
    """
    if not record.images:
        return 0
    contents = [_hash_image(image) for image in record.images]
    return int.from_bytes(hashlib.blake2b(b"".join(contents), digest_size=8).digest(), "big")


def hash_stream(stream: BinaryIO) -> bytes:
    """Hash a file by its length and by blocks spread over it, which include the first and the last bytes.

    Images that were encoded again differ in length or nearly everywhere, and a PNG ends with a checksum of its pixels.
    Not detected: a few bytes in the middle of a longer file that were changed in place. BMP is not compressed, so it is
    hashed completely.
    """
    size = stream.seek(0, os.SEEK_END)
    hasher = hashlib.blake2b(size.to_bytes(8, "big"), digest_size=16)
    stream.seek(0)
    first = stream.read(HASHED_BLOCK_BYTES)
    hasher.update(first)
    if size <= NUM_HASHED_BLOCKS * HASHED_BLOCK_BYTES or first.startswith(b"BM"):
        hasher.update(stream.read())
        return hasher.digest()
    for number in range(1, NUM_HASHED_BLOCKS):
        stream.seek((size - HASHED_BLOCK_BYTES) * number // (NUM_HASHED_BLOCKS - 1))
        hasher.update(stream.read(HASHED_BLOCK_BYTES))
    return hasher.digest()


def hash_pixels(pixels: np.ndarray) -> bytes:
    """Hash decoded pixels and their shape: 16 bytes."""
    return hashlib.blake2b(f"{pixels.shape}".encode() + pixels.tobytes(), digest_size=16).digest()


def _hash_image(image: LazyImage) -> bytes:
    """Hash one image; an image of a custom source may have a method `content` (digest of its bytes), else it is decoded."""
    content = getattr(image, "content", None)
    return content() if content else hash_pixels(np.asarray(image.load()))
