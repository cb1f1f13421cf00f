"""Content hashes of images, computed from their bytes alone: independent of file name and modification time."""

from __future__ import annotations

import filecmp
import hashlib
import io
import os
import re
import stat
import unicodedata
from collections.abc import Container, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from lit_vlm.data.decoding import (
    FORMATS,
    REMEDY,
    decode_upright,
    describe_error,
    get_orientation,
    get_upright_size,
    open_image,
    verify_upright,
)
from lit_vlm.types import Fault, LazyImage, Record, RecordError

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


__all__ = [
    "FORMATS",
    "REMEDY",
    "ArrayImage",
    "BytesImage",
    "FileImage",
    "format_untrusted",
    "resolve_image_path",
    "validate_image_path",
]

_URL = re.compile(r"\s*(?:[a-z][a-z0-9+.\-]*://|(?:https?|ftp|data|file):)", re.IGNORECASE)


class EncodedImage:
    """Encoded image that is decoded on request; subclasses implement `_open`.

    `size` and `orientation` read the header once per object; `load` and `load_at_least` read the file on each call.
    """

    origin: str
    max_pixels: int
    _description = "its image"

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels after EXIF rotation. Raises RecordError if the header is unusable."""
        return self._header[0]

    @property
    def orientation(self) -> int:
        """EXIF orientation, 1 to 8: how to turn the pixels of the file upright. Raises RecordError as `size`."""
        return self._header[1]

    @cached_property
    def _header(self) -> tuple[tuple[int, int], int]:
        with self._open() as stream:
            return self._read_header(stream)

    def _read_header(self, stream: BinaryIO) -> tuple[tuple[int, int], int]:
        with self._read_image(stream) as image:
            orientation = get_orientation(image)
            return get_upright_size(image, orientation), orientation

    def load(self) -> Image.Image:
        """Load the image as upright RGB. Raises RecordError if it cannot be decoded completely."""
        with self._open_image() as (image, stream):
            return decode_upright(image, stream)

    def verify(self) -> tuple[int, int]:
        """Check that the image decodes completely; return its upright (height, width). Raises RecordError as `load`."""
        with self._open_image() as (image, stream):
            return verify_upright(image, stream)

    def load_at_least(self, height: int, width: int) -> Image.Image:
        """Load as `load`, but a JPEG at the smallest scale of 1/1, 1/2, 1/4, 1/8 that has at least this size in pixels."""
        with self._open_image() as (image, stream):
            return decode_upright(image, stream, (height, width))

    def read_encoded(self) -> tuple[bytes, str]:
        """Read the encoded bytes and their format ("jpeg", "png"). Raises RecordError as `size`."""
        with self._open_image() as (image, stream):
            stream.seek(0)
            return stream.read(), str(image.format).lower()

    def content(self) -> bytes:
        """Hash the encoded bytes, and keep the header, so that an index opens the file once.

        Raises:
            RecordError: the bytes cannot be read. A damaged header raises where it is needed, in `size`.
        """
        with self._open() as stream:
            content = self._hash(stream)
            if "_header" not in self.__dict__:
                with suppress(RecordError):
                    self.__dict__["_header"] = self._read_header(stream)
            return content

    def load_unless(self, known: Container[bytes]) -> tuple[bytes, Image.Image | None]:
        """Hash as `content`, and load as `load` unless the hash is known; the file is opened once. Raises RecordError."""
        with self._open() as stream:
            content = self._hash(stream)
            if content in known:
                return content, None
            with self._read_image(stream) as image:
                return content, decode_upright(image, stream)

    def _hash(self, stream: BinaryIO) -> bytes:
        try:
            return hash_stream(stream)
        except OSError as error:
            reason = f"{self._description} cannot be read: {describe_error(error)}"
            raise RecordError(self.origin, reason, REMEDY, Fault.unreadable) from error

    @contextmanager
    def _open_image(self) -> Iterator[tuple[Image.Image, BinaryIO]]:
        with self._open() as stream, self._read_image(stream) as image:
            yield image, stream

    def _read_image(self, stream: BinaryIO) -> AbstractContextManager[Image.Image]:
        return open_image(stream, self._description, self.origin, self.max_pixels)

    def _open(self) -> BinaryIO:
        """Open the encoded bytes. Raises RecordError."""
        raise NotImplementedError


@dataclass(frozen=True)
class FileImage(EncodedImage):
    """Image file inside `root` or one of `more_roots`.

    `path` is as the dataset writes it, `origin` is the record that names it.
    """

    path: str
    root: Path
    origin: str
    max_pixels: int
    more_roots: tuple[Path, ...] = ()

    @property
    def _description(self) -> str:  # type: ignore[override]
        return f"image {format_untrusted(self.path)}"

    def _open(self) -> BinaryIO:
        found = resolve_image_path(self.path, self.root, self.origin, self.more_roots)
        try:
            return open(found, "rb")
        except OSError as error:
            reason = f"{self._description} cannot be opened: {error.strerror}"
            raise RecordError(self.origin, reason, REMEDY, Fault.unreadable) from error


@dataclass(frozen=True)
class BytesImage(EncodedImage):
    """Encoded image inside the record itself, as in Parquet files."""

    data: bytes = field(repr=False)
    origin: str
    max_pixels: int

    def _open(self) -> BinaryIO:
        return io.BytesIO(self.data)


@dataclass(frozen=True, slots=True, eq=False)  # comparing arrays gives no single boolean
class ArrayImage:
    """Image as pixels in memory: [H, W] or [H, W, 3], uint8."""

    array: np.ndarray = field(repr=False)
    origin: str

    @property
    def size(self) -> tuple[int, int]:
        return self.array.shape[0], self.array.shape[1]

    def load(self) -> Image.Image:
        return Image.fromarray(self.array).convert("RGB")

    def content(self) -> bytes:
        return hash_pixels(self.array)


def format_untrusted(value: object, max_chars: int = 120) -> str:
    """Format an untrusted value for a message: quoted, control characters escaped, truncated to `max_chars` characters."""
    text = repr(value)
    return text if len(text) <= max_chars else f"{text[:max_chars]}..."


def validate_image_path(path: str, origin: str) -> None:
    """Validate an image path: raise RecordError for an URL, and for a name that no file can have."""
    if ":" in path and _URL.match(path):  # every URL has one, and nearly no path
        remedy = "Download the image beforehand and give its path inside the image root"
        reason = f"image {format_untrusted(path)} is an URL; URLs are never fetched while training"
        raise RecordError(origin, reason, remedy, Fault.url)
    if not path or "\0" in path or not _is_encodable(path):
        raise RecordError(origin, f"image {format_untrusted(path)} is no file name", REMEDY, Fault.missing)


def _is_encodable(path: str) -> bool:
    if path.isascii():
        return True
    try:
        os.fsencode(path)  # half of a surrogate pair cannot be encoded
    except UnicodeEncodeError:
        return False
    return True


def resolve_image_path(path: str, root: Path, origin: str, more_roots: Sequence[Path] = ()) -> Path:
    """Resolve an image path to the regular file inside one of the roots; symbolic links are followed into these only.

    If a name does not exist as written, other Unicode normal forms are tried: macOS stores Hangul decomposed (NFD),
    datasets write it composed (NFC), and on Linux these are different names.

    Raises:
        RecordError: an URL, a path that leads out of all roots, a missing file, not a regular file, or files of different
            content below two roots.
    """
    validate_image_path(path, origin)
    if not more_roots and (plain := _find_plain_file(path, root)):
        return plain
    try:
        roots = [_resolve_root(folder) for folder in (root, *more_roots)]
        # Checked before any lookup, so that the error does not reveal whether a file outside of the roots exists.
        candidates = [_resolve_inside(folder / path, roots, path, origin) for folder in roots]
        found = [candidate for candidate in candidates if candidate.exists()]
        if not found:
            spellings = [_find_other_spelling(folder, path) for folder in roots]
            candidates = [_resolve_inside(spelling, roots, path, origin) for spelling in spellings]
            found = [candidate for candidate in candidates if candidate.exists()] or candidates[:1]
        status = found[0].stat()
        other = next((file for file in found[1:] if not _is_same_content(found[0], file)), None)
    except (FileNotFoundError, NotADirectoryError):
        remedy = "Set data.sources.<name>.image_root=... to the folder that the paths start from, or fix the record"
        where = " or ".join(map(str, (root, *more_roots)))
        raise RecordError(
            origin, f"image {format_untrusted(path)} not found in {where}", remedy, Fault.missing
        ) from None
    except (OSError, RuntimeError, ValueError) as error:  # link loops, long names, lone surrogates, no permission
        if isinstance(error, RecordError):
            raise
        reason = f"image {format_untrusted(path)} cannot be reached: {describe_error(error)}"
        raise RecordError(origin, reason, REMEDY, Fault.unreadable) from error
    if other is not None:
        reason = f"image {format_untrusted(path)} is two different files, {found[0]} and {other}"
        remedy = "Take one of them away, or name the image by a path that only one folder of image_root has"
        raise RecordError(origin, reason, remedy, Fault.unreadable)
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would block for ever
        raise RecordError(origin, f"image {format_untrusted(path)} is not a regular file", REMEDY, Fault.unreadable)
    return found[0]


def _find_plain_file(path: str, root: Path) -> Path | None:
    """Find a regular file that is no link itself, in a folder that was resolved before: nearly every image of a source.

    None for anything else, which takes the long way; so does each path that could lead upwards.
    """
    head, name = os.path.split(path)
    known = None if ".." in path else _resolve_folder(root, head)
    if known is None:
        return None
    folder, inode = known
    found = os.path.join(folder, name)
    try:
        is_plain = _get_inode(folder) == inode and stat.S_ISREG(os.lstat(found).st_mode)
    except OSError:
        return None
    return Path(found) if is_plain else None


@lru_cache(maxsize=4096)
def _resolve_folder(root: Path, head: str) -> tuple[str, tuple[int, int]] | None:
    """Resolve a folder below a root once in a process: its links cost a system call for each folder above them.

    Returns:
        The folder, and its inode, by which a later link in its place is noticed. None if it leads out of the root, or does not
        exist yet.
    """
    try:
        resolved = os.path.realpath(root / head, strict=True)
        inode = _get_inode(resolved)
    except OSError:
        return None
    return (resolved, inode) if Path(resolved).is_relative_to(_resolve_root(root)) else None


def _get_inode(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


@lru_cache(maxsize=64)
def _resolve_root(folder: Path) -> Path:
    """Resolve a root once in a process: every image needs it, and a look-up costs a system call for each folder above it."""
    return folder.resolve()


def _is_same_content(file: Path, other: Path) -> bool:
    """Return True if both are one file, or regular files of the same bytes (compared once per size and time of change)."""
    both_regular = file.is_file() and other.is_file()
    return file == other or (both_regular and filecmp.cmp(file, other, shallow=False))


def _resolve_inside(candidate: Path, roots: Sequence[Path], path: str, origin: str) -> Path:
    """Resolve symbolic links; raise RecordError if the result is outside of all roots."""
    resolved = candidate.resolve()
    if not any(resolved.is_relative_to(root) for root in roots):
        where = " and ".join(map(str, roots))
        remedy = "Set data.sources.<name>.image_root=... to a folder that holds all images of the source"
        remedy += ", or to the list of such folders, or fix the record"
        raise RecordError(origin, f"image {format_untrusted(path)} leads out of {where}", remedy, Fault.outside)
    return resolved


def _find_other_spelling(root: Path, path: str) -> Path:
    """Find `path` with each part in the Unicode form that exists; a copied tree may mix the forms."""
    current = root
    for part in Path(path).parts:
        spellings = (part, unicodedata.normalize("NFC", part), unicodedata.normalize("NFD", part))
        current = next(
            (current / spelling for spelling in spellings if os.path.lexists(current / spelling)), current / part
        )
    return current
