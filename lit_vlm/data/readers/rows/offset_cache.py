"""Disk cache of integer arrays (byte offsets) that one scan over a large file computes. They are memory-mapped.

The name of a cache file is a digest of the source file's path, size and modification time. So a changed file is scanned
again.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from lit_vlm.data.readers.rows.base import get_file_identity
from lit_vlm.files import atomic_write, lock_file
from lit_vlm.types import UserError

_FORMAT_VERSION = 1  # increase it when the meaning of the arrays changes


class StoredArray:
    """Array of int64 [rows, columns], in memory or memory-mapped from a file. A mapped array pickles as the file's name."""

    def __init__(self, array: np.ndarray, file: Path | None = None) -> None:
        self.array, self._file = array, file

    def __reduce__(self):
        return (StoredArray, (self.array,)) if self._file is None else (_map_file, (self._file,))


def load_or_scan(
    path: Path, cache_dir: Path | None, kind: str, columns: int, scan: Callable[[Path], Iterator[np.ndarray]]
) -> StoredArray:
    """Load the array of a file from the cache, or scan the file and store the result.

    Several processes may call this at the same time: one scans, the others wait.

    Args:
        cache_dir: the array is stored in its folder `offsets`; None: keep it in memory only.
        kind: name of the scan; part of the digest.
        scan: yields int64 [n, columns] in chunks.

    Raises:
        UserError: the file changed during the scan, or the cache cannot be written.
        PermissionError: the file may not be read.
    """
    file_identity = get_file_identity(path)
    open(path, "rb").close()  # raises PermissionError before anything is written
    if cache_dir is None:
        array = np.concatenate([np.empty((0, columns), np.int64), *scan(path)])
        _require_unchanged(path, file_identity)
        return StoredArray(array)
    name = hashlib.sha256(repr((_FORMAT_VERSION, kind, columns, file_identity)).encode()).hexdigest()[:32]
    file = cache_dir / "offsets" / f"{name}.npy"
    result = _load_if_valid(file, columns)
    if result is None:
        with lock_file(file.with_suffix(".lock")):
            result = _load_if_valid(file, columns)
            if result is None:
                _write_array(file, columns, _run_scan(path, scan), lambda: _require_unchanged(path, file_identity))
                result = _load_if_valid(file, columns)
    assert result is not None
    return result


def _write_array(file: Path, columns: int, chunks: Iterator[np.ndarray], check: Callable[[], None]) -> None:
    """Write the array to a temporary file and move it into place, so no process reads a partial file.

    The header is padded, so the final number of rows fits in its place.
    """
    with atomic_write(file) as draft:
        with open(draft, "wb") as stream:
            num_rows = 0
            _write_header(stream, num_rows, columns)
            for chunk in chunks:
                stream.write(np.ascontiguousarray(chunk, np.int64).tobytes())
                num_rows += len(chunk)
            stream.seek(0)
            _write_header(stream, num_rows, columns)
        check()


def _run_scan(path: Path, scan: Callable[[Path], Iterator[np.ndarray]]) -> Iterator[np.ndarray]:
    """Run the scan, and report a read error of the file as such, not as a write error of the cache."""
    try:
        yield from scan(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}.") from error


def _write_header(stream: BinaryIO, rows: int, columns: int) -> None:
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.int64)), "fortran_order": False}
    np.lib.format.write_array_header_1_0(stream, {**header, "shape": (rows, columns)})


def _load_if_valid(file: Path, columns: int) -> StoredArray | None:
    """Load a cache file, or return None if it is missing, truncated or invalid; the caller then scans again."""
    try:
        result = _map_file(file)
    except (OSError, ValueError, EOFError):
        return None
    array = result.array
    return result if array.dtype == np.int64 and array.ndim == 2 and array.shape[1] == columns else None


def _map_file(file: Path) -> StoredArray:
    with open(file, "rb") as stream:
        version = np.lib.format.read_magic(stream)
        if version != (1, 0):
            raise ValueError(f"{file}: not written by us")
        shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
        offset, size = stream.tell(), os.fstat(stream.fileno()).st_size
    if size != offset + int(np.prod(shape)) * dtype.itemsize:
        raise ValueError(f"{file}: {size} bytes are not those of {shape}")
    array = np.empty(shape, dtype) if 0 in shape else np.memmap(file, dtype, "r", offset, shape)
    return StoredArray(np.asarray(array), file)  # a plain view of the memmap: indexing a row of it is 5 times as fast


def _require_unchanged(path: Path, expected: tuple[str, int, int]) -> None:
    if get_file_identity(path) != expected:
        raise UserError(f"{path}: changed while it was read. Start again when nothing writes to it any more.")
