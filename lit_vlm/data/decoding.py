"""Bytes become one upright RGB picture, or a RecordError that says what is wrong with them: never half a picture.

The header decides about format and size before a pixel is decoded. What decodes fully is a picture, whatever it looks
like. Pillow passes over two signs of a half one, so they are looked for: the warnings of libjpeg that pixels are missing,
and a PNG's checksums and the length of its pixel stream. Its decoders of WebP, GIF, BMP and AVIF tell by themselves.
"""

from __future__ import annotations

import os
import re
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

import numpy as np
import simplejpeg
from PIL import AvifImagePlugin, Image, features

from lit_vlm.types import Fault, RecordError

# Pillow knows fifty more, each with a parser to attack; AVIF is left out of some builds of it
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", *(("AVIF",) if features.check("avif") else ()))
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
# how files of FORMATS begin; the others: below
_OURS = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a")
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
# A marker of JPEG with its fill bytes. Among pixels FF is followed by 00 or by a restart marker (D0 to D7).
_JPEG_MARKER = re.compile(rb"\xff+([\x02-\xcf\xd8-\xfe])")
_JPEG_SCAN = 0xDA
_JPEG_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_JPEG_UNNEEDED = {*range(0xE0, 0xF0), 0xFE} - {0xEE}  # comments and what programs write; Adobe's (EE) tells the colours
# Those warnings of libjpeg that mean lost pixels. Others are said of whole pictures: odd markers, bytes between two parts
_JPEG_LOSS = re.compile(
    "premature end|bad Huffman code|bad arithmetic code|instead of RST|extraneous bytes before marker 0xd[0-7]"
)
_PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type
_ADAM7 = ((0, 8, 0, 8), (4, 8, 0, 8), (0, 4, 4, 8), (2, 4, 0, 4), (0, 2, 2, 4), (1, 2, 0, 2), (0, 1, 1, 2))
_PIECE = 1 << 20  # bytes that are inflated at once

# The size is judged here, by data.max_image_pixels, and a picture above it is named as a record.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # a loader has a process for each core already


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
    _check_whole(image, stream)
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
    if first[4:8] == b"ftyp":  # then the brand, the version, and more brands; HEIC is such a file, too
        return "AVIF" in FORMATS and (first[8:12] in (b"avif", b"avis") or b"avif" in first[16:])
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


def _check_whole(image: Image.Image, stream: BinaryIO) -> None:
    """Refuse half a picture of those formats whose decoders in Pillow return it without a word."""
    stream.seek(0)
    data = stream.read()
    if data.startswith(b"\xff\xd8"):
        damage = _find_jpeg_damage(data)
    else:
        damage = _find_png_damage(data, image) if data.startswith(b"\x89PNG") else None
    if damage:
        raise _Refused(f"cannot be decoded: {damage}", Fault.broken)


def _find_jpeg_damage(data: bytes) -> str | None:
    """Lost pixels. libjpeg fills them with grey and warns; Pillow drops the warning."""
    scanned, components, first_scan = set[int](), set[int](), len(data)
    # One warning alone is reported, the first. So what is not needed for the pixels, and might bring a harmless one, is left out.
    needed = bytearray(b"\xff\xd8")
    at = 2
    while found := _JPEG_MARKER.search(data, at):
        marker, at = found[1][0], found.end()
        if marker == 0xD9:  # of a thumbnail it would lie within a segment
            break
        end = at + max(2, int.from_bytes(data[at : at + 2]))
        if marker == _JPEG_SCAN:
            first_scan = min(first_scan, at)
            scanned.update(data[at + 3 : at + 3 + 2 * data[at + 2] : 2])
            following = _JPEG_MARKER.search(data, end)
            end = following.start() if following else len(data)
        elif marker in _JPEG_FRAMES:
            components.update(data[at + 8 : at + 8 + 3 * data[at + 7] : 3])
        if marker not in _JPEG_UNNEEDED:
            needed += b"\xff" + bytes([marker]) + data[at:end]
        at = end
    if data.find(b"\xff\xd9", first_scan) < 0:  # where there are zeros behind a torn end they pass for pixels
        return "the end marker is missing, its end is torn off or overwritten"
    if missing := components - scanned:
        return f"{len(missing)} of its {len(components)} colour components have no data"
    try:  # at an eighth of its size: all data are read, few pixels are computed
        simplejpeg.decode_jpeg(bytes(needed) + b"\xff\xd9", "GRAY", min_height=1, min_width=1, strict=True)
    except ValueError as error:
        if _JPEG_LOSS.search(str(error)):
            return str(error)
    return None


def _find_png_damage(data: bytes, image: Image.Image) -> str | None:
    """A wrong checksum of a chunk that makes the picture, or a stream of pixels that ends early."""
    at, view, pixels = 8, memoryview(data), list[memoryview]()
    while at + 12 <= len(data):
        end = at + 8 + int.from_bytes(view[at : at + 4])
        name = bytes(view[at + 4 : at + 8])
        if name[:1].isupper() and zlib.crc32(view[at + 4 : end]) != int.from_bytes(view[end : end + 4]):
            return f"the checksum of its {name.decode('ascii', 'replace')} chunk is wrong"
        if name == b"IDAT":
            pixels.append(view[at + 8 : end])
        if name == b"IEND":
            return _find_short_stream(pixels, data[16:29], image)
        at = end + 4
    return "the end chunk is missing"


def _find_short_stream(pixels: list[memoryview], header: bytes, image: Image.Image) -> str | None:
    """Say whether the inflated stream is shorter than the header promises."""
    width, height = image.size
    interlaced, bits = header[12] == 1, header[8] * _PNG_CHANNELS[header[9]]
    # Pillow leaves lines that it has no data for at zero: where the last one is not, the inflating can be saved
    if not interlaced and image.crop((0, height - 1, width, height)).getbbox(alpha_only=False):
        return None
    promised = 0
    for left, step_x, top, step_y in _ADAM7 if interlaced else ((0, 1, 0, 1),):
        columns, rows = -(-(width - left) // step_x), -(-(height - top) // step_y)
        if columns > 0 and rows > 0:
            promised += rows * (1 + (columns * bits + 7) // 8)  # a line begins with its filter
    found, inflater = 0, zlib.decompressobj()
    for piece in pixels:
        rest: bytes | memoryview = piece
        while len(rest) and found < promised and not inflater.eof:
            # no further than needed: what stands behind the pixels is no part of the picture
            found += len(inflater.decompress(rest, min(_PIECE, promised - found)))
            rest = inflater.unconsumed_tail
    if found < promised:
        found += len(inflater.flush())
    return f"its pixels end after {found:,} of {promised:,} bytes" if found < promised else None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey, which convert() would clip at 255
        grey = np.asarray(image).astype(np.float32) / 257.0
        return Image.fromarray(grey.round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        picture = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")  # convert() would copy
