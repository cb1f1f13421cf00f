"""What pictures hold, as numbers that go by their bytes alone: a copy has the same ones, whatever its name and times."""

from __future__ import annotations

import hashlib
import os
from typing import BinaryIO

import numpy as np

from lit_vlm.types import ImageSource, Record

BLOCKS, BLOCK_BYTES = 4, 1 << 14  # files no longer than all blocks are read whole


def content_of(record: Record) -> int:
    """64 bits of what the record's pictures hold; 0 without pictures.

    Raises:
        RecordError: a picture cannot be read.
    """
    if not record.images:
        return 0
    contents = [_content(image) for image in record.images]
    return int.from_bytes(hashlib.blake2b(b"".join(contents), digest_size=8).digest(), "big")


def digest_of_stream(stream: BinaryIO) -> bytes:
    """Of its length and of blocks spread over it, the first and the last bytes among them.

    Pictures that were encoded anew differ in their length or nearly everywhere, and PNG ends with a checksum of its pixels. What
    is not seen: some bytes in the middle of a longer file, changed in place. BMP is not compressed, so all of it counts.
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
    return hashlib.blake2b(f"{pixels.shape}".encode() + pixels.tobytes(), digest_size=16).digest()


def _content(image: ImageSource) -> bytes:
    """An image of a source of one's own may bring `content`, its bytes' digest; else it is decoded for it."""
    content = getattr(image, "content", None)
    return content() if content else digest_of_pixels(np.asarray(image.load()))
