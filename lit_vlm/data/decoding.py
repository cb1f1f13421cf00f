"""Bytes become one upright RGB picture, or a RecordError that says what is wrong with them: never half a picture.

The header decides about format and size before a pixel is decoded. After decoding, what the decoders let pass is looked
for: PNG's checksums, JPEG's end marker, zeros where WebP has its pixels. JPEG, WebP, GIF and BMP carry no checksum, so
a flipped bit among their pixels that still decodes cannot be told from a picture by any reader.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

import numpy as np
from PIL import Image

from lit_vlm.types import Fault, RecordError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")  # Pillow knows fifty more, each with a parser to attack
MAX_FILE_BYTES = 200_000_000
REMEDY = "Fix the record, or set such records aside with data.on_bad_record=quarantine"

_ORIENTATION = 0x0112  # EXIF tag
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_LYING = (5, 6, 7, 8)  # orientations that swap height and width
_OURS = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a")  # how files of FORMATS begin; WEBP, BMP: below
_OTHERS = {  # what is found instead, most often
    b"<!doctype html": "a web page",
    b"<html": "a web page",
    b"<svg": "an SVG drawing",
    b"<?xml": "an XML file",
    b"%pdf": "a PDF",
    b"pk\x03\x04": "a ZIP archive",
    b"\x1f\x8b": "a gzip archive",
    b"ii*\0": "a TIFF picture",
    b"mm\0*": "a TIFF picture",
    b"8bps": "a Photoshop picture",
    b"version https://git-lfs": "a Git LFS pointer; run `git lfs pull`",
}
_ZERO_TAIL = 64  # bytes; compressed pixels do not end in so many zeros


@contextmanager
def parsed(stream: BinaryIO, what: str, origin: str, max_pixels: int) -> Iterator[Image.Image]:
    """The image behind its checked header. What goes wrong with it, also in the `with` block, becomes a RecordError."""
    try:
        _check_file_size(stream)
        with Image.open(stream, formats=FORMATS) as image:
            _check_pixels(image, max_pixels)
            yield image
    except MemoryError:  # says something about the machine
        raise
    except _Refused as error:
        raise RecordError(origin, f"{what} {error}", REMEDY, error.fault) from None
    except Exception as error:  # on hostile bytes Pillow's parsers raise nearly everything, KeyError included
        finding, fault = _finding(error, stream, max_pixels)
        raise RecordError(origin, f"{what} {finding}", REMEDY, fault) from error


def orientation(image: Image.Image) -> int:
    """EXIF's, 1 to 8; 1 where it says none."""
    # The plain method: PNG's own decodes the picture to look for EXIF behind the pixels. `size` and `load` must
    # agree, so both go by what the header holds.
    found = Image.Image.getexif(image).get(_ORIENTATION, 1)
    return found if found in _UPRIGHT else 1


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(height, width) in pixels after EXIF rotation, by the header alone."""
    width, height = image.size
    return (width, height) if orientation(image) in _LYING else (height, width)


def upright_picture(image: Image.Image, stream: BinaryIO, at_least: tuple[int, int] | None = None) -> Image.Image:
    """The pixels as RGB, EXIF rotation applied; of an animation the first frame.

    Args:
        stream: where `image` is read from.
        at_least: (height, width); a JPEG is then decoded at the smallest of 1/1, 1/2, 1/4, 1/8 that is as large.
    """
    turned = orientation(image)  # before decoding, which may add to the EXIF
    if at_least is not None:
        height, width = at_least if turned not in _LYING else at_least[::-1]
        image.draft(None, (width, height))  # other formats than JPEG have nothing to save and ignore it
    image.load()
    _check_whole(stream)
    rgb = _to_rgb(image)
    return rgb.transpose(_UPRIGHT[turned]) if turned in _UPRIGHT else rgb


def cause(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


class _Refused(Exception):
    """A finding about an image, to be completed with its name."""

    def __init__(self, finding: str, fault: Fault) -> None:
        super().__init__(finding)
        self.fault = fault


def _finding(error: Exception, stream: BinaryIO, max_pixels: int) -> tuple[str, Fault]:
    """What Pillow's exception means, in words and as a fault."""
    if isinstance(error, Image.DecompressionBombError):  # Pillow's own limit comes before ours
        finding = f"is larger than data.max_image_pixels={max_pixels} allows: {str(error).rstrip('.')}"
        return finding, Fault.too_large
    if isinstance(error, OSError) and error.errno is not None:  # the disk's word; Pillow's own have no number
        return f"cannot be read: {cause(error)}", Fault.unreadable
    stream.seek(0)
    first = stream.read(64)
    if not _is_ours(first):
        return f"is no {', '.join(FORMATS)} file; {_beginning(first)}", Fault.not_an_image
    if isinstance(error, ValueError) and ("too large" in str(error) or "Too much memory" in str(error)):
        return f"cannot be decoded: {cause(error)}", Fault.too_large  # a compressed text or colour profile
    return f"cannot be decoded: {cause(error)}", Fault.broken


