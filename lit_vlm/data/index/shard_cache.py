"""Cache of the sample index in shards: each shard covers a fixed number of records and is one file.

The file name of a shard is a hash of the content of its records and of all settings that influence the index. So a shard
is found again, but never outdated. A file that is incomplete, or has other content than its name says, is ignored.
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

from lit_vlm.data.packing.array_cache import make_arrow_array, view_arrow_array
from lit_vlm.files import atomic_write, lock_file, read_json_or_none
from lit_vlm.types import Fault, RecordError, Source

SHARD_RECORDS = 8192
_LAYOUT_VERSION = 2  # increase it when shards are divided or written differently


@dataclass(frozen=True, slots=True)
class ShardRange:
    """Range of records of a shard: start to stop - 1 of a source; `content_key` hashes their content and reader settings."""

    source_id: int  # number of the source
    start: int
    stop: int
    content_key: str

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class BadRecord:
    """Unusable record, as it is stored in a shard."""

    position: int  # within its shard
    fault: Fault
    reason: str
    remedy: str

    @classmethod
    def from_error(cls, position: int, error: RecordError) -> BadRecord:
        """Create it from the error of the record."""
        return cls(position, error.fault, error.reason, error.remedy)

    def to_error(self, source: Source, start: int) -> RecordError:
        """Restore the error; `start` is the first record of the shard."""
        return RecordError(get_origin(source, start + self.position), self.reason, self.remedy, self.fault)


@dataclass(slots=True)
class Shard:
    """Shard of the index: columns of equal length, and the bad records.

    Positions are relative to the first record of the shard, so that equal records give an equal shard anywhere.
    """

    columns: dict[str, np.ndarray]
    bad_records: list[BadRecord]
    unused_keys: dict[str, int] = field(default_factory=dict)  # keys that are not read -> number of records


class ShardCache:
    """Cache of shards by key: files in a folder, or in memory without a folder.

    Raises:
        UserError: the folder is not writable.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder, self._memory = folder, dict[str, Shard]()

    def get(self, key: str) -> Shard | None:
        """Get a shard; None if it is missing, incomplete, or not the shard of this key."""
        if self._folder is None:
            return self._memory.get(key)
        try:
            with pa.memory_map(str(self._get_path(key))) as stream:
                return _from_table(pa.ipc.open_file(stream).read_all(), key)
        except (OSError, pa.ArrowException, ValueError, KeyError, TypeError):
            return None

    def put(self, key: str, shard: Shard) -> None:
        """Write a shard atomically."""
        if self._folder is None:
            self._memory[key] = shard
            return
        table = _to_table(shard, key)
        with atomic_write(self._get_path(key)) as temporary, pa.ipc.new_file(str(temporary), table.schema) as writer:
            writer.write_table(table)

    def _get_path(self, key: str) -> Path:
        assert self._folder is not None
        return self._folder / f"{key}.arrow"


def open_shard_cache(store: Path | None) -> ShardCache:
    """Open the shard cache of a store; None: in memory."""
    return ShardCache(store and store / "shards")


def hash_parts(*parts: object) -> str:
    """Hash plain values into a cache key of 64 hex digits."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def get_origin(source: Source, position: int) -> str:
    """Get the location of a record for the user, such as file and line."""
    origin = getattr(source, "origin", None)
    return origin(position) if origin else f"{source.name}[{position}]"


def list_shard_ranges(source_id: int, source: Source, store: Path | None) -> list[ShardRange]:
    """List the shard ranges of a source. Their content keys are computed once, then cached by the source's digest."""
    path = _get_source_path(source, store, "json")
    starts = range(0, len(source), SHARD_RECORDS)
    contents = _read_content_keys(path, len(starts)) if path else None
    if contents is None:
        contents = [_compute_content_key(source, start, min(start + SHARD_RECORDS, len(source))) for start in starts]
        if path:
            with atomic_write(path) as temporary:
                temporary.write_text(json.dumps(contents))
    return [
        ShardRange(source_id, start, min(start + SHARD_RECORDS, len(source)), content)
        for start, content in zip(starts, contents, strict=True)
    ]


@contextmanager
def lock_source(source: Source, store: Path | None, task: str) -> Iterator[None]:
    """Lock a source for a task, with a lock file: one process works, the others wait and then find the result."""
    path = _get_source_path(source, store, f"{task}.lock")
    if path is None:
        yield
        return
    with lock_file(path):
        yield


def _get_source_path(source: Source, store: Path | None, ending: str) -> Path | None:
    """Get the path of a file about a source in the store; None without a store."""
    key = hash_parts(_LAYOUT_VERSION, SHARD_RECORDS, source.name, source.digest)
    return store and store / "sources" / f"{key}.{ending}"


def _read_content_keys(path: Path, count: int) -> list[str] | None:
    contents = read_json_or_none(path)
    is_valid = isinstance(contents, list) and len(contents) == count and all(isinstance(key, str) for key in contents)
    return contents if is_valid else None


def _compute_content_key(source: Source, start: int, stop: int) -> str:
    """Compute the content key of records start to stop - 1."""
    digest_of = getattr(source, "digest_of", None)
    if digest_of:
        return hash_parts(_LAYOUT_VERSION, stop - start, digest_of(start, stop))
    return hash_parts(_LAYOUT_VERSION, source.name, source.digest, start, stop)


def _to_table(shard: Shard, key: str) -> pa.Table:
    bad = json.dumps([[astuple(record) for record in shard.bad_records], shard.unused_keys])
    metadata = {"key": key, "bad": bad, "checksum": str(_compute_checksum(shard.columns.values(), bad))}
    columns = {name: make_arrow_array(column) for name, column in shard.columns.items()}
    return pa.table(columns).replace_schema_metadata(metadata)


def _from_table(table: pa.Table, key: str) -> Shard:
    """Restore a shard. Raises ValueError or KeyError if it is not the shard of this key."""
    metadata = {name.decode(): value.decode() for name, value in (table.schema.metadata or {}).items()}
    columns = {name: view_arrow_array(table[name].combine_chunks()) for name in table.column_names}
    if metadata["key"] != key or int(metadata["checksum"]) != _compute_checksum(columns.values(), metadata["bad"]):
        raise ValueError("not the shard of that key")
    values, unused_keys = json.loads(metadata["bad"])
    bad_records = [BadRecord(position, Fault(fault), reason, remedy) for position, fault, reason, remedy in values]
    return Shard(columns, bad_records, unused_keys)


def _compute_checksum(columns: Iterable[np.ndarray], bad_records: str) -> int:
    value = zlib.crc32(bad_records.encode())
    for column in columns:
        value = zlib.crc32(np.ascontiguousarray(column).data, value)
    return value
