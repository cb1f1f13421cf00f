"""Data on a node's own disk: copied there once before a run starts, and read from there under the names that they have.

`LIT_VLM_STAGED` names the folder on the node. A file at /data/a.jsonl is then looked for at $LIT_VLM_STAGED/data/a.jsonl
first. Settings, digests and index keys are those of the original, so the run keeps its name and its index: copies have
the size and the time of their originals, to the nanosecond.

    python -m lit_vlm.data.staging FOLDER PATH...     copy what is not there yet
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lit_vlm.types import UserError, counted

VARIABLE = "LIT_VLM_STAGED"
COPIES = 8  # at once; small pictures wait for the server more than for the disk
SPARE_BYTES = 1 << 30  # left free on the disk
_DRAFT = re.compile(r"\.(.+)\.\d+\Z")


def staged(path: Path) -> Path:
    """Where the file or folder is to be read on this node: its copy where there is one, else itself."""
    folder = staging_folder()
    if folder is None:
        return path
    copy = place_of(path, folder)
    return copy if copy.exists() else path


def original(path: Path) -> Path:
    """The path by which everybody else knows what lies here."""
    folder = staging_folder()
    return Path("/") / path.relative_to(folder) if folder and path.is_relative_to(folder) else path


def staging_folder() -> Path | None:
    """Of this node; variables in it, as of /scratch/$SLURM_JOB_ID, are the node's.

    Raises:
        UserError: a variable in it is not set here.
    """
    named = os.environ.get(VARIABLE)
    return folder_of(named) if named else None


def folder_of(named: str) -> Path:
    """The folder that a name with variables in it means on this node; UserError where it means none."""
    folder = os.path.expandvars(named)
    if "$" in folder or not os.path.isabs(folder):
        raise UserError(
            f"submit.stage_to={named}: is {folder} on {socket.gethostname()}, which is no folder. It must begin with / once its"
            " variables are filled in, and those must be set on every node."
        )
    return Path(folder).resolve()


def place_of(path: Path, folder: Path) -> Path:
    return folder / path.resolve().relative_to("/")


def stage(paths: Iterable[Path], folder: Path) -> tuple[int, int]:
    """Copy files and folders; what is there with the same size and time stays, and what a folder no longer holds goes from
    its copy. Returns (files copied, bytes copied).

    Can be stopped at any moment: a copy has its name once it is whole.

    Raises:
        UserError: something is missing, or the disk is too small.
    """
    folder, paths = folder.resolve(), list(paths)
    for path in paths:
        _remove_stale(path.resolve(), folder)
    waiting = list(dict.fromkeys(pair for path in paths for pair in _missing(path, folder)))
    size = sum(path.stat().st_size for path, _ in waiting if not path.is_symlink())
    _require_room(folder, size)
    with ThreadPoolExecutor(COPIES) as pool:
        for _ in pool.map(lambda pair: _copy(*pair), waiting):
            pass
    return len(waiting), size


def _missing(path: Path, folder: Path) -> Iterator[tuple[Path, Path]]:
    """Files that have no copy yet, and where it goes."""
    if not path.exists():
        raise UserError(f"{path}: to be copied to {folder} of {socket.gethostname()}, but it is not there.")
    path = path.resolve()
    for file in [path] if path.is_file() else _files(path):
        copy = folder / file.relative_to("/")
        if not _same(file, copy):
            yield file, copy


def _remove_stale(root: Path, folder: Path) -> None:
    """A shard that was taken out of a folder must not be read from its copy."""
    copies = place_of(root, folder)
    if not root.is_dir() or copies.resolve() != copies:  # a link could lead out of the copy
        return
    for copy in _files(copies):
        file = root / copy.relative_to(copies)
        draft = _DRAFT.match(file.name)  # another job of this node may be copying just now
        if not os.path.lexists(file) and not (draft and os.path.lexists(file.with_name(draft[1]))):
            copy.unlink(missing_ok=True)


def _files(root: Path) -> Iterator[Path]:
    for place, folders, names in os.walk(root):
        links = [name for name in folders if Path(place, name).is_symlink()]
        yield from (Path(place, name) for name in sorted([*names, *links]))


def _same(file: Path, copy: Path) -> bool:
    try:
        one, other = file.lstat(), copy.lstat()
    except FileNotFoundError:
        return False
    return file.is_symlink() or (one.st_size, one.st_mtime_ns) == (other.st_size, other.st_mtime_ns)


def _copy(file: Path, copy: Path) -> None:
    draft = copy.with_name(f".{copy.name}.{os.getpid()}")
    copy.parent.mkdir(parents=True, exist_ok=True)
    try:
        if file.is_symlink():
            draft.symlink_to(os.readlink(file))
        elif file.is_file():
            shutil.copyfile(file, draft)
            status = file.stat()
            os.utime(draft, ns=(status.st_atime_ns, status.st_mtime_ns))
        else:
            return  # a pipe or a socket is no data
        os.replace(draft, copy)
    except OSError as error:
        draft.unlink(missing_ok=True)
        what = f"{file} cannot be copied to {copy.parent} of {socket.gethostname()}: {error.strerror}"
        raise UserError(f"{what}. Choose another submit.stage_to, or none.") from error


def _require_room(folder: Path, size: int) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        where = f"{folder} of {socket.gethostname()}"
        raise UserError(f"submit.stage_to: {where} cannot be made: {error.strerror}. Choose another folder.") from error
    if size + SPARE_BYTES > free:
        raise UserError(
            f"submit.stage_to: {folder} of {socket.gethostname()} has {free / 1e9:.1f} GB free, and {size / 1e9:.1f} GB"
            f" would be copied there ({SPARE_BYTES / 1e9:.0f} GB stay free). Choose another folder, or none."
        )


def main(words: list[str]) -> None:
    for number in (signal.SIGUSR1, signal.SIGUSR2):  # that the time is short is for the run to know
        signal.signal(number, signal.SIG_IGN)
    began = time.monotonic()
    try:
        folder = folder_of(words[0])
        count, size = stage(map(Path, words[1:]), folder)
    except UserError as error:
        sys.exit(str(error))
    seconds = time.monotonic() - began
    print(
        f"{socket.gethostname()}: {counted(count, 'file')}, {size / 1e9:.2f} GB copied to {folder} in {seconds:.0f} s",
        flush=True,
    )


if __name__ == "__main__":
    main(sys.argv[1:])
