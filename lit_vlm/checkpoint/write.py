"""Asynchronous writing of checkpoints: each rank writes its own files, rank 0 writes the index and renames the folder.

During the writing, ranks communicate through the file system only. A collective call in the writer thread could pair
with a collective call of the training thread.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_vlm.checkpoint.folder import CheckpointFolder, remove_folder
from lit_vlm.checkpoint.index import INDEX_FILE, CheckpointIndex, StoredFile, StoredInterval
from lit_vlm.distributed.sharded_state import TensorShard
from lit_vlm.files import write_text_atomically

MAX_FILE_BYTES = 4 << 30  # a new file begins at this size; a single larger tensor has a file of its own
SAFETENSORS_DTYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float64: "F64",
    torch.int64: "I64",
}  # safetensors' names
BLOCK_BYTES = 1 << 24  # bytes that are written and hashed in one call, which releases Python's global lock
POLL_SECONDS = 0.01
ABORT_WAIT_SECONDS = 20.0  # maximum wait for ranks that are still writing, after an error ended the run


class CheckpointWriter:
    """Writer of one rank's part of checkpoints, one checkpoint at a time.

    Args:
        folder: folder of all checkpoints of the run.
        rank: this rank.
        writer_ranks: ranks that write, the same list on all ranks.
        keep_last: number of checkpoints to keep. Older ones are removed once a newer one is complete.
        timeout_seconds: maximum time that rank 0 waits for the files of other ranks.
    """

    def __init__(
        self,
        folder: CheckpointFolder,
        *,
        rank: int = 0,
        writer_ranks: Sequence[int] = (0,),
        keep_last: int = 2,
        timeout_seconds: float = 1800.0,
    ) -> None:
        self.folder, self.rank, self.writer_ranks = folder, rank, list(writer_ranks)
        self.keep_last, self.timeout_seconds = keep_last, timeout_seconds
        self.error: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._host_buffers: dict[tuple[str, str, int], torch.Tensor] = {}  # reused buffers in host memory
        self._abort_time: float | None = None  # time at which the run ended with an error

    def start(self, index: CheckpointIndex, shards: Sequence[TensorShard], *, asynchronous: bool) -> None:
        """Start to write the shards of this rank. `wait` returns the result. The shards may change once this returns.

        Args:
            index: index of this checkpoint, still without intervals and files.
            asynchronous: copy the shards to host memory, and write them in a thread.
        """
        assert self._thread is None
        if not asynchronous:
            self._write(index, shards)
            return
        copies = self._copy_to_host(shards)
        self._thread = threading.Thread(target=self._write, args=(index, copies), name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self, *, aborting: bool = False) -> BaseException | None:
        """Wait until the started checkpoint is written. Returns the error if it failed, else None.

        Args:
            aborting: the run ends with an error, so other ranks may never finish their parts.
        """
        if self._thread is not None:
            self._abort_time = time.monotonic() if aborting else None
            self._thread.join()
            self._thread = None
        return self.error

    def _copy_to_host(self, shards: Sequence[TensorShard]) -> list[TensorShard]:
        copies = []
        for shard in shards:
            key, values = (str(shard.kind), shard.name, shard.start), shard.values
            if key not in self._host_buffers:
                self._host_buffers[key] = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
            self._host_buffers[key].copy_(values.detach(), non_blocking=True)
            copies.append(replace(shard, values=self._host_buffers[key]))
        if any(shard.values.is_cuda for shard in shards):
            torch.cuda.current_stream().synchronize()
        return copies

    def _write(self, index: CheckpointIndex, shards: Sequence[TensorShard]) -> None:
        folder = self.folder.get_temporary_path(index.step)
        try:
            if self.rank in self.writer_ranks:
                folder.mkdir(parents=True, exist_ok=True)
                intervals, files = write_shards(folder, self.rank, shards)
                if self.rank:
                    part = json.dumps([list(map(asdict, intervals)), list(map(asdict, files))])
                    write_text_atomically(folder / _get_part_name(self.rank), part, remove_secrets=False)
            if self.rank == 0:
                self._merge_parts(
                    folder, index, intervals if 0 in self.writer_ranks else [], files if 0 in self.writer_ranks else []
                )
        except BaseException as error:  # every error goes to the main thread
            self.error = error
            self._mark_failure(folder)

    def _merge_parts(
        self, folder: Path, index: CheckpointIndex, intervals: list[StoredInterval], files: list[StoredFile]
    ) -> None:
        """Merge the parts of all ranks on rank 0: write the index, rename the folder, remove old checkpoints."""
        for rank in (rank for rank in self.writer_ranks if rank):
            self._wait_for_part(folder, rank)
            rank_intervals, rank_files = json.loads((folder / _get_part_name(rank)).read_text(encoding="utf-8"))
            intervals = intervals + [StoredInterval(**{**one, "shape": tuple(one["shape"])}) for one in rank_intervals]
            files = files + [StoredFile(**one) for one in rank_files]
            (folder / _get_part_name(rank)).unlink()
        text = replace(index, intervals=intervals, files=files).to_text()
        write_text_atomically(
            folder / INDEX_FILE, text, remove_secrets=False
        )  # the settings in it are redacted already
        # an index that cannot be read again is detected now, while the state is still in memory
        CheckpointIndex.from_text((folder / INDEX_FILE).read_text(encoding="utf-8"), folder / INDEX_FILE)
        self.folder.move_into_place(index.step)
        self.folder.remove_old(self.keep_last)

    def _wait_for_part(self, folder: Path, rank: int) -> None:
        start = time.monotonic()
        while _get_part_name(rank) not in (
            names := os.listdir(folder)
        ):  # a listing asks the file server; a lookup of one file may use a stale cache
            if _get_failure_name(rank) in names:
                raise OSError(f"rank {rank} could not write its part")
            now = time.monotonic()
            if now - start > self.timeout_seconds or (self._abort_time and now - self._abort_time > ABORT_WAIT_SECONDS):
                raise OSError(f"rank {rank}'s part did not come; do all machines share the folder?")
            time.sleep(POLL_SECONDS)

    def _mark_failure(self, folder: Path) -> None:
        with contextlib.suppress(OSError):
            (folder / _get_failure_name(self.rank)).touch()  # an empty file needs no disk space

    def remove_unfinished(self) -> None:
        """Remove temporary folders of checkpoints that could not be written. Call it on rank 0 once all ranks have finished."""
        for temporary in self.folder.path.glob(".step-*"):
            with contextlib.suppress(OSError):  # the next start removes it
                remove_folder(temporary)


def write_shards(
    folder: Path, rank: int, shards: Sequence[TensorShard]
) -> tuple[list[StoredInterval], list[StoredFile]]:
    """Write the shards of a rank into files of about `MAX_FILE_BYTES` each.

    Returns:
        the stored intervals and the files that contain them.
    """
    intervals: list[StoredInterval] = []
    files: list[StoredFile] = []
    for number, group in enumerate(_group_by_file_size(shards)):
        name = f"rank-{rank:05d}-{number:03d}.safetensors"
        stored = [
            StoredInterval(
                item.name, str(item.kind), tuple(item.shape), item.start, item.start + len(item.values), name
            )
            for item in group
        ]
        tensors = [(interval.key, shard.values) for interval, shard in zip(stored, group, strict=True)]
        files.append(write_tensors(folder / name, tensors))
        intervals += stored
    return intervals, files


def _group_by_file_size(shards: Sequence[TensorShard]) -> list[list[TensorShard]]:
    groups: list[list[TensorShard]] = []
    free_bytes = 0
    for shard in shards:
        if not len(shard.values):
            continue  # this rank has no row of a small tensor
        size = shard.values.numel() * shard.values.element_size()
        if not groups or size > free_bytes:
            groups.append([])
            free_bytes = MAX_FILE_BYTES
        groups[-1].append(shard)
        free_bytes -= size
    return groups


def _get_part_name(rank: int) -> str:
    return f"rank-{rank:05d}.json"


def _get_failure_name(rank: int) -> str:
    return f"rank-{rank:05d}.failed"


def write_tensors(path: Path, tensors: list[tuple[str, Tensor]]) -> StoredFile:
    """Write a safetensors file of flat tensors and hash it in the same pass. It is on the disk when this returns.

    Args:
        tensors: key and values [n]. Values on another device are copied to the host one by one.

    Returns:
        name, size in bytes and SHA-256 of the file.
    """
    hasher, size = hashlib.sha256(), 0
    with path.open("xb") as stream:
        for block in _iter_blocks(tensors):
            hasher.update(block)
            stream.write(block)
            size += len(block)
        stream.flush()
        os.fsync(stream.fileno())
    return StoredFile(path.name, size, hasher.hexdigest())


def _iter_blocks(tensors: list[tuple[str, Tensor]]) -> Iterator[Any]:
    yield _build_header(tensors)
    for _, values in tensors:
        data: Any = values.detach().cpu().contiguous().view(torch.uint8).numpy().data
        for start in range(0, len(data), BLOCK_BYTES):
            yield data[start : start + BLOCK_BYTES]


def _build_header(tensors: list[tuple[str, Tensor]]) -> bytes:
    """Build the safetensors header: 8 bytes of length, then JSON with dtype, shape and byte offsets of each tensor.

    The JSON is padded to a multiple of 8 bytes, so that the values are aligned.
    """
    entries, end = {}, 0
    for key, values in tensors:
        begin, end = end, end + values.numel() * values.element_size()
        entries[key] = {
            "dtype": SAFETENSORS_DTYPES[values.dtype],
            "shape": [values.numel()],
            "data_offsets": [begin, end],
        }
    text = json.dumps(entries, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
