"""Cache of arrays: built once, then memory-mapped by every process; one Arrow file for each key."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from lit_vlm.files import atomic_write, lock_file

Arrays = dict[str, np.ndarray]


def hash_facts(facts: Mapping[str, Any]) -> str:
    """Hash a dictionary of plain values into a cache key of 64 hex digits."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def make_arrow_array(values: np.ndarray) -> pa.Array:
    """Make an Arrow array of numbers or bools [n]. `pa.array` would import pandas to ask whether this is one of its types."""
    is_bool = values.dtype == np.bool_
    data = np.packbits(values, bitorder="little") if is_bool else np.ascontiguousarray(values)
    kind = pa.bool_() if is_bool else pa.from_numpy_dtype(values.dtype)
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(data)])


def view_arrow_array(values: pa.Array) -> np.ndarray:
    """View an Arrow array without nulls as a read-only array of numbers or bools [n]; its `to_numpy` would import pandas."""
    data, start, stop = values.buffers()[1], values.offset, values.offset + len(values)
    if pa.types.is_boolean(values.type):
        return np.unpackbits(np.frombuffer(data, np.uint8), count=stop, bitorder="little")[start:].view(np.bool_)
    return np.frombuffer(data, values.type.to_pandas_dtype())[start:stop]


def load_or_build(folder: Path | None, name: str, key: str, build: Callable[[], Arrays]) -> Arrays:
    """Load the arrays of this key from the folder, or build and save them.

    One process builds, the others wait. A file that is incomplete or has another key is built again.

    Args:
        folder: cache folder; None: build in memory and save nothing.
        name: prefix of the file name.
        key: see `hash_facts`.
    """
    if folder is None:
        return build()
    path = folder / f"{name}-{key[:16]}.arrow"
    arrays = _read_arrays(path, key)
    if arrays is None:
        with lock_file(path.with_suffix(".lock")):
            arrays = _read_arrays(path, key)
            if arrays is None:
                _write_arrays(path, key, build())
                arrays = _read_arrays(path, key)
    assert arrays is not None
    return arrays


def _read_arrays(path: Path, key: str) -> Arrays | None:
    """Read a cache file as read-only views; None if it is missing, incomplete, or has another key."""
    try:
        with pa.memory_map(str(path)) as source, pa.ipc.open_file(source) as reader:
            if (reader.schema.metadata or {}).get(b"key") != key.encode():
                return None
            batch = reader.get_batch(0)
            return {name: view_arrow_array(batch.column(name).values) for name in batch.schema.names}
    except (OSError, pa.ArrowException):
        return None


def _write_arrays(path: Path, key: str, arrays: Arrays) -> None:
    """Write one row with a list for each array, atomically: the file is renamed after all bytes are on disk."""
    offsets = {name: pa.array([0, len(array)], pa.int64()) for name, array in arrays.items()}
    lists = [pa.LargeListArray.from_arrays(offsets[name], make_arrow_array(array)) for name, array in arrays.items()]
    batch = pa.RecordBatch.from_arrays(lists, names=list(arrays)).replace_schema_metadata({"key": key})
    with atomic_write(path) as draft, pa.ipc.new_file(str(draft), batch.schema) as writer:
        writer.write_batch(batch)
