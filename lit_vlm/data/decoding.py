"""Image decoding: decode bytes to one upright RGB image, or raise a RecordError; never return a partial image.

Format and size are checked by the header before a pixel is decoded. An image is accepted if it decodes completely.
Pillow ignores two signs of a truncated image, so they are checked here: libjpeg's warnings about missing pixels, and a
PNG's checksums and the length of its pixel stream. Pillow's decoders of WebP, GIF, BMP and AVIF report truncation.

simplejpeg decodes a JPEG and reports the warnings in one pass, so most JPEGs need no decoding by Pillow. Its pixels are
Pillow's own, if both have the same libjpeg; that is checked once in a process.
"""

from __future__ import annotations

import io
import os
import re
import warnings
import zlib
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import BinaryIO

import numpy as np
import simplejpeg
from PIL import AvifImagePlugin, Image, features

from lit_vlm.types import Fault, RecordError

# Pillow reads fifty more formats, each with a parser that can be attacked; some builds of Pillow lack AVIF
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", *(("AVIF",) if features.check("avif") else ()))
MAX_FILE_BYTES = 200_000_000
REMEDY = "Fix the record, or set such records aside with data.on_bad_record=quarantine"

_ORIENTATION = 0x0112  # EXIF tag
_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SWAPPED_ORIENTATIONS = (5, 6, 7, 8)  # EXIF orientations that swap height and width
# first bytes of files of FORMATS; those of the other formats: see _is_supported
_SUPPORTED_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a")
_FOREIGN_SIGNATURES = {  # first bytes of files that are often found instead
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
# Bytes that make a JPEG marker of an FF before them. In pixel data FF is followed by 00 or by a restart marker (D0 to D7).
_IS_JPEG_MARKER = np.isin(np.arange(256), [*range(0x02, 0xD0), *range(0xD8, 0xFF)])
_SEARCHED_BYTES = 1 << 16  # at a time
_JPEG_SCAN = 0xDA
_JPEG_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_JPEG_IGNORED_MARKERS = {*range(0xE0, 0xF0), 0xFE} - {
    0xEE
}  # comments and application data; Adobe's (EE) holds the colour space
# Warnings of libjpeg that mean lost pixels. Complete images can cause other warnings: odd markers, bytes between segments
_JPEG_LOSS = re.compile(
    "premature end|bad Huffman code|bad arithmetic code|instead of RST|extraneous bytes before marker 0xd[0-7]"
)
_PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type
_ADAM7 = ((0, 8, 0, 8), (4, 8, 0, 8), (0, 4, 4, 8), (2, 4, 0, 4), (0, 2, 2, 4), (1, 2, 0, 2), (0, 1, 1, 2))
_INFLATE_BYTES = 1 << 20  # decompressed bytes per call

# The size limit is data.max_image_pixels, checked here; an image above it is reported as a record.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # a data loader already has one process per core


@contextmanager
def open_image(stream: BinaryIO, description: str, origin: str, max_pixels: int) -> Iterator[Image.Image]:
    """Open an image after checking its header. Every error, also one in the `with` block, becomes a RecordError.

    Args:
        description: name of the image in messages, such as "its image".
        origin: location of the record in messages.
        max_pixels: limit of width times height.
    """
    try:
        _check_file_size(stream)
        with Image.open(stream, formats=FORMATS) as image:
            _check_pixels(image, max_pixels)
            yield image
    except MemoryError:  # a problem of the machine, not of the record
        raise
    except _UnusableImageError as error:
        raise RecordError(origin, f"{description} {error}", REMEDY, error.fault) from None
    except Exception as error:  # for malicious bytes Pillow's parsers raise nearly any exception, even KeyError
        finding, fault = _describe_failure(error, stream, max_pixels)
        raise RecordError(origin, f"{description} {finding}", REMEDY, fault) from error


def get_orientation(image: Image.Image) -> int:
    """Get the EXIF orientation, 1 to 8; 1 if there is none."""
    # The method of the base class: PNG's own decodes the image to find EXIF data behind the pixels. `size` and `load`
    # must agree, so both use only the header.
    found = Image.Image.getexif(image).get(_ORIENTATION, 1)
    return found if found in _TRANSPOSES else 1


def get_upright_size(image: Image.Image, orientation: int) -> tuple[int, int]:
    """Get (height, width) in pixels after the rotation of `get_orientation`, from the header alone."""
    width, height = image.size
    return (width, height) if orientation in _SWAPPED_ORIENTATIONS else (height, width)


def decode_upright(image: Image.Image, stream: BinaryIO, min_size: tuple[int, int] | None = None) -> Image.Image:
    """Decode the pixels to RGB and apply the EXIF rotation; for an animation, decode the first frame.

    Args:
        stream: stream from which `image` is read.
        min_size: (height, width); a JPEG is then decoded at the smallest scale of 1/1, 1/2, 1/4, 1/8 with this size.
    """
    exif_orientation = get_orientation(image)  # before decoding, which may add EXIF data
    if min_size is not None:
        height, width = min_size if exif_orientation not in _SWAPPED_ORIENTATIONS else min_size[::-1]
        image.draft(None, (width, height))  # other formats than JPEG ignore it
    pixels = _decode_sound_jpeg(image, stream, "RGB") if min_size is None and _has_pixels_of_pillow() else None
    if pixels is not None:
        rgb = Image.fromarray(pixels)
    else:
        image.load()
        _check_complete(image, stream)
        rgb = _to_rgb(image)
    return rgb.transpose(_TRANSPOSES[exif_orientation]) if exif_orientation in _TRANSPOSES else rgb


def verify_upright(image: Image.Image, stream: BinaryIO) -> tuple[int, int]:
    """Check that an image decodes completely; return its upright (height, width). Faster than decoding a sound JPEG.

    Args:
        stream: stream from which `image` is read.
    """
    # at 1/8 scale all data are read, but few pixels are computed
    if _decode_sound_jpeg(image, stream, "GRAY", min_height=1, min_width=1) is not None:
        return get_upright_size(image, get_orientation(image))
    decoded = decode_upright(image, stream)
    return decoded.height, decoded.width


def describe_error(error: Exception) -> str:
    """Describe an exception by its system message, text, or type."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


class _UnusableImageError(Exception):
    """Error of an unusable image, without the name of the image; `open_image` adds it."""

    def __init__(self, finding: str, fault: Fault) -> None:
        super().__init__(finding)
        self.fault = fault


def _describe_failure(error: Exception, stream: BinaryIO, max_pixels: int) -> tuple[str, Fault]:
    """Describe Pillow's exception as text and as a fault."""
    if isinstance(error, Image.DecompressionBombError):  # Pillow's own limit is checked before ours
        finding = f"is larger than data.max_image_pixels={max_pixels} allows: {str(error).rstrip('.')}"
        return finding, Fault.too_large
    if isinstance(error, OSError) and error.errno is not None:  # a file system error; Pillow's own have no number
        return f"cannot be read: {describe_error(error)}", Fault.unreadable
    stream.seek(0)
    first = stream.read(64)
    if not _is_supported(first):
        return f"is no {', '.join(FORMATS)} file; {_describe_first_bytes(first)}", Fault.not_an_image
    if isinstance(error, ValueError) and ("too large" in str(error) or "Too much memory" in str(error)):
        return (
            f"cannot be decoded: {describe_error(error)}",
            Fault.too_large,
        )  # a compressed text chunk or colour profile
    return f"cannot be decoded: {describe_error(error)}", Fault.broken


def _is_supported(first: bytes) -> bool:
    """Return True if the first bytes match, or are the beginning of, a signature of FORMATS."""
    if first.startswith(b"RIFF"):
        return b"WEBP".startswith(first[8:12])
    if first.startswith(b"BM"):
        return first[6:10] == bytes(4)[: len(first[6:10])]  # reserved; in a text file these are letters
    if first[4:8] == b"ftyp":  # followed by brand, version and more brands; HEIC has this box, too
        return "AVIF" in FORMATS and (first[8:12] in (b"avif", b"avis") or b"avif" in first[16:])
    return any(first.startswith(start) or start.startswith(first) for start in _SUPPORTED_SIGNATURES)


def _describe_first_bytes(first: bytes) -> str:
    """Describe the first bytes of a file, with the name of the format if it is known."""
    shown = f"it starts with {first[:16]!r}"
    start = first.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    name = next((name for known, name in _FOREIGN_SIGNATURES.items() if start.startswith(known)), None)
    if start[4:8] == b"ftyp":  # ISO media files name their brand: heic, avif, mp42
        name = f"{start[8:12].decode('ascii', 'replace').strip().upper()} media"
    return f"{shown}, {name}" if name else shown


def _check_file_size(stream: BinaryIO) -> None:
    num_bytes = stream.seek(0, os.SEEK_END)
    stream.seek(0)
    if num_bytes == 0:
        raise _UnusableImageError("is empty: 0 bytes", Fault.empty)
    if num_bytes > MAX_FILE_BYTES:
        raise _UnusableImageError(f"has {num_bytes:,} bytes, at most {MAX_FILE_BYTES:,} are read", Fault.too_large)


def _check_pixels(image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        found = f"is {width} x {height} = {width * height:,} pixels"
        raise _UnusableImageError(f"{found}; data.max_image_pixels allows {max_pixels:,}", Fault.too_large)
    if width < 1 or height < 1:
        raise _UnusableImageError(f"is {width} x {height} pixels", Fault.broken)


def _decode_sound_jpeg(image: Image.Image, stream: BinaryIO, colours: str, **options: int) -> np.ndarray | None:
    """Decode a JPEG in which libjpeg finds nothing to warn about: [H, W, channels] uint8. None: another or an odd file."""
    if image.format != "JPEG" or image.mode != "RGB":
        return None
    stream.seek(0)
    data = stream.read()
    try:
        _, damage = _scan_jpeg(data)
        if damage or simplejpeg.decode_jpeg_header(data)[:2] != (image.height, image.width):
            return None
        return simplejpeg.decode_jpeg(data, colours, strict=True, **options)  # type: ignore[no-any-return]
    except (ValueError, IndexError):  # Pillow decides
        return None


@cache
def _has_pixels_of_pillow() -> bool:
    """Return True if simplejpeg decodes to Pillow's pixels: another libjpeg may round or upsample differently."""
    pixels = np.random.default_rng(0).integers(0, 256, (21, 35, 3), dtype=np.uint8)
    for options in (
        {"subsampling": 0},
        {"subsampling": 1},
        {"subsampling": 2},
        {"subsampling": 2, "progressive": True},
    ):
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "JPEG", quality=90, **options)
        with Image.open(stream) as image:
            if not np.array_equal(np.asarray(image), simplejpeg.decode_jpeg(stream.getvalue(), "RGB")):
                return False
    return True


def _check_complete(image: Image.Image, stream: BinaryIO) -> None:
    """Refuse a truncated image of a format whose decoder in Pillow does not report truncation (JPEG, PNG)."""
    stream.seek(0)
    data = stream.read()
    if data.startswith(b"\xff\xd8"):
        damage = _find_jpeg_damage(data)
    else:
        damage = _find_png_damage(data, image) if data.startswith(b"\x89PNG") else None
    if damage:
        raise _UnusableImageError(f"cannot be decoded: {damage}", Fault.broken)


def _find_jpeg_damage(data: bytes) -> str | None:
    """Find lost pixels of a JPEG. libjpeg fills them with grey and warns; Pillow drops the warning."""
    needed_bytes, damage = _scan_jpeg(data)
    if damage:
        return damage
    try:  # at 1/8 scale all data are read, but few pixels are computed
        simplejpeg.decode_jpeg(needed_bytes, "GRAY", min_height=1, min_width=1, strict=True)
    except ValueError as error:
        if _JPEG_LOSS.search(str(error)):
            return str(error)
    return None


def _scan_jpeg(data: bytes) -> tuple[bytes, str | None]:
    """Scan the segments of a JPEG; return those that its pixels need, and what is missing, or None."""
    scanned, components, first_scan = set[int](), set[int](), len(data)
    # Only the first warning is reported. So segments that the pixels do not need, which may cause a harmless one, are left out.
    needed_bytes = bytearray(b"\xff\xd8")
    position, markers = 2, _JpegMarkers(data)
    while found := markers.find(position):
        marker, position = data[found[1]], found[1] + 1
        if marker == 0xD9:  # end of image; the one of a thumbnail lies within a segment
            break
        end = position + max(2, int.from_bytes(data[position : position + 2]))
        if marker == _JPEG_SCAN:
            first_scan = min(first_scan, position)
            scanned.update(data[position + 3 : position + 3 + 2 * data[position + 2] : 2])
            following = markers.find(end)
            end = following[0] if following else len(data)
        elif marker in _JPEG_FRAMES:
            components.update(data[position + 8 : position + 8 + 3 * data[position + 7] : 3])
        if marker not in _JPEG_IGNORED_MARKERS:
            needed_bytes += b"\xff" + bytes([marker]) + data[position:end]
        position = end
    damage = None
    if data.find(b"\xff\xd9", first_scan) < 0:  # zeros behind a truncated end would be accepted as pixels
        damage = "the end marker is missing, its end is torn off or overwritten"
    elif missing := components - scanned:
        damage = f"{len(missing)} of its {len(components)} colour components have no data"
    return bytes(needed_bytes) + b"\xff\xd9", damage


class _JpegMarkers:
    """Search for the markers of a JPEG. Each window of the file is looked through once, so many searches take linear time."""

    def __init__(self, data: bytes) -> None:
        self._data, self._view = data, np.frombuffer(data, np.uint8)
        self._first, self._stop, self._codes = 0, 0, list[int]()  # of the window: its FFs, and the codes behind them

    def find(self, start: int) -> tuple[int, int] | None:
        """Find the first marker from `start` on: the positions of its first FF and of its code, which fill bytes may precede."""
        position = start
        while position < len(self._data) - 1:
            if not self._first <= position < self._stop:
                self._read_window(position)
            number = bisect_right(self._codes, position)
            if number < len(self._codes):
                code = self._codes[number]
                return start + len(self._data[start:code].rstrip(b"\xff")), code
            position = self._stop
        return None

    def _read_window(self, first: int) -> None:
        window = self._view[first : first + _SEARCHED_BYTES + 1]
        places = np.flatnonzero(window[:-1] == 0xFF) + 1
        self._first, self._stop = first, first + _SEARCHED_BYTES
        self._codes = (first + places[_IS_JPEG_MARKER[window[places]]]).tolist()


def _find_png_damage(data: bytes, image: Image.Image) -> str | None:
    """Find damage of a PNG: a wrong checksum of a critical chunk, or a pixel stream that ends early."""
    position, view, pixels = 8, memoryview(data), list[memoryview]()
    while position + 12 <= len(data):
        end = position + 8 + int.from_bytes(view[position : position + 4])
        name = bytes(view[position + 4 : position + 8])
        if name[:1].isupper() and zlib.crc32(view[position + 4 : end]) != int.from_bytes(view[end : end + 4]):
            return f"the checksum of its {name.decode('ascii', 'replace')} chunk is wrong"
        if name == b"IDAT":
            pixels.append(view[position + 8 : end])
        if name == b"IEND":
            return _find_short_stream(pixels, data[16:29], image)
        position = end + 4
    return "the end chunk is missing"


def _find_short_stream(pixels: list[memoryview], header: bytes, image: Image.Image) -> str | None:
    """Find a decompressed pixel stream that is shorter than the header requires; return the finding or None."""
    width, height = image.size
    interlaced, bits = header[12] == 1, header[8] * _PNG_CHANNELS[header[9]]
    # Pillow leaves rows without data at zero: if the last row is not zero, decompression is not needed
    if not interlaced and image.crop((0, height - 1, width, height)).getbbox(alpha_only=False):
        return None
    expected = 0
    for left, step_x, top, step_y in _ADAM7 if interlaced else ((0, 1, 0, 1),):
        columns, rows = -(-(width - left) // step_x), -(-(height - top) // step_y)
        if columns > 0 and rows > 0:
            expected += rows * (1 + (columns * bits + 7) // 8)  # a row begins with its filter byte
    found, inflater = 0, zlib.decompressobj()
    for piece in pixels:
        rest: bytes | memoryview = piece
        while len(rest) and found < expected and not inflater.eof:
            # no more than needed: bytes behind the pixels are not part of the image
            found += len(inflater.decompress(rest, min(_INFLATE_BYTES, expected - found)))
            rest = inflater.unconsumed_tail
    if found < expected:
        found += len(inflater.flush())
    return f"its pixels end after {found:,} of {expected:,} bytes" if found < expected else None


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert to RGB; transparent pixels are blended with white."""
    if image.mode.startswith("I"):  # 16-bit grey; convert() would clip it at 255
        grey = np.asarray(image).astype(np.float32) / 257.0
        return Image.fromarray(grey.round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")  # convert() would copy
