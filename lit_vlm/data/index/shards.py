"""Where what was read of the sources is kept: in shards of so many records, each a file named by what went into it.

A shard's name is a hash over the records' content and all that decides what is counted, so it can be found again but
never be stale; a file that is torn or not what its name says is no shard.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa

from lit_vlm.files import locked, written
from lit_vlm.types import Fault, RecordError, Source

SHARD_RECORDS = 8192
_LAYOUT = 2  # raise it when shards are cut or written differently


@dataclass(frozen=True, slots=True)
class Span:
    """Records start to stop - 1 of a source; `content` is a key to what they hold and how they are read."""

    source: int  # its number
    start: int
    stop: int
    content: str

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Bad:
    """A record that cannot be used."""

    position: int  # in its shard
    fault: Fault
    reason: str
    remedy: str

    @classmethod
    def of(cls, position: int, error: RecordError) -> Bad:
        return cls(position, error.fault, error.reason, error.remedy)

    def error(self, source: Source, start: int) -> RecordError:
        return RecordError(origin_of(source, start + self.position), self.reason, self.remedy, self.fault)


@dataclass(slots=True)
class Shard:
    """Columns of one length, and the bad records. Positions count from the shard's first record, so that the same
    records make the same shard wherever they stand."""

    columns: dict[str, np.ndarray]
    bad: list[Bad]
    unread: dict[str, int] = field(default_factory=dict)  # keys that nothing is read from -> records that have them


class Shelf:
    """Shards by key: files of a folder, or without one in memory.

    Raises:
        UserError: the folder cannot be written to.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder, self._memory = folder, dict[str, Shard]()

    def get(self, key: str) -> Shard | None:
        """None where there is no such shard, or what is there is torn or something else."""
        if self._folder is None:
            return self._memory.get(key)
        try:
            with pa.memory_map(str(self._path(key))) as stream:
                return _from_table(pa.ipc.open_file(stream).read_all(), key)
        except (OSError, pa.ArrowException, ValueError, KeyError, TypeError):
            return None

    def put(self, key: str, shard: Shard) -> None:
        if self._folder is None:
            self._memory[key] = shard
            return
        table = _to_table(shard, key)
        with written(self._path(key)) as beside, pa.ipc.new_file(str(beside), table.schema) as writer:
            writer.write_table(table)

    def _path(self, key: str) -> Path:
        assert self._folder is not None
        return self._folder / f"{key}.arrow"


def shelf_of(store: Path | None) -> Shelf:
    return Shelf(store and store / "shards")


def key_of(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def origin_of(source: Source, position: int) -> str:
    """Where a person finds the record."""
    origin = getattr(source, "origin", None)
    return origin(position) if origin else f"{source.name}[{position}]"


def spans_of(number: int, source: Source, store: Path | None) -> list[Span]:
    """The source in shards. What their records hold is hashed once and remembered under the source's digest."""
    path = _about(source, store, "json")
    starts = range(0, len(source), SHARD_RECORDS)
    contents = _remembered(path, len(starts)) if path else None
    if contents is None:
        contents = [_content(source, start, min(start + SHARD_RECORDS, len(source))) for start in starts]
        if path:
            with written(path) as beside:
                beside.write_text(json.dumps(contents))
    return [
        Span(number, start, min(start + SHARD_RECORDS, len(source)), content)
        for start, content in zip(starts, contents, strict=True)
    ]


@contextmanager
def alone(source: Source, store: Path | None, task: str) -> Iterator[None]:
    """Of several processes, one at a time does the task over the source; those behind it find it done."""
    path = _about(source, store, f"{task}.lock")
    if path is None:
        yield
        return
    with locked(path):
        yield


def _about(source: Source, store: Path | None, ending: str) -> Path | None:
    key = key_of(_LAYOUT, SHARD_RECORDS, source.name, source.digest)
    return store and store / "sources" / f"{key}.{ending}"


def _remembered(path: Path, count: int) -> list[str] | None:
    try:
        contents = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    good = isinstance(contents, list) and len(contents) == count and all(isinstance(key, str) for key in contents)
    return contents if good else None


def _content(source: Source, start: int, stop: int) -> str:
    digest_of = getattr(source, "digest_of", None)
    if digest_of:
        return key_of(_LAYOUT, stop - start, digest_of(start, stop))
    return key_of(_LAYOUT, source.name, source.digest, start, stop)


def _to_table(shard: Shard, key: str) -> pa.Table:
    bad = json.dumps([[astuple(record) for record in shard.bad], shard.unread])
    metadata = {"key": key, "bad": bad, "checksum": str(_checksum(shard.columns.values(), bad))}
    return pa.table(shard.columns).replace_schema_metadata(metadata)


def _from_table(table: pa.Table, key: str) -> Shard:
    """ValueError or KeyError where it is not the shard of that key."""
    metadata = {name.decode(): value.decode() for name, value in (table.schema.metadata or {}).items()}
    columns = {name: table[name].to_numpy() for name in table.column_names}
    if metadata["key"] != key or int(metadata["checksum"]) != _checksum(columns.values(), metadata["bad"]):
        raise ValueError("not the shard of that key")
    found, unread = json.loads(metadata["bad"])
    bad = [Bad(position, Fault(fault), reason, remedy) for position, fault, reason, remedy in found]
    return Shard(columns, bad, unread)


def _checksum(columns: Iterable[np.ndarray], bad: str) -> int:
    value = zlib.crc32(bad.encode())
    for column in columns:
        value = zlib.crc32(np.ascontiguousarray(column).data, value)
    return value
