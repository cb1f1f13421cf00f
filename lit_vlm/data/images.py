"""Images, opened late and read safely.

A dataset's paths and bytes come from others. A path is read inside its source's image root only, nothing is ever
fetched, the header decides about size before a pixel is decoded, and what cannot be decoded whole is a `RecordError`,
never a grey rectangle.
"""

from __future__ import annotations

import io
import os
import re
import stat
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from lit_vlm.types import RecordError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")  # Pillow knows fifty more, each with a parser to attack
MAX_FILE_BYTES = 200_000_000
REMEDY = "Fix the record, or set such records aside with data.on_bad_record=quarantine"

_URL = re.compile(r"\s*(?:[a-z][a-z0-9+.\-]*://|(?:https?|ftp|data|file):)", re.IGNORECASE)
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


@dataclass(frozen=True, slots=True)
class FileImage:
    """An image file inside `root`; `path` is as the dataset writes it, `origin` the record that names it."""

    path: str
    root: Path
    origin: str
    max_pixels: int

    @property
    def size(self) -> tuple[int, int]:
        with self._opened() as image:
            return _upright_size(image)

    def load(self) -> Image.Image:
        with self._opened() as image:
            return _decode(image)

    @contextmanager
    def _opened(self) -> Iterator[Image.Image]:
        found, what = locate(self.path, self.root, self.origin), f"image {shown(self.path)}"
        try:
            stream = open(found, "rb")  # noqa: SIM115 - closed below; only the opening belongs under this `except`
        except OSError as error:
            raise RecordError(self.origin, f"{what} cannot be opened: {error.strerror}", REMEDY) from error
        with stream, _parsed(stream, what, self.origin, self.max_pixels) as image:
            yield image


@dataclass(frozen=True, slots=True)
class BytesImage:
    """An encoded image that the record itself carries, as parquet files do."""

    data: bytes = field(repr=False)
    origin: str
    max_pixels: int

    @property
    def size(self) -> tuple[int, int]:
        with _parsed(io.BytesIO(self.data), "its image", self.origin, self.max_pixels) as image:
            return _upright_size(image)

    def load(self) -> Image.Image:
        with _parsed(io.BytesIO(self.data), "its image", self.origin, self.max_pixels) as image:
            return _decode(image)


@dataclass(frozen=True, slots=True, eq=False)  # comparing arrays has no single answer
class ArrayImage:
    """Pixels in memory: [H, W] or [H, W, 3], uint8."""

    array: np.ndarray = field(repr=False)
    origin: str

    @property
    def size(self) -> tuple[int, int]:
        return self.array.shape[0], self.array.shape[1]

    def load(self) -> Image.Image:
        return Image.fromarray(self.array).convert("RGB")


