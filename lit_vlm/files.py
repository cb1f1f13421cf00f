"""Atomic and durable file writing for the whole package.

Files and lines are either complete or absent, and they are on the disk when a function returns. This holds when a process is
killed during a write, when several processes write at the same time, and after a power failure. The reading functions
report a truncated, empty or invalid file by its name.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import shutil
import socket
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

from lit_vlm.redaction import redact, redact_text
from lit_vlm.types import UserError


class CorruptFileError(UserError):
    """Error for a file of this package whose content is corrupt. The message names the file and the fault."""


@contextmanager
def replace_file(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Replace a file atomically: yield a temporary path beside `path`, then move it to `path`.

    A reader sees the old file or the new one. Several processes and threads may call this at once for the same path.

    Args:
        durable: sync to the disk. False for files that are useless after their process ends: a slow disk would delay them.

    Raises:
        OSError: the disk is full or the folder is not writable.
    """
    temporary = get_temporary_path(path)
    try:
        yield temporary
        move_into_place(temporary, path) if durable else os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    for leftover in path.parent.glob(f".{path.name}.{socket.gethostname()}.*"):  # of a killed process of this host
        match = TEMPORARY_NAME.fullmatch(leftover.name)
        if match and not _is_process_alive(int(match["pid"])):
            leftover.unlink(missing_ok=True)


@contextmanager
def atomic_write(path: Path, description: str = "The index", setting: str = "data.index_dir") -> Iterator[Path]:
    """Replace a file as `replace_file` does; its folder is made. Errors are for the user.

    Temporary files that killed processes of any host left for the same file are removed. Of two processes that write the
    same file at once, each may find its temporary file removed in this way. The file of the other process is then in place
    with the same content, because file names here include a digest of the content.

    Args:
        description: subject of the error message, e.g. "The index".
        setting: setting that the message recommends to change.

    Raises:
        UserError: the disk is full or the folder is not writable.
    """
    with handle_write_errors(path.parent, description, setting):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replace_file(path) as temporary:
            yield temporary
        for leftover in path.parent.glob(f".{path.name}.*"):
            leftover.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Make a folder atomically: yield a temporary folder beside `path`, then move it to `path`, on the disk.

    Args:
        replace: replace an existing folder, and remove what killed processes of any host left; only one process at a time
            may then make the folder. False: several processes may make the same folder at once, and the first one wins.

    Raises:
        OSError: the disk is full or the folder is not writable.
    """
    temporary = get_temporary_path(path)
    for leftover in path.parent.glob(f".{path.name}.*") if replace else [temporary]:
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if replace and path.exists():
            shutil.rmtree(path)
        move_into_place(temporary, path)
    except OSError:
        if replace or not path.is_dir():  # else another process was faster
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def create_file(path: Path, text: str) -> None:
    """Create a file atomically, so that one of several processes succeeds.

    Raises:
        FileExistsError: another process was first.
        OSError: the disk is full or the folder is not writable.
    """
    temporary = get_temporary_path(path)
    temporary.write_text(text, encoding="utf-8")
    try:
        os.link(temporary, path)
    except FileExistsError:
        # 2 links: the file is ours, as NFS repeats a request after a lost answer
        if temporary.stat().st_nlink == 1:
            raise
    except OSError:  # file system without hard links
        with path.open("x", encoding="utf-8") as stream:
            stream.write(text)
    finally:
        temporary.unlink(missing_ok=True)


def write_text_atomically(path: Path, text: str, *, durable: bool = True, remove_secrets: bool = True) -> None:
    """Write a text file without secrets, as `replace_file` does.

    Args:
        remove_secrets: False for files that programs read again and whose values are redacted already. Redacting a whole
            text may break its syntax.
    """
    with replace_file(path, durable=durable) as temporary:
        temporary.write_text(redact_text(text) if remove_secrets else text, encoding="utf-8")


def write_json(path: Path, value: Any, *, indent: int | None = None, durable: bool = True) -> None:
    """Write plain data as JSON, as `write_text_atomically` does.

    Secrets are redacted value by value, so that the result stays valid JSON.
    """
    text = json.dumps(redact(value), indent=indent, ensure_ascii=False)
    text = text.encode("utf-8", "replace").decode("utf-8")  # half a surrogate pair has no bytes
    write_text_atomically(path, text + "\n", durable=durable, remove_secrets=False)


# name of a temporary file, with the host and the process that write it
TEMPORARY_NAME = re.compile(r"\.(?P<name>.+)\." + re.escape(socket.gethostname()) + r"\.(?P<pid>\d+)-\d+")


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


def read_json_or_none(path: Path) -> Any:
    """Read the JSON value in a file; None if the file is missing, cannot be read, or is no JSON."""
    try:
        return json.loads(path.read_bytes().decode("utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def read_lines(path: Path) -> list[str]:
    """Read the lines of a text file; [] if it is missing. Raise OSError if it cannot be read.

    A line ends at \\n only: texts may contain other line separators of Unicode, where `str.splitlines` would split.
    """
    try:
        return path.read_bytes().decode("utf-8", "replace").split("\n")
    except FileNotFoundError:
        return []


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Read the JSON objects in the lines of a file; [] if it is missing. Lines that a killed process cut off are skipped."""
    return [row for line in read_lines(path) if isinstance(row := parse_json_line(line), dict)]


def parse_json_line(line: str) -> Any:
    """Parse a line of JSON; None if it is empty or cut off."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def read_csv_rows(path: Path) -> list[dict[str, str]]:
    """Read the rows of a CSV file with a header; [] if it is missing. An incomplete last row is skipped."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    return list(csv.DictReader(lines))


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


NUM_HASHED_BLOCKS = 256  # blocks of 64 KiB that are hashed for each weight file


def update_with_weight_files(hasher: Any, files: Iterable[Path]) -> None:
    """Update a digest with names, sizes and `NUM_HASHED_BLOCKS` blocks spread over each weight file.

    Another model differs in any block.
    """
    for file in files:
        size = file.stat().st_size
        hasher.update(f"{file.name}\0{size}".encode())
        with file.open("rb") as stream:
            for offset in range(0, size, max(1, size // NUM_HASHED_BLOCKS)):
                stream.seek(offset)
                hasher.update(stream.read(1 << 16))


def compute_weights_digest(folder: Path) -> str:
    """Compute the sha256 of the names and contents of a model folder's weight files."""
    hasher = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        hasher.update(file.name.encode())
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 22):
                hasher.update(chunk)
    return hasher.hexdigest()
