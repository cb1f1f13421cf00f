"""Files and lines that are there whole or not at all, and on the disk when a function returns, whoever is killed while they
are written, whoever writes at the same time, and whether the power goes: all files of ours are written here.

Reading them again is here as well: one that is cut, empty or something else is told by its name.
"""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

from lit_vlm.secrets import redacted, redacted_text
from lit_vlm.types import UserError


class DamagedFile(UserError):
    """A file of ours that is not as it was written. Its text names the file and what is wrong with it."""


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
    draft = draft_of(path)
    with writable(path.parent, what, setting):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield draft
            move_into_place(draft, path)
        finally:
            draft.unlink(missing_ok=True)
        for stray in path.parent.glob(f".{path.name}.*"):
            stray.unlink(missing_ok=True)


def write_atomically(path: Path, text: str, *, durable: bool = True, redact: bool = True) -> None:
    """Beside, then moved, without secrets: a reader finds the old file or the new one. Several processes, and threads, may at
    once.

    Args:
        durable: see it onto the disk. Not for what is of no use once its process is gone: a slow disk would hold it up.
        redact: False for what programs read again and whose values are without secrets already. A text as a whole cannot be
            redacted without breaking its syntax.

    Raises:
        OSError: there is no room or no right to write.
    """
    draft = draft_of(path)
    try:
        draft.write_text(redacted_text(text) if redact else text, encoding="utf-8")
        move_into_place(draft, path) if durable else os.replace(draft, path)
    except OSError:
        draft.unlink(missing_ok=True)
        raise
    host = f".{path.name}.{socket.gethostname()}."
    for stray in path.parent.glob(f"{host}*"):  # of a process that was killed here
        number = stray.name.removeprefix(host).partition("-")[0]
        if number.isdigit() and not _is_alive(int(number)):
            stray.unlink(missing_ok=True)


def write_json(path: Path, value: Any, *, indent: int | None = None, durable: bool = True) -> None:
    """Write plain data as JSON, as `write_atomically` does. Secrets are taken out value by value, so that it stays JSON."""
    text = json.dumps(redacted(value), indent=indent, ensure_ascii=False)
    text = text.encode("utf-8", "replace").decode("utf-8")  # half a surrogate pair has no bytes
    write_atomically(path, text + "\n", durable=durable, redact=False)


def draft_of(path: Path) -> Path:
    """A name beside `path` that is this thread's alone: nodes share folders, and each has its own process numbers."""
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}-{threading.get_ident()}")


def move_into_place(draft: Path, path: Path) -> None:
    """Rename a file or a folder of files; what it holds, and its name, are on the disk when this returns.

    A draft that is gone is no error where another process has put its own there.
    """
    try:
        for entry in (*draft.rglob("*"), draft):  # of a file: itself alone
            sync(entry)
        os.replace(draft, path)
    except FileNotFoundError:
        if not path.is_file():
            raise
    sync(path.parent)


def sync(path: Path) -> None:
    """See a file's content, or a folder's names, onto the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_json(path: Path, remedy: str) -> dict[str, Any] | None:
    """Read the JSON object that a file of ours holds; None where there is no file.

    Args:
        remedy: a sentence for the message: what to do.

    Raises:
        DamagedFile: it is empty, cut, no JSON, or no object; or it cannot be read.
    """
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise DamagedFile(f"{path} cannot be read: {error.strerror or error}. {remedy}") from None
    try:
        value = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        found = "it is empty" if not data.strip(b" \r\n\t\0") else f"it is no JSON, or cut off ({error})"
        raise DamagedFile(f"{path} is damaged: {found}. {remedy}") from None
    if not isinstance(value, dict):
        raise DamagedFile(f"{path} is damaged: it holds {type(value).__name__} and no JSON object. {remedy}")
    return value


def append_line(path: Path, line: bytes) -> None:
    """One more line at the file's end, on the disk when this returns; several processes may do so at once.

    What a killed process left of a line stays a line of its own: a reader passes over it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(handle, (b"" if _ends_a_line(handle) else b"\n") + line + b"\n")  # one write: lines never mingle
        os.fsync(handle)
    finally:
        os.close(handle)
    if is_new:
        sync(path.parent)


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


def _is_alive(pid: int) -> bool:
    """A process of this host, whoever's it is."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