def shown(value: object, limit: int = 120) -> str:
    """A foreign value for a message: quoted, control characters escaped, cut."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}..."


def refuse_url(path: str, origin: str) -> None:
    """RecordError for an URL, and for a name that no file can have."""
    if _URL.match(path):
        remedy = "Download the image beforehand and give its path inside the image root"
        raise RecordError(origin, f"image {shown(path)} is an URL; URLs are never fetched while training", remedy)
    if not path or "\0" in path:
        raise RecordError(origin, f"image {shown(path)} is no file name", REMEDY)


def locate(path: str, root: Path, origin: str) -> Path:
    """The regular file that `path` means inside `root`, symbolic links followed.

    A name that is missing as written is tried in Unicode's other spellings: macOS stores Hangul decomposed (NFD),
    datasets write it composed (NFC), and on Linux these are different names.

    Raises:
        RecordError: an URL, a path that leads out of the root, a missing or an oversized file.
    """
    refuse_url(path, origin)
    try:
        real_root = root.resolve()
        # Judged before anything is looked up, so that a refusal does not tell whether an outside file exists.
        found = _inside(real_root / path, real_root, path, origin)
        if not found.exists():
            found = _inside(_other_spelling(real_root, path), real_root, path, origin)
        status = found.stat()
    except FileNotFoundError:
        remedy = "Set data.sources.<name>.image_root=... to the folder that the paths start from, or fix the record"
        raise RecordError(origin, f"image {shown(path)} not found in {root}", remedy) from None
    except (OSError, RuntimeError, ValueError) as error:  # link loops, names too long, lone surrogates, no permission
        if isinstance(error, RecordError):
            raise
        raise RecordError(origin, f"image {shown(path)} cannot be reached: {_cause(error)}", REMEDY) from error
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
        raise RecordError(origin, f"image {shown(path)} is not a regular file", REMEDY)
    return found


def _inside(candidate: Path, root: Path, path: str, origin: str) -> Path:
    resolved = candidate.resolve()
    if not resolved.is_relative_to(root):
        remedy = (
            "Set data.sources.<name>.image_root=... to a folder that holds all images of the source, or fix the record"
        )
        raise RecordError(origin, f"image {shown(path)} leads out of {root}", remedy)
    return resolved


def _other_spelling(root: Path, path: str) -> Path:
    """`path` with each part in the spelling that exists; a copied tree may mix them."""
    place = root
    for part in Path(path).parts:
        spellings = (part, unicodedata.normalize("NFC", part), unicodedata.normalize("NFD", part))
        place = next((place / spelling for spelling in spellings if os.path.lexists(place / spelling)), place / part)
    return place


def _cause(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


@contextmanager
def _parsed(stream: BinaryIO, what: str, origin: str, max_pixels: int) -> Iterator[Image.Image]:
    """The image behind its checked header. What goes wrong with it, also in the `with` block, becomes a RecordError."""
    try:
        _check_file_size(stream)
        with Image.open(stream, formats=FORMATS) as image:
            _check_pixels(image, max_pixels)
            yield image
    except MemoryError:  # says something about the machine
        raise
    except _Refused as error:
        raise RecordError(origin, f"{what} {error}", REMEDY) from None
    except Image.DecompressionBombError as error:  # Pillow's own limit comes before ours
        finding = f"{what} is larger than data.max_image_pixels={max_pixels} allows: {str(error).rstrip('.')}"
        raise RecordError(origin, finding, REMEDY) from None
    except UnidentifiedImageError:
        raise RecordError(origin, f"{what} is no {', '.join(FORMATS)} file; {_beginning(stream)}", REMEDY) from None
    except (
        Exception
    ) as error:  # on hostile bytes Pillow's parsers raise nearly everything, struct.error and KeyError included
        raise RecordError(origin, f"{what} cannot be decoded: {_cause(error)}", REMEDY) from error


class _Refused(Exception):
    """A finding about an image, to be completed with its name."""


def _check_file_size(stream: BinaryIO) -> None:
    num_bytes = stream.seek(0, os.SEEK_END)
    stream.seek(0)
    if num_bytes > MAX_FILE_BYTES:
        raise _Refused(f"has {num_bytes:,} bytes, at most {MAX_FILE_BYTES:,} are read")


def _check_pixels(image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise _Refused(
            f"is {width} x {height} = {width * height:,} pixels; data.max_image_pixels allows {max_pixels:,}"
        )
    if width < 1 or height < 1:
        raise _Refused(f"is {width} x {height} pixels")


def _beginning(stream: BinaryIO) -> str:
    stream.seek(0)
    first = stream.read(16)
    return f"it starts with {first!r}" if first else "it is empty"


def _orientation(image: Image.Image) -> int:
    # The plain method: PNG's own decodes the picture to look for EXIF behind the pixels. `size` and `load` must
    # agree, so both go by what the header holds.
    return Image.Image.getexif(image).get(_ORIENTATION, 1)


def _upright_size(image: Image.Image) -> tuple[int, int]:
    width, height = image.size
    return (width, height) if _orientation(image) in (5, 6, 7, 8) else (height, width)


def _decode(image: Image.Image) -> Image.Image:
    turn = _UPRIGHT.get(_orientation(image))  # before decoding, which may add to the EXIF
    image.load()  # of an animation, the first frame
    rgb = _to_rgb(image)
    return rgb if turn is None else rgb.transpose(turn)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey, which convert() would clip at 255
        grey = np.asarray(image).astype(np.float32) / 257.0
        return Image.fromarray(grey.round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        picture = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return image.convert("RGB")
