"""Data staging: copy data to a node's local disk before a run starts, and read it there under its original paths.

`LIT_VLM_STAGED` is the folder on the node. A file /data/a.jsonl is then first looked up at $LIT_VLM_STAGED/data/a.jsonl.
Settings, digests and index keys use the original paths, so the run keeps its name and its index. Copies have the size
and the modification time of their originals, to the nanosecond.

    python -m lit_vlm.data.staging FOLDER PATH...     copy files that have no copy yet
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lit_vlm.files import TEMPORARY_NAME, replace_file
from lit_vlm.formatting import format_count
from lit_vlm.types import UserError

STAGING_VARIABLE = "LIT_VLM_STAGED"
NUM_COPY_THREADS = 8  # parallel copies; for small images the latency of the server dominates
SPARE_BYTES = 1 << 30  # kept free on the disk


def resolve_staged_path(path: Path) -> Path:
    """Resolve a path to its copy on this node, or to itself if there is no copy."""
    folder = get_staging_folder()
    if folder is None:
        return path
    copy = get_copy_path(path, folder)
    return copy if copy.exists() else path


def resolve_original_path(path: Path) -> Path:
    """Resolve a staged path to the original path, which is used in settings and digests."""
    folder = get_staging_folder()
    return Path("/") / path.relative_to(folder) if folder and path.is_relative_to(folder) else path


def get_staging_folder() -> Path | None:
    """Get the staging folder of this node; None without staging. Environment variables in it are those of the node.

    Raises:
        UserError: a variable in it is not set on this node.
    """
    named = os.environ.get(STAGING_VARIABLE)
    return resolve_staging_folder(named) if named else None


def resolve_staging_folder(folder_setting: str) -> Path:
    """Expand the variables of a setting to a folder of this node. Raises UserError if the result is no absolute path."""
    folder = os.path.expandvars(folder_setting)
    if "$" in folder or not os.path.isabs(folder):
        raise UserError(
            f"submit.stage_to={folder_setting}: is {folder} on {socket.gethostname()}, which is no folder. It must begin with / once its"
            " variables are filled in, and those must be set on every node."
        )
    return Path(folder).resolve()


def get_copy_path(path: Path, folder: Path) -> Path:
    """Get the path of the copy of `path` below `folder`."""
    return folder / path.resolve().relative_to("/")


def copy_to_node(paths: Iterable[Path], folder: Path) -> tuple[int, int]:
    """Copy files and folders to the node; return (copied files, copied bytes).

    A copy with the same size and modification time is kept. Files that were removed from a folder are removed from its
    copy. It can be interrupted at any time: a copy gets its final name only when it is complete.

    Raises:
        UserError: a path is missing, or the disk is too small.
    """
    folder, paths = folder.resolve(), list(paths)
    for path in paths:
        _remove_stale(path.resolve(), folder)
    waiting = list(dict.fromkeys(pair for path in paths for pair in _find_missing(path, folder)))
    size = sum(path.stat().st_size for path, _ in waiting if not path.is_symlink())
    _check_free_space(folder, size)
    with ThreadPoolExecutor(NUM_COPY_THREADS) as pool:
        for _ in pool.map(lambda pair: _copy_file(*pair), waiting):
            pass
    return len(waiting), size


def _find_missing(path: Path, folder: Path) -> Iterator[tuple[Path, Path]]:
    """Find the files without a current copy; yield (file, path of its copy)."""
    if not path.exists():
        raise UserError(f"{path}: to be copied to {folder} of {socket.gethostname()}, but it is not there.")
    path = path.resolve()
    for file in [path] if path.is_file() else _walk_files(path):
        copy = folder / file.relative_to("/")
        if not _is_same(file, copy):
            yield file, copy


def _remove_stale(root: Path, folder: Path) -> None:
    """Remove copies of files that no longer exist: a shard removed from a folder must not be read from the copy."""
    copies = get_copy_path(root, folder)
    if not root.is_dir() or copies.resolve() != copies:  # a link could lead out of the copies
        return
    for copy in _walk_files(copies):
        file = root / copy.relative_to(copies)
        temporary = TEMPORARY_NAME.fullmatch(file.name)  # another job of this node may be copying it now
        if not os.path.lexists(file) and not (temporary and os.path.lexists(file.with_name(temporary[1]))):
            copy.unlink(missing_ok=True)


def _walk_files(root: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(root):
        links = [name for name in folders if Path(parent, name).is_symlink()]
        yield from (Path(parent, name) for name in sorted([*names, *links]))


def _is_same(file: Path, copy: Path) -> bool:
    try:
        one, other = file.lstat(), copy.lstat()
    except FileNotFoundError:
        return False
    return file.is_symlink() or (one.st_size, one.st_mtime_ns) == (other.st_size, other.st_mtime_ns)


def _copy_file(file: Path, copy: Path) -> None:
    """Copy a file or symbolic link through a temporary name, with its modification time."""
    try:
        if not file.is_symlink() and not file.is_file():
            return  # pipes and sockets are not copied
        copy.parent.mkdir(parents=True, exist_ok=True)
        with replace_file(copy, durable=False) as temporary:
            if file.is_symlink():
                temporary.symlink_to(os.readlink(file))
            else:
                shutil.copyfile(file, temporary)
                status = file.stat()
                os.utime(temporary, ns=(status.st_atime_ns, status.st_mtime_ns))
    except OSError as error:
        what = f"{file} cannot be copied to {copy.parent} of {socket.gethostname()}: {error.strerror}"
        raise UserError(f"{what}. Choose another submit.stage_to, or none.") from error


def _check_free_space(folder: Path, num_bytes: int) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        where = f"{folder} of {socket.gethostname()}"
        raise UserError(f"submit.stage_to: {where} cannot be made: {error.strerror}. Choose another folder.") from error
    if num_bytes + SPARE_BYTES > free:
        raise UserError(
            f"submit.stage_to: {folder} of {socket.gethostname()} has {free / 1e9:.1f} GB free, and {num_bytes / 1e9:.1f} GB"
            f" would be copied there ({SPARE_BYTES / 1e9:.0f} GB stay free). Choose another folder, or none."
        )


def main(arguments: list[str]) -> None:
    for number in (signal.SIGUSR1, signal.SIGUSR2):  # the scheduler's warning signals are for the run
        signal.signal(number, signal.SIG_IGN)
    began = time.monotonic()
    try:
        folder = resolve_staging_folder(arguments[0])
        count, size = copy_to_node(map(Path, arguments[1:]), folder)
    except UserError as error:
        sys.exit(str(error))
    seconds = time.monotonic() - began
    print(
        f"{socket.gethostname()}: {format_count(count, 'file')}, {size / 1e9:.2f} GB copied to {folder} in {seconds:.0f} s",
        flush=True,
    )


if __name__ == "__main__":
    main(sys.argv[1:])
