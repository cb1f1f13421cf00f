"""Images, opened late and read safely.

A dataset's paths and bytes come from others. A path is read inside its source's image root only, nothing is ever
fetched, and what cannot be read whole is a `RecordError` with its `Fault` (`decoding.py` judges the bytes).
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
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from lit_vlm.data.content import digest_of_pixels, digest_of_stream
from lit_vlm.data.decoding import FORMATS, REMEDY, cause, orientation, parsed, upright_picture, upright_size
from lit_vlm.types import Fault, RecordError

__all__ = ["FORMATS", "REMEDY", "ArrayImage", "BytesImage", "FileImage", "locate", "refuse_url", "shown"]

_URL = re.compile(r"\s*(?:[a-z][a-z0-9+.\-]*://|(?:https?|ftp|data|file):)", re.IGNORECASE)


class EncodedImage:
    """An image that is decoded when it is asked for; subclasses say what `_opened` opens.

    `size` and `orientation` read the header once in the life of the object; `load` and `load_at_least` read the file anew each time.
    """

    origin: str
    max_pixels: int
    _what = "its image"

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels, after EXIF rotation. RecordError by what the header tells."""
        return self._header[0]

    @property
    def orientation(self) -> int:
        """EXIF's, 1 to 8: how the pixels of the file are turned to stand upright. RecordError as `size`."""
        return self._header[1]

    @cached_property
    def _header(self) -> tuple[tuple[int, int], int]:
        with self._parsed() as (image, _):
            return upright_size(image), orientation(image)

    def load(self) -> Image.Image:
        """The whole picture as RGB, upright. RecordError when it cannot be decoded whole."""
        with self._parsed() as (image, stream):
            return upright_picture(image, stream)

    def load_at_least(self, height: int, width: int) -> Image.Image:
        """As `load`, but a JPEG at the smallest of 1/1, 1/2, 1/4, 1/8 that has at least these pixels."""
        with self._parsed() as (image, stream):
            return upright_picture(image, stream, (height, width))

    def encoded(self) -> tuple[bytes, str]:
        """The bytes as they are, and the format that they are in ("jpeg", "png"). RecordError as `size`."""
        with self._parsed() as (image, stream):
            stream.seek(0)
            return stream.read(), str(image.format).lower()

    def content(self) -> bytes:
        """A digest that goes by the bytes alone, for `content.py`. RecordError when they cannot be read."""
        with self._opened() as stream:
            try:
                return digest_of_stream(stream)
            except OSError as error:
                reason = f"{self._what} cannot be read: {cause(error)}"
                raise RecordError(self.origin, reason, REMEDY, Fault.unreadable) from error

    @contextmanager
    def _parsed(self) -> Iterator[tuple[Image.Image, BinaryIO]]:
        with self._opened() as stream, parsed(stream, self._what, self.origin, self.max_pixels) as image:
            yield image, stream

    def _opened(self) -> BinaryIO:
        raise NotImplementedError


@dataclass(frozen=True)
class FileImage(EncodedImage):
    """An image file inside `root`; `path` is as the dataset writes it, `origin` the record that names it."""

    path: str
    root: Path
    origin: str
    max_pixels: int

    @property
    def _what(self) -> str:  # type: ignore[override]
        return f"image {shown(self.path)}"

    def _opened(self) -> BinaryIO:
        found = locate(self.path, self.root, self.origin)
        try:
            return open(found, "rb")
        except OSError as error:
            reason = f"{self._what} cannot be opened: {error.strerror}"
            raise RecordError(self.origin, reason, REMEDY, Fault.unreadable) from error


@dataclass(frozen=True)
class BytesImage(EncodedImage):
    """An encoded image that the record itself carries, as parquet files do."""

    data: bytes = field(repr=False)
    origin: str
    max_pixels: int

    def _opened(self) -> BinaryIO:
        return io.BytesIO(self.data)


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

    def content(self) -> bytes:
        return digest_of_pixels(self.array)


def shown(value: object, limit: int = 120) -> str:
    """A foreign value for a message: quoted, control characters escaped, cut."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}..."


def refuse_url(path: str, origin: str) -> None:
    """RecordError for an URL, and for a name that no file can have."""
    if _URL.match(path):
        remedy = "Download the image beforehand and give its path inside the image root"
        reason = f"image {shown(path)} is an URL; URLs are never fetched while training"
        raise RecordError(origin, reason, remedy, Fault.url)
    if not path or "\0" in path or not _is_encodable(path):
        raise RecordError(origin, f"image {shown(path)} is no file name", REMEDY, Fault.missing)


def _is_encodable(path: str) -> bool:
    try:
        os.fsencode(path)  # half of a surrogate pair is no name
    except UnicodeEncodeError:
        return False
    return True


def locate(path: str, root: Path, origin: str) -> Path:
    """The regular file that `path` means inside `root`, symbolic links followed.

    A name that is missing as written is tried in Unicode's other spellings: macOS stores Hangul decomposed (NFD),
    datasets write it composed (NFC), and on Linux these are different names.

    Raises:
        RecordError: an URL, a path that leads out of the root, nothing there, or something that is no file.
    """
    refuse_url(path, origin)
    try:
        real_root = root.resolve()
        # Judged before anything is looked up, so that a refusal does not tell whether an outside file exists.
        found = _inside(real_root / path, real_root, path, origin)
        if not found.exists():
            found = _inside(_other_spelling(real_root, path), real_root, path, origin)
        status = found.stat()
    except (FileNotFoundError, NotADirectoryError):
        remedy = "Set data.sources.<name>.image_root=... to the folder that the paths start from, or fix the record"
        raise RecordError(origin, f"image {shown(path)} not found in {root}", remedy, Fault.missing) from None
    except (OSError, RuntimeError, ValueError) as error:  # link loops, names too long, lone surrogates, no permission
        if isinstance(error, RecordError):
            raise
        reason = f"image {shown(path)} cannot be reached: {cause(error)}"
        raise RecordError(origin, reason, REMEDY, Fault.unreadable) from error
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
        raise RecordError(origin, f"image {shown(path)} is not a regular file", REMEDY, Fault.unreadable)
    return found


def _inside(candidate: Path, root: Path, path: str, origin: str) -> Path:
    resolved = candidate.resolve()
    if not resolved.is_relative_to(root):
        remedy = (
            "Set data.sources.<name>.image_root=... to a folder that holds all images of the source, or fix the record"
        )
        raise RecordError(origin, f"image {shown(path)} leads out of {root}", remedy, Fault.outside)
    return resolved


def _other_spelling(root: Path, path: str) -> Path:
    """`path` with each part in the spelling that exists; a copied tree may mix them."""
    place = root
    for part in Path(path).parts:
        spellings = (part, unicodedata.normalize("NFC", part), unicodedata.normalize("NFD", part))
        place = next((place / spelling for spelling in spellings if os.path.lexists(place / spelling)), place / part)
    return place
