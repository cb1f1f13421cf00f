"""Files and lines that are there whole or not at all, whoever is killed while they are written and whoever writes at the
same time."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from lit_vlm.types import UserError


@contextmanager
def written(path: Path, what: str = "The index", setting: str = "data.index_dir") -> Iterator[Path]:
    """A path beside `path` to write to; moved there, and on the disk, when it is complete.

    Drafts that a killed process left of the same file are removed. Of two that write it at once each may find its draft
    gone by that, and then the other's in its place, which says the same: names say what is in a file.

    Args:
        what: for the message, which tells of `setting` as the way out.

    Raises:
        UserError: there is no room or no right to write.
    """
    draft = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")  # nodes share folders, not numbers
    with writable(path.parent, what, setting):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield draft
            _settle(draft, path)
        finally:
            draft.unlink(missing_ok=True)
        for stray in path.parent.glob(f".{path.name}.*"):
            stray.unlink(missing_ok=True)


def append_line(path: Path, line: bytes) -> None:
    """One more line at the file's end, on the disk when this returns; several processes may do so at once.

    What a killed process left of a line stays a line of its own: a reader passes over it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(handle, (b"" if _ends_a_line(handle) else b"\n") + line + b"\n")  # one write: lines never mingle
        os.fsync(handle)
    finally:
        os.close(handle)


def _ends_a_line(handle: int) -> bool:
    """Also of a file that has no byte yet."""
    size = os.fstat(handle).st_size
    return size == 0 or os.pread(handle, 1, size - 1) == b"\n"


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time; `path` is the lock's. UserError as `written`."""
    with writable(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def writable(folder: Path, what: str = "The index", setting: str = "data.index_dir") -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{what} cannot be kept in {folder}: {error.strerror or error}. Make room or change its rights, or set "
            f"{setting} to another folder."
        ) from error


def _settle(draft: Path, path: Path) -> None:
    try:
        handle = os.open(draft, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
        os.replace(draft, path)
    except FileNotFoundError:
        if not path.is_file():
            raise
