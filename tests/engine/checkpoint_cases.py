"""A small state, sliced over any number of ranks as strategies hold it, and ways to damage the written files."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import torch

from lit_vlm.checkpoint.folder import CheckpointFolder
from lit_vlm.checkpoint.index import CheckpointIndex
from lit_vlm.checkpoint.write import CheckpointWriter
from lit_vlm.distributed.sharded_state import StateKind, TensorShard

SHAPES = {"model.projector.weight": (40, 60), "model.projector.bias": (60,), "lm_head.weight": (90, 50), "scale": (1,)}


class SlicedState:
    """A rank's share of a state: every flattened tensor in equal slices; those of the last ranks may be short or empty.

    Args:
        rows: slice between rows, as FSDP2 does, and not anywhere, as ZeRO does.
    """

    is_writer = True

    def __init__(self, rank: int = 0, world_size: int = 1, *, seed: int = 0, rows: bool = False) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.held: list[TensorShard] = []
        self.count = -1
        for kind in StateKind:
            for name, shape in SHAPES.items():
                whole = torch.randn(shape, generator=generator).flatten()
                unit = whole.numel() // shape[0] if rows else 1
                size = -(-whole.numel() // unit // world_size) * unit
                part = whole[rank * size : (rank + 1) * size].clone()
                self.held.append(TensorShard(name, kind, shape, min(rank * size, whole.numel()), part))

    def iter_shards(self) -> Iterator[TensorShard]:
        return iter(self.held)

    def sync_after_load(self, step: int) -> None:
        self.count = step

    def equals(self, other: "SlicedState") -> bool:
        return all(torch.equal(a.values, b.values) for a, b in zip(self.held, other.held, strict=True))


def make_index(step: int, **facts) -> CheckpointIndex:
    state = {"callbacks": {}, "precision": {}, "log": [0, None]}
    return CheckpointIndex(step=step, updates=step, intervals=[], files=[], belongs=facts, state=state)


def save_checkpoint(path: Path, step: int, shards: list[SlicedState], keep_last: int = 9, **facts) -> Path:
    """Write a checkpoint from one rank after the other; rank 0 is last because it waits for the others."""
    folder = CheckpointFolder(path)
    for rank in reversed(range(len(shards))):
        writer = CheckpointWriter(
            folder, rank=rank, writer_ranks=range(len(shards)), keep_last=keep_last, timeout_seconds=60
        )
        writer.start(make_index(step, **facts), list(shards[rank].iter_shards()), asynchronous=False)
        assert writer.wait() is None, writer.error
    return folder.get_step_path(step)


def make_slices(world_size: int, *, seed: int = 0, rows: bool = False) -> list[SlicedState]:
    return [SlicedState(rank, world_size, seed=seed, rows=rows) for rank in range(world_size)]


def list_tensor_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def truncate(folder: Path, before: Path, rng: Random) -> str:
    file = rng.choice([*list_tensor_files(folder), folder / "index.json"])
    content = file.read_bytes()
    file.write_bytes(content[: rng.randrange(len(content))])
    return file.name


def flip_a_bit(folder: Path, before: Path, rng: Random) -> str:
    file = rng.choice(list_tensor_files(folder))
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)
    return file.name


def zero_a_page(folder: Path, before: Path, rng: Random) -> str:
    file = rng.choice(list_tensor_files(folder))
    content = bytearray(file.read_bytes())
    start = rng.randrange(len(content) - 64)
    end = min(start + 4096, len(content))
    content[start:end] = bytes(end - start)
    file.write_bytes(content)
    return file.name


def swap_two(folder: Path, before: Path, rng: Random) -> str:
    """Swap two files of one checkpoint; if there is only one, replace it with the file of another step."""
    files = list_tensor_files(folder)
    if len(files) == 1:
        shutil.copy(list_tensor_files(before)[0], files[0])
        return files[0].name
    one, other = rng.sample(files, 2)
    contents = one.read_bytes(), other.read_bytes()
    one.write_bytes(contents[1])
    other.write_bytes(contents[0])
    return "rank-"


def delete(folder: Path, before: Path, rng: Random) -> str:
    file = rng.choice([*list_tensor_files(folder), folder / "index.json"])
    file.unlink()
    return file.name


def restore_old_index(folder: Path, before: Path, rng: Random) -> str:
    shutil.copy(before / "index.json", folder / "index.json")
    return "index.json"


def edit_json(folder: Path, before: Path, rng: Random) -> str:
    """Change a number, a name or an interval in the JSON, which stays valid."""
    file = folder / "index.json"
    body = json.loads(file.read_text(encoding="utf-8"))
    one = rng.choice(body["intervals"])
    change: list[Callable[[], object]] = [
        lambda: one.update(start=one["start"] + 1),
        lambda: one.update(stop=one["stop"] - 1),
        lambda: one.update(name=one["name"] + "x"),
        lambda: one.update(shape=[*one["shape"], 1]),
        lambda: body["intervals"].remove(one),
        lambda: body["intervals"].append(dict(one)),
        lambda: body.update(updates=body["updates"] + 1),
        lambda: body["files"][0].update(size=body["files"][0]["size"] + 1),
        lambda: body.update(belongs={}),
    ]
    rng.choice(change)()
    file.write_text(json.dumps(body), encoding="utf-8")
    return file.name


DAMAGES = (truncate, flip_a_bit, zero_a_page, swap_two, delete, restore_old_index, edit_json)