def _is_ours(first: bytes) -> bool:
    """Whether a file begins as one of FORMATS does, if only in part."""
    if first.startswith(b"RIFF"):
        return b"WEBP".startswith(first[8:12])
    if first.startswith(b"BM"):
        return first[6:10] == bytes(4)[: len(first[6:10])]  # reserved; a text that begins so has letters there
    return any(first.startswith(start) or start.startswith(first) for start in _OURS)


def _beginning(first: bytes) -> str:
    shown = f"it starts with {first[:16]!r}"
    start = first.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    name = next((name for known, name in _OTHERS.items() if start.startswith(known)), None)
    if start[4:8] == b"ftyp":  # ISO media files say which: heic, avif, mp42
        name = f"{start[8:12].decode('ascii', 'replace').strip().upper()} media"
    return f"{shown}, {name}" if name else shown


def _check_file_size(stream: BinaryIO) -> None:
    num_bytes = stream.seek(0, os.SEEK_END)
    stream.seek(0)
    if num_bytes == 0:
        raise _Refused("is empty: 0 bytes", Fault.empty)
    if num_bytes > MAX_FILE_BYTES:
        raise _Refused(f"has {num_bytes:,} bytes, at most {MAX_FILE_BYTES:,} are read", Fault.too_large)


def _check_pixels(image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        found = f"is {width} x {height} = {width * height:,} pixels"
        raise _Refused(f"{found}; data.max_image_pixels allows {max_pixels:,}", Fault.too_large)
    if width < 1 or height < 1:
        raise _Refused(f"is {width} x {height} pixels", Fault.broken)


def _check_whole(stream: BinaryIO) -> None:
    """Damage that Pillow's decoders fill with grey or noise and say nothing of."""
    stream.seek(0)
    data = stream.read()
    if data.startswith(b"\xff\xd8"):
        damage = _damage_of_jpeg(data)
    elif data.startswith(b"\x89PNG"):
        damage = _damage_of_png(data)
    else:
        damage = _damage_of_webp(data) if data.startswith(b"RIFF") else None
    if damage:
        raise _Refused(f"cannot be decoded: {damage}", Fault.broken)


def _damage_of_jpeg(data: bytes) -> str | None:
    """Decoders take zeros behind a torn end for pixels; a whole file has an end marker behind its first scan."""
    at = 2
    while data[at : at + 1] == b"\xff" and data[at + 1] != 0xDA:  # to the scan: a thumbnail before it has its own end
        at += 2 + int.from_bytes(data[at + 2 : at + 4])
    return None if data.find(b"\xff\xd9", at) >= 0 else "the end marker is missing, its end is torn off or overwritten"


def _damage_of_png(data: bytes) -> str | None:
    """The checksums of the chunks that make the picture; Pillow skips those of the pixels."""
    at, view = 8, memoryview(data)
    while at + 12 <= len(data):
        end = at + 8 + int.from_bytes(view[at : at + 4])
        name = bytes(view[at + 4 : at + 8])
        if name[:1].isupper() and zlib.crc32(view[at + 4 : end]) != int.from_bytes(view[end : end + 4]):
            return f"the checksum of its {name.decode('ascii', 'replace')} chunk is wrong"
        if name == b"IEND":
            return None
        at = end + 4
    return "the end chunk is missing"


def _damage_of_webp(data: bytes) -> str | None:
    at = 12
    while at + 8 <= len(data):
        end = at + 8 + int.from_bytes(data[at + 4 : at + 8], "little")
        if data[at : at + 4] in (b"VP8 ", b"VP8L", b"ANMF") and data[at + 8 : end].endswith(bytes(_ZERO_TAIL)):
            return f"its pixels end in more than {_ZERO_TAIL} zeros"
        at = end + end % 2
    return None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey, which convert() would clip at 255
        grey = np.asarray(image).astype(np.float32) / 257.0
        return Image.fromarray(grey.round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        picture = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")  # convert() would copy
