"""Integers about a large file, found in one pass over it and kept beside the indexes, memory-mapped.

The name of what is kept is a digest of the file's path, size and time of change, so it is found again only for the
file that it was made from.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from lit_vlm.data.readers.rows.base import identity
from lit_vlm.files import locked, written
from lit_vlm.types import UserError

_VERSION = 1  # raise it when the arrays mean something else


class StoredArray:
    """int64 [rows, columns], in memory or mapped from a file. Mapped, it pickles as the file's name."""

    def __init__(self, array: np.ndarray, file: Path | None = None) -> None:
        self.array, self._file = array, file

    def __reduce__(self):
        return (StoredArray, (self.array,)) if self._file is None else (_mapped, (self._file,))


def stored(
    path: Path, cache: Path | None, kind: str, columns: int, scan: Callable[[Path], Iterator[np.ndarray]]
) -> StoredArray:
    """What `scan` finds in a file, out of `cache` when it was found before.

    Args:
        cache: a folder, in whose `offsets` it is kept; None: in memory alone. Several processes may ask at once: one scans, the others wait.
        kind: of scan; part of the name.
        scan: yields int64 [n, columns], piece by piece.

    Raises:
        UserError: the file changed while it was scanned, or the cache cannot be written.
        PermissionError: the file may not be read.
    """
    found = identity(path)
    open(path, "rb").close()  # PermissionError, before anything is written
    if cache is None:
        array = np.concatenate([np.empty((0, columns), np.int64), *scan(path)])
        _require_unchanged(path, found)
        return StoredArray(array)
    name = hashlib.sha256(repr((_VERSION, kind, columns, found)).encode()).hexdigest()[:32]
    file = cache / "offsets" / f"{name}.npy"
    kept = _kept(file, columns)
    if kept is None:
        with locked(file.with_suffix(".lock")):
            kept = _kept(file, columns)
            if kept is None:
                _build(file, columns, _scanned(path, scan), lambda: _require_unchanged(path, found))
                kept = _kept(file, columns)
    assert kept is not None
    return kept


def _build(file: Path, columns: int, pieces: Iterator[np.ndarray], check: Callable[[], None]) -> None:
    """Written beside and moved, so that nobody reads a half. The header's room does for any number of rows."""
    with written(file) as draft:
        with open(draft, "wb") as stream:
            rows = 0
            _write_header(stream, rows, columns)
            for piece in pieces:
                stream.write(np.ascontiguousarray(piece, np.int64).tobytes())
                rows += len(piece)
            stream.seek(0)
            _write_header(stream, rows, columns)
        check()


def _scanned(path: Path, scan: Callable[[Path], Iterator[np.ndarray]]) -> Iterator[np.ndarray]:
    """A file that cannot be read is told as that, and not as a cache that cannot be written."""
    try:
        yield from scan(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}.") from error


def _write_header(stream: BinaryIO, rows: int, columns: int) -> None:
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.int64)), "fortran_order": False}
    np.lib.format.write_array_header_1_0(stream, {**header, "shape": (rows, columns)})


def _kept(file: Path, columns: int) -> StoredArray | None:
    """What the file holds, or None where it is missing, torn or something else: then it is made again."""
    try:
        stored = _mapped(file)
    except (OSError, ValueError, EOFError):
        return None
    array = stored.array
    return stored if array.dtype == np.int64 and array.ndim == 2 and array.shape[1] == columns else None


def _mapped(file: Path) -> StoredArray:
    with open(file, "rb") as stream:
        version = np.lib.format.read_magic(stream)
        if version != (1, 0):
            raise ValueError(f"{file}: not written by us")
        shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
        offset, size = stream.tell(), os.fstat(stream.fileno()).st_size
    if size != offset + int(np.prod(shape)) * dtype.itemsize:
        raise ValueError(f"{file}: {size} bytes are not those of {shape}")
    array = np.empty(shape, dtype) if 0 in shape else np.memmap(file, dtype, "r", offset, shape)
    return StoredArray(np.asarray(array), file)  # a plain view of the map: taking a row of it is five times as fast


def _require_unchanged(path: Path, found: tuple[str, int, int]) -> None:
    if identity(path) != found:
        raise UserError(f"{path}: changed while it was read. Start again when nothing writes to it any more.")
