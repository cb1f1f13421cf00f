"""Reading of checkpoints: verify all files first, then load on each rank the intervals that it holds."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from lit_vlm.engine.checkpoint.durable import compute_file_digest
from lit_vlm.engine.checkpoint.layout import (
    INDEX_FILE,
    CheckpointIndex,
    CorruptCheckpointError,
    StoredInterval,
    find_coverage_errors,
)
from lit_vlm.engine.shards import TensorShard


def read_index(folder: Path) -> CheckpointIndex:
    """Read and verify the index of a checkpoint folder.

    Raises:
        CorruptCheckpointError: the index is missing, was changed, or belongs to another step.
    """
    file = folder / INDEX_FILE
    try:
        text = file.read_bytes().decode("utf-8", "replace")
    except OSError as error:
        raise CorruptCheckpointError(f"{file} cannot be read ({error.strerror})") from None
    index = CheckpointIndex.from_text(text, file)
    if folder.name != f"step-{index.step:08d}":
        raise CorruptCheckpointError(f"{file} is the index of step {index.step}")
    for error_text in find_coverage_errors(index):
        raise CorruptCheckpointError(f"{file}: {error_text}")
    return index


def check_files(folder: Path, index: CheckpointIndex, rank: int = 0, world_size: int = 1) -> None:
    """Verify the sizes of all files, and the SHA-256 of every `world_size`-th file: together the ranks read each file once.

    Raises:
        CorruptCheckpointError: a file is missing, unreadable or changed. The text names it.
    """
    for stored in index.files:
        file = folder / stored.name
        if not file.is_file():
            raise CorruptCheckpointError(f"{file} is missing")
        if file.stat().st_size != stored.size:
            raise CorruptCheckpointError(f"{file} has {file.stat().st_size:,} bytes and had {stored.size:,}")
    for stored in index.files[rank::world_size]:
        try:
            digest = compute_file_digest(folder / stored.name)
        except OSError as error:
            raise CorruptCheckpointError(f"{folder / stored.name} cannot be read ({error.strerror})") from None
        if digest != stored.sha256:
            raise CorruptCheckpointError(f"{folder / stored.name} is not as it was written: its SHA-256 differs")


def find_state_mismatches(
    index: CheckpointIndex, shapes: dict[str, tuple[int, ...]], shards: Iterable[TensorShard] = ()
) -> list[str]:
    """Find differences between the stored tensors and the trainable parameters. Returns one text for each.

    Args:
        shapes: name -> shape of each trainable parameter.
        shards: shards that this rank will load.
    """
    stored, tensors = index.get_shapes(), index.group_by_tensor()
    missing_kinds = {
        shard.kind for shard in shards if (str(shard.kind), shard.name) not in tensors and shard.name in stored
    }
    mismatches = [f"it lacks {name}" for name in shapes.keys() - stored.keys()]
    mismatches += [f"it has {name}, which does not train" for name in stored.keys() - shapes.keys()]
    for name in stored.keys() & shapes.keys():
        if stored[name] != tuple(shapes[name]):
            mismatches.append(f"{name} is {list(stored[name])} in it and {list(shapes[name])} here")
    return sorted(mismatches) + [f"it lacks the optimizer's {kind}" for kind in sorted(missing_kinds)]


def load_tensors(folder: Path, index: CheckpointIndex, shards: Iterable[TensorShard]) -> None:
    """Load the stored values into the shards of this rank, in place. Any rank may have written them.

    Only the needed parts of each file are read.

    Args:
        shards: values [n] of each are overwritten.
    """
    tensors, open_files = index.group_by_tensor(), dict[str, Any]()
    starts = {key: [stored.start for stored in intervals] for key, intervals in tensors.items()}
    with torch.no_grad():
        for shard in shards:
            key, end = (str(shard.kind), shard.name), shard.start + len(shard.values)
            first = bisect_right(starts[key], shard.start) - 1
            for stored in tensors[key][max(0, first) :]:
                if stored.start >= end:
                    break
                if stored.file not in open_files:
                    open_files[stored.file] = safe_open(folder / stored.file, framework="pt")
                _copy_overlap(open_files[stored.file], stored, shard)


def _copy_overlap(file: Any, stored: StoredInterval, shard: TensorShard) -> None:
    """Copy the elements that a stored interval and a shard have in common."""
    begin, end = max(stored.start, shard.start), min(stored.stop, shard.start + len(shard.values))
    if begin < end:
        values = file.get_slice(stored.key)[begin - stored.start : end - stored.start]
        shard.values[begin - shard.start : end - shard.start].copy_(values)
