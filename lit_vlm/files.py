"""Atomic and durable file writing for the whole package.

Files and lines are either complete or absent, and they are on the disk when a function returns. This holds when a process is
killed during a write, when several processes write at the same time, and after a power failure. The reading functions
report a truncated, empty or invalid file by its name.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

from lit_vlm.redaction import redact, redact_text
from lit_vlm.types import UserError


class CorruptFileError(UserError):
    """Error for a file of this package whose content is corrupt. The message names the file and the fault."""


@contextmanager
def atomic_write(path: Path, description: str = "The index", setting: str = "data.index_dir") -> Iterator[Path]:
    """Write a file atomically: yield a temporary path beside `path`, then move it to `path` and sync it to the disk.

    Temporary files that a killed process left for the same file are removed. Of two processes that write the same file at once,
    each may find its temporary file removed in this way. The file of the other process is then in place with the same
    content, because file names here include a digest of the content.

    Args:
        description: subject of the error message, e.g. "The index".
        setting: setting that the message recommends to change.

    Raises:
        UserError: the disk is full or the folder is not writable.
    """
    temporary = get_temporary_path(path)
    with handle_write_errors(path.parent, description, setting):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            move_into_place(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        for leftover in path.parent.glob(f".{path.name}.*"):
            leftover.unlink(missing_ok=True)


def write_text_atomically(path: Path, text: str, *, durable: bool = True, remove_secrets: bool = True) -> None:
    """Write a text file atomically, without secrets: a reader sees the old file or the new one.

    Several processes and threads may call this at once for the same path.

    Args:
        durable: sync to the disk. False for files that are useless after their process ends: a slow disk would delay them.
        remove_secrets: False for files that programs read again and whose values are redacted already. Redacting a whole
            text may break its syntax.

    Raises:
        OSError: the disk is full or the folder is not writable.
    """
    temporary = get_temporary_path(path)
    try:
        temporary.write_text(redact_text(text) if remove_secrets else text, encoding="utf-8")
        move_into_place(temporary, path) if durable else os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    host = f".{path.name}.{socket.gethostname()}."
    for leftover in path.parent.glob(f"{host}*"):  # left by a killed process of this host
        pid = leftover.name.removeprefix(host).partition("-")[0]
        if pid.isdigit() and not _is_process_alive(int(pid)):
            leftover.unlink(missing_ok=True)


def write_json(path: Path, value: Any, *, indent: int | None = None, durable: bool = True) -> None:
    """Write plain data as JSON, as `write_text_atomically` does.

    Secrets are redacted value by value, so that the result stays valid JSON.
    """
    text = json.dumps(redact(value), indent=indent, ensure_ascii=False)
    text = text.encode("utf-8", "replace").decode("utf-8")  # half a surrogate pair has no bytes
    write_text_atomically(path, text + "\n", durable=durable, remove_secrets=False)


def get_temporary_path(path: Path) -> Path:
    """Return a temporary path beside `path` that only this thread uses.

    It contains the host name: nodes share folders, and each node has its own process ids.
    """
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}-{threading.get_ident()}")


def move_into_place(temporary: Path, path: Path) -> None:
    """Rename a temporary file, or a folder of files, to `path`. Its content and its name are on the disk on return.

    A missing temporary file is no error if another process has put its own file there.
    """
    try:
        for entry in (*temporary.rglob("*"), temporary):  # for a file: only itself
            sync_to_disk(entry)
        os.replace(temporary, path)
    except FileNotFoundError:
        if not path.is_file():
            raise
    sync_to_disk(path.parent)


def sync_to_disk(path: Path) -> None:
    """Flush a file's content, or a folder's entries, to the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(path: Path, remedy: str) -> dict[str, Any] | None:
    """Read the JSON object in a file of this package; return None if the file does not exist.

    Args:
        remedy: sentence of the error message that says what to do.

    Raises:
        CorruptFileError: the file is empty, truncated, not JSON or not an object, or it cannot be read.
    """
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise CorruptFileError(f"{path} cannot be read: {error.strerror or error}. {remedy}") from None
    try:
        value = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        fault = "it is empty" if not data.strip(b" \r\n\t\0") else f"it is no JSON, or cut off ({error})"
        raise CorruptFileError(f"{path} is damaged: {fault}. {remedy}") from None
    if not isinstance(value, dict):
        raise CorruptFileError(f"{path} is damaged: it holds {type(value).__name__} and no JSON object. {remedy}")
    return value


def append_line(path: Path, line: bytes) -> None:
    """Append a line to a file; it is on the disk on return. Several processes may do this at once.

    The unfinished line of a killed process stays a line of its own, and a reader skips it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(
            descriptor, (b"" if _is_at_line_start(descriptor) else b"\n") + line + b"\n"
        )  # one write: lines never mix
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    if is_new:
        sync_to_disk(path.parent)


def _is_at_line_start(handle: int) -> bool:
    """Return True if the file ends with a line break or is empty."""
    size = os.fstat(handle).st_size
    return size == 0 or os.pread(handle, 1, size - 1) == b"\n"


@contextmanager
def lock_file(path: Path) -> Iterator[None]:
    """Hold a lock file for the duration of a block, so that one process runs it at a time.

    Args:
        path: path of the lock file.

    Raises:
        UserError: as `atomic_write`.
    """
    with handle_write_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def handle_write_errors(
    folder: Path, description: str = "The index", setting: str = "data.index_dir"
) -> Iterator[None]:
    """Convert an OSError of the block to a UserError that names the folder and the setting to change."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{description} cannot be kept in {folder}: {error.strerror or error}. Make room or change its rights, or set "
            f"{setting} to another folder."
        ) from error


def _is_process_alive(pid: int) -> bool:
    """Return True if a process with this id runs on this host, under any user."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def compute_weights_digest(folder: Path) -> str:
    """Compute the sha256 of the names and contents of a model folder's weight files."""
    hasher = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        hasher.update(file.name.encode())
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 22):
                hasher.update(chunk)
    return hasher.hexdigest()
