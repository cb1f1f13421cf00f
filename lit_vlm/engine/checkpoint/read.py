"""Reading of checkpoints: verify all files first, then load on each rank the intervals that it holds."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from lit_vlm.engine.checkpoint.durable import digest_of
from lit_vlm.engine.checkpoint.layout import INDEX, Damaged, Index, Interval, uncovered
from lit_vlm.engine.shards import Piece


def read_index(folder: Path) -> Index:
    """Read and verify the index of a checkpoint folder.

    Raises:
        CorruptCheckpointError: the index is missing, was changed, or belongs to another step.
    """
    file = folder / INDEX
    try:
        text = file.read_bytes().decode("utf-8", "replace")
    except OSError as error:
        raise Damaged(f"{file} cannot be read ({error.strerror})") from None
    index = Index.from_text(text, file)
    if folder.name != f"step-{index.step:08d}":
        raise Damaged(f"{file} is the index of step {index.step}")
    for error_text in uncovered(index):
        raise Damaged(f"{file}: {error_text}")
    return index


def check_files(folder: Path, index: Index, rank: int = 0, world_size: int = 1) -> None:
    """Verify the sizes of all files, and the SHA-256 of every `world_size`-th file: together the ranks read each file once.

    Raises:
        CorruptCheckpointError: a file is missing, unreadable or changed. The text names it.
    """
    for stored in index.files:
        file = folder / stored.name
        if not file.is_file():
            raise Damaged(f"{file} is missing")
        if file.stat().st_size != stored.size:
            raise Damaged(f"{file} has {file.stat().st_size:,} bytes and had {stored.size:,}")
    for stored in index.files[rank::world_size]:
        try:
            digest = digest_of(folder / stored.name)
        except OSError as error:
            raise Damaged(f"{folder / stored.name} cannot be read ({error.strerror})") from None
        if digest != stored.sha256:
            raise Damaged(f"{folder / stored.name} is not as it was written: its SHA-256 differs")


def misfits(index: Index, shapes: dict[str, tuple[int, ...]], pieces: Iterable[Piece] = ()) -> list[str]:
    """Find differences between the stored tensors and the trainable parameters. Returns one text for each.

    Args:
        shapes: name -> shape of each trainable parameter.
        shards: shards that this rank will load.
    """
    stored, tensors = index.shapes(), index.tensors()
    missing_kinds = {
        shard.kind for shard in pieces if (str(shard.kind), shard.name) not in tensors and shard.name in stored
    }
    mismatches = [f"it lacks {name}" for name in shapes.keys() - stored.keys()]
    mismatches += [f"it has {name}, which does not train" for name in stored.keys() - shapes.keys()]
    for name in stored.keys() & shapes.keys():
        if stored[name] != tuple(shapes[name]):
            mismatches.append(f"{name} is {list(stored[name])} in it and {list(shapes[name])} here")
    return sorted(mismatches) + [f"it lacks the optimizer's {kind}" for kind in sorted(missing_kinds)]


def load(folder: Path, index: Index, pieces: Iterable[Piece]) -> None:
    """Load the stored values into the shards of this rank, in place. Any rank may have written them.

    Only the needed parts of each file are read.

    Args:
        shards: values [n] of each are overwritten.
    """
    tensors, open_files = index.tensors(), dict[str, Any]()
    starts = {key: [stored.start for stored in intervals] for key, intervals in tensors.items()}
    with torch.no_grad():
        for shard in pieces:
            key, end = (str(shard.kind), shard.name), shard.start + len(shard.values)
            first = bisect_right(starts[key], shard.start) - 1
            for stored in tensors[key][max(0, first) :]:
                if stored.start >= end:
                    break
                if stored.file not in open_files:
                    open_files[stored.file] = safe_open(folder / stored.file, framework="pt")
                _copy(open_files[stored.file], stored, shard)


def _copy(file: Any, part: Interval, piece: Piece) -> None:
    """Copy the elements that a stored interval and a shard have in common."""
    begin, end = max(part.start, piece.start), min(part.stop, piece.start + len(piece.values))
    if begin < end:
        values = file.get_slice(part.key)[begin - part.start : end - part.start]
        piece.values[begin - piece.start : end - piece.start].copy_(values)
