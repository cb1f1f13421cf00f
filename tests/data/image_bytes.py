"""Bytes of image files: encoded by Pillow, or built by hand where Pillow would not write them."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from PIL import Image


@lru_cache(maxsize=512)
def make_photo(seed: int = 0, size: tuple[int, int] = (96, 64)) -> Image.Image:
    """Make an image of smooth colours with some noise."""
    rng = np.random.default_rng(seed)
    smooth = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    noise = rng.integers(-4, 5, (size[1], size[0], 3))
    return Image.fromarray((np.asarray(smooth) + noise).clip(0, 255).astype(np.uint8))


def encode(image: Image.Image, image_format: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, image_format, **options)
    return stream.getvalue()


def decode_plain(data: bytes) -> np.ndarray:
    """Decode with Pillow alone, for files that need no special treatment."""
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def make_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def make_png(width, height, pixels: bytes = bytes(64), *, depth=8, colour=2, before=(), behind=()) -> bytes:
    """Make a PNG. `pixels`: rows with filter bytes. `before`, `behind`: chunks (name, data) around the pixels."""
    header = make_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    chunks = [
        b"\x89PNG\r\n\x1a\n",
        header,
        *(make_chunk(*each) for each in before),
        make_chunk(b"IDAT", zlib.compress(pixels)),
    ]
    return b"".join([*chunks, *(make_chunk(*each) for each in behind), make_chunk(b"IEND", b"")])


def make_16_bit_png(values: np.ndarray) -> bytes:
    """Encode [H, W, channels] uint16 as a PNG of one to four channels."""
    height, width, channels = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return make_png(width, height, rows, depth=16, colour={1: 0, 2: 4, 3: 2, 4: 6}[channels])


@lru_cache(maxsize=8)
def compress_zeros(megabytes: float) -> bytes:
    return zlib.compress(bytes(int(megabytes * 1e6)), 9)


def iter_cuts(data: bytes, number: int) -> Iterator[tuple[int, bytes]]:
    for part in range(1, number + 1):
        yield part, data[: len(data) * part // (number + 1)]


def make_gif(width, height, frame_width=1, frame_height=1) -> bytes:
    screen = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(6)
    return screen + b"," + struct.pack("<HHHHB", 0, 0, frame_width, frame_height, 0) + b"\x02\x02\x4c\x01\x00;"


def make_webp(width, height, kind=b"VP8X") -> bytes:
    small = encode(Image.new("RGB", (16, 16)), "WEBP")[12:]
    sides = struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    frame = bytes(6) + struct.pack("<I", 15)[:3] * 2 + bytes(4) + small
    bodies = {
        b"VP8X": [(b"VP8X", b"\2\0\0\0" + sides), (b"ANIM", bytes(6)), (b"ANMF", frame)],
        b"VP8L": [(b"VP8L", b"\x2f" + struct.pack("<I", (width - 1) | (height - 1) << 14) + bytes(9))],
        b"VP8 ": [(b"VP8 ", b"\x10\x02\0\x9d\x01\x2a" + struct.pack("<HH", width, height) + bytes(40))],
    }
    body = b"WEBP" + b"".join(name + struct.pack("<I", len(data)) + data for name, data in bodies[kind])
    return b"RIFF" + struct.pack("<I", len(body)) + body


def make_bmp(width, height, bits=24, compression=0) -> bytes:
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, compression, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 154, 0, 0, 54) + header + bytes(100)


def make_jpeg(width, height, frame=0xC0) -> bytes:
    data = bytearray(encode(make_photo(6), "JPEG", progressive=frame == 0xC2))
    at = data.index(bytes([0xFF, frame]))
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data)
