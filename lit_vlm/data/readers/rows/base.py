"""Protocol of rows for every kind of file, and rows of several files joined into one."""

from __future__ import annotations

import bisect
import itertools
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from lit_vlm.data.lazy_images import format_untrusted
from lit_vlm.data.staging import resolve_original_path


class Hasher(Protocol):
    """A hash object of hashlib."""

    def update(self, data: bytes, /) -> None: ...


class Rows(Protocol):
    """Rows by position. `rows[i]` raises RecordError for a row that is no JSON object or cannot be read."""

    def __len__(self) -> int: ...

    def get_origin(self, index: int) -> str:
        """Return the row's file and position, for error messages."""
        ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...

    def update_hash(self, hasher: Hasher, start: int, stop: int) -> None:
        """Update the hasher with the content of rows start to stop - 1."""
        ...


class JoinedRows:
    """Rows of several files, one file after the other."""

    def __init__(self, parts: Sequence[Rows]) -> None:
        self._parts, self._ends = list(parts), list(itertools.accumulate(map(len, parts)))

    @property
    def file_starts(self) -> list[int]:
        """The first row of each file that has rows."""
        starts = zip([0, *self._ends], self._ends, strict=False)
        return [start for start, end in starts if end > start]

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def get_origin(self, index: int) -> str:
        part, index = self._find_part(index)
        return part.get_origin(index)

    def __getitem__(self, index: int) -> dict[str, Any]:
        part, index = self._find_part(index)
        return part[index]

    def update_hash(self, hasher: Hasher, start: int, stop: int) -> None:
        for number, first, last in split_range(self._ends, start, stop):
            self._parts[number].update_hash(hasher, first, last)

    def _find_part(self, index: int) -> tuple[Rows, int]:
        part = bisect.bisect_right(self._ends, index)
        return self._parts[part], index - (self._ends[part - 1] if part else 0)


class DuplicateKeyError(Exception):
    """A JSON object has a duplicate key, so its value is ambiguous."""


def build_unique_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a dict of the pairs, as the `object_pairs_hook` of json; raise DuplicateKeyError for a duplicate key."""
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [key for key, _ in pairs]
        key = next(key for key in names if names.count(key) > 1)
        raise DuplicateKeyError(
            f"the key {format_untrusted(key, 40)} stands twice in one object; only one of them can be meant"
        )
    return result


def split_range(ends: Sequence[int], start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Split the range start to stop - 1 at the ends of the parts, and yield (part, start, stop) relative to each part."""
    for part in range(bisect.bisect_right(ends, start), len(ends)):
        part_start = ends[part - 1] if part else 0
        if part_start >= stop:
            return
        if ends[part] > part_start:
            yield part, max(start, part_start) - part_start, min(stop, ends[part]) - part_start


def list_file_identities(paths: Iterable[Path]) -> list[tuple[str, int, int]]:
    """List the identities of files, as `get_file_identity`. The links of a folder's path are resolved once for all its files."""
    folders: dict[str, str] = {}
    identities = []
    for path in paths:
        folder, name = os.path.split(path)
        status = os.lstat(path)
        if stat.S_ISLNK(status.st_mode) or name in ("", ".."):
            identities.append(get_file_identity(path))
            continue
        if folder not in folders:
            folders[folder] = str(resolve_original_path(Path(folder).resolve()))
        identities.append((os.path.join(folders[folder], name), status.st_size, status.st_mtime_ns))
    return identities


def get_file_identity(path: Path) -> tuple[str, int, int]:
    """Return a file's identity: path, size in bytes, modification time in nanoseconds.

    A staged copy has the path of its original.
    """
    status = path.stat()
    return str(resolve_original_path(path.resolve())), status.st_size, status.st_mtime_ns
