"""What rows of every kind of file have in common, and several files as one."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from lit_vlm.data.images import shown
from lit_vlm.data.staging import original


class Hasher(Protocol):
    def update(self, data: bytes, /) -> None: ...


class Rows(Protocol):
    """`origin` names a row for people; `rows[i]` raises RecordError for a row that is no object."""

    def __len__(self) -> int: ...

    def origin(self, index: int) -> str: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...

    def update(self, hasher: Hasher, start: int, stop: int) -> None:
        """Feed the hasher with what rows start to stop - 1 hold."""
        ...


class JoinedRows:
    """The rows of several files, one after the other."""

    def __init__(self, parts: Sequence[Rows]) -> None:
        self._parts, self._ends = list(parts), list(itertools.accumulate(map(len, parts)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def origin(self, index: int) -> str:
        part, index = self._find(index)
        return part.origin(index)

    def __getitem__(self, index: int) -> dict[str, Any]:
        part, index = self._find(index)
        return part[index]

    def update(self, hasher: Hasher, start: int, stop: int) -> None:
        for number, first, last in split_at(self._ends, start, stop):
            self._parts[number].update(hasher, first, last)

    def _find(self, index: int) -> tuple[Rows, int]:
        part = bisect.bisect_right(self._ends, index)
        return self._parts[part], index - (self._ends[part - 1] if part else 0)


class KeyTwice(Exception):
    """An object of JSON names a key twice, and which of the two is meant nobody knows."""


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these pairs: json's `object_pairs_hook`. Raises KeyTwice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [key for key, _ in pairs]
        key = next(key for key in names if names.count(key) > 1)
        raise KeyTwice(f"the key {shown(key, 40)} stands twice in one object; only one of them can be meant")
    return found


def split_at(ends: Sequence[int], start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """(part, start, stop within it) of a stretch that may cross parts, which end at `ends`."""
    for number in range(bisect.bisect_right(ends, start), len(ends)):
        begin = ends[number - 1] if number else 0
        if begin >= stop:
            return
        if ends[number] > begin:
            yield number, max(start, begin) - begin, min(stop, ends[number]) - begin


def identity(path: Path) -> tuple[str, int, int]:
    """A file as it is now: path, bytes, and nanoseconds of its last change. A staged copy is its original."""
    status = path.stat()
    return str(original(path.resolve())), status.st_size, status.st_mtime_ns
