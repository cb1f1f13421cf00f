"""Arrays that are built once and then mapped into memory by every process: one Arrow file for each key."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from lit_vlm.files import locked, written

Arrays = dict[str, np.ndarray]


def key_of(facts: Mapping[str, Any]) -> str:
    """64 hex digits, of plain values."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def kept(folder: Path | None, name: str, key: str, build: Callable[[], Arrays]) -> Arrays:
    """The arrays of this key: mapped from the folder, or built and put there. None: built, in memory alone.

    Of several processes the first builds and the others wait. A file that is torn or of another key is built again.
    """
    if folder is None:
        return build()
    path = folder / f"{name}-{key[:16]}.arrow"
    arrays = _read(path, key)
    if arrays is None:
        with locked(path.with_suffix(".lock")):
            arrays = _read(path, key)
            if arrays is None:
                _write(path, key, build())
                arrays = _read(path, key)
    assert arrays is not None
    return arrays


def _read(path: Path, key: str) -> Arrays | None:
    """Read-only views of the file; None when it is not there, torn, or of another key."""
    try:
        with pa.memory_map(str(path)) as source, pa.ipc.open_file(source) as reader:
            if (reader.schema.metadata or {}).get(b"key") != key.encode():
                return None
            batch = reader.get_batch(0)
            return {name: batch.column(name).values.to_numpy(zero_copy_only=True) for name in batch.schema.names}
    except (OSError, pa.ArrowException):
        return None


def _write(path: Path, key: str, arrays: Arrays) -> None:
    """One row, with a list for each array; moved into place when all of it is on the disk."""
    offsets = {name: pa.array([0, len(array)], pa.int64()) for name, array in arrays.items()}
    lists = [pa.LargeListArray.from_arrays(offsets[name], pa.array(array)) for name, array in arrays.items()]
    batch = pa.RecordBatch.from_arrays(lists, names=list(arrays)).replace_schema_metadata({"key": key})
    with written(path) as draft, pa.ipc.new_file(str(draft), batch.schema) as writer:
        writer.write_batch(batch)
