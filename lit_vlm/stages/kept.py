"""Disk cache of frozen-model outputs, one entry for each record, in files that other runs reuse.

One folder belongs to one combination of weights, template, image settings and precision; its name is their digest.
Files are written atomically, and the files of a pass that was interrupted are used.

A record is identified by its key and by the content of its images: another image under the same name makes it another
record.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lit_vlm.files import atomic_write
from lit_vlm.model.tensor_files import raise_os_errors
from lit_vlm.types import Batch, UserError

VERSION = 2  # increase it when the same model and data give other numbers
PART_BYTES = 1 << 26  # minimum size of a file; the last one of a pass is smaller


def compute_cache_key(**inputs: Any) -> str:
    """Compute the folder name: a digest of everything that the numbers depend on."""
    text = json.dumps([VERSION, inputs], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class RecordCache:
    """Cache of rows [n, ...] by record; the rows of a record may have several parts, with known counts.

    Args:
        folder: where the files are; None: in memory only.
        label: name of the content, for messages.
        setting: the setting that enables this cache.
    """

    def __init__(self, folder: Path | None, label: str, setting: str) -> None:
        self.folder, self.label, self.setting = folder, label, setting
        self._pending: list[tuple[int, int, Sequence[int], Tensor]] = []
        self._pending_bytes = 0
        self._part_values: list[Any] = []  # of each file, read on request; in memory: tensors
        self._keys, self._record_hashes = np.empty(0, np.uint64), np.empty(0, np.uint64)
        self._locations, self._counts = np.empty((0, 2), np.int64), np.empty((0, 0), np.int64)
        self.read()

    def read(self) -> None:
        """Read the index of all files in the folder, including those of other runs and ranks."""
        files = sorted(self.folder.glob("part-*.safetensors")) if self.folder else []
        parts = [_open_part(file) for file in files] + ([_pack_records(self._pending)] if self._pending else [])
        if not parts:
            return
        keys, contents = (
            np.concatenate([part[name].numpy().view(np.uint64) for part in parts]) for name in ("keys", "contents")
        )
        counts = [part["counts"].numpy() for part in parts]
        locations = [np.stack([np.full(len(c), n), np.cumsum([0, *c.sum(1)])[:-1]], 1) for n, c in enumerate(counts)]
        self._keys = np.unique(keys)
        self._record_hashes, indices = np.unique(_hash_records(keys, contents), return_index=True)
        self._counts, self._locations = np.concatenate(counts)[indices], np.concatenate(locations)[indices]
        self._part_values = [part["values"] for part in parts]

    def has_keys(self, keys: np.ndarray) -> np.ndarray:
        """Return [keys] bool: True for keys in the cache, whatever the content of their images."""
        return np.isin(keys, self._keys)

    def find_missing(self, keys: np.ndarray, contents: np.ndarray) -> np.ndarray:
        """Find the records that are not in the cache, [keys] bool."""
        return ~np.isin(_hash_records(keys, contents), self._record_hashes)

    def add(self, key: int, content: int, counts: Sequence[int], rows: Tensor) -> None:
        """Add the rows of a record; `counts` sums to their number."""
        self._pending.append((key, content, counts, rows.detach().cpu()))
        self._pending_bytes += rows.numel() * rows.element_size()
        if self.folder is not None and self._pending_bytes > PART_BYTES:
            self.write()

    def write(self) -> None:
        """Write the pending records to a new file, atomically.

        Raises:
            UserError: there is no space or no permission.
        """
        if self.folder is None or not self._pending:
            return
        with (
            atomic_write(self.folder / f"part-{uuid4().hex}.safetensors", self.label.capitalize()) as temporary,
            raise_os_errors(),
        ):
            save_file(_pack_records(self._pending), temporary)
        self._pending, self._pending_bytes = [], 0

    def gather_from_ranks(self) -> None:
        """Gather the pending records of all ranks on every rank, for a cache in memory. All ranks call it together."""
        pending_by_rank: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(pending_by_rank, self._pending)
        self._pending = [record for pending in pending_by_rank for record in pending]

    def get_rows(self, batch: Batch, record: int, counts: Sequence[int]) -> Tensor:
        """Get the rows of the record at this position of the batch.

        Raises:
            UserError: the record is not in the cache, or has other counts or other images now.
        """
        key, content = (np.array([column[record]], np.uint64) for column in (batch.record_keys, batch.image_hashes))
        (record_hash,) = _hash_records(key, content)
        place = int(np.searchsorted(self._record_hashes, record_hash))
        known = place < len(self._record_hashes) and self._record_hashes[place] == record_hash
        if not known or self._counts[place].tolist() != list(counts):
            raise UserError(
                f"{batch.sample_ids[record]}: {self._describe_missing(key, known)} or train with {self.setting}=false."
            )
        part, start = self._locations[place].tolist()
        return self._part_values[part][start : start + sum(counts)]

    def _describe_missing(self, key: np.ndarray, known: bool) -> str:
        """Describe why a record is not in the cache."""
        label = f"{self.label} ({self.folder or 'in memory'})"
        if known or not self.has_keys(key).all():
            return f"{label} lack this record as it is now. Remove that folder,"
        return (
            f"its pictures hold something else than when {label} were made of them: a file was replaced under the same name. "
            "Start again, and this record is looked at anew,"
        )


def _hash_records(keys: np.ndarray, contents: np.ndarray) -> np.ndarray:
    """Hash each (key, content) pair to a uint64, [keys].

    Multiplication by an odd number modulo 2^64 is one-to-one, so different contents give different terms.
    """
    return keys + contents * np.uint64(0x9E3779B97F4A7C15)


def _pack_records(pending: Sequence[tuple[int, int, Sequence[int], Tensor]]) -> dict[str, Tensor]:
    keys, contents, counts, values = zip(*pending, strict=True)
    return {
        "keys": torch.from_numpy(np.array(keys, np.uint64).view(np.int64)),
        "contents": torch.from_numpy(np.array(contents, np.uint64).view(np.int64)),
        "counts": torch.tensor(counts),
        "values": torch.cat(values),
    }


def _open_part(file: Path) -> dict[str, Any]:
    """Open a file of the cache and check that it is complete; values are not read yet."""
    try:
        part = safe_open(file, framework="pt")
        tensors = {name: part.get_tensor(name) for name in ("keys", "contents", "counts")}
        tensors["values"] = part.get_slice("values")
        is_complete = int(tensors["counts"].sum()) == tensors["values"].get_shape()[0]
        is_complete = is_complete and len(tensors["keys"]) == len(tensors["contents"]) == len(tensors["counts"])
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: cannot be read ({error}). Remove it; what it held is made again.") from error
    if not is_complete:
        raise UserError(f"{file}: is damaged. Remove it; what it held is made again.")
    return tensors
