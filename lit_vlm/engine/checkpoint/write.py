"""Asynchronous writing of checkpoints: each rank writes its own files, rank 0 writes the index and renames the folder.

During the writing, ranks communicate through the file system only. A collective call in the writer thread could pair
with a collective call of the training thread.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from lit_vlm.engine.checkpoint.durable import remove_folder, write_tensors
from lit_vlm.engine.checkpoint.folder import Folder
from lit_vlm.engine.checkpoint.layout import INDEX, Index, Interval, StoredFile
from lit_vlm.engine.shards import Piece
from lit_vlm.files import write_atomically

FILE_BYTES = 4 << 30  # a new file begins at this size; a single larger tensor has a file of its own
POLL_SECONDS = 0.01
LEAVING_SECONDS = 20.0  # maximum wait for ranks that are still writing, after an error ended the run


class Writer:
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
        folder: Folder,
        *,
        rank: int = 0,
        ranks: Sequence[int] = (0,),
        keep_last: int = 2,
        timeout_seconds: float = 1800.0,
    ) -> None:
        self.folder, self.rank, self.ranks = folder, rank, list(ranks)
        self.keep_last, self.timeout_seconds = keep_last, timeout_seconds
        self.error: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._host: dict[tuple[str, str, int], torch.Tensor] = {}  # reused buffers in host memory
        self._leaving: float | None = None  # time at which the run ended with an error

    def start(self, index: Index, pieces: Sequence[Piece], *, asynchronous: bool) -> None:
        """Start to write the shards of this rank. `wait` returns the result. The shards may change once this returns.

        Args:
            index: index of this checkpoint, still without intervals and files.
            asynchronous: copy the shards to host memory, and write them in a thread.
        """
        assert self._thread is None
        if not asynchronous:
            self._write(index, pieces)
            return
        copies = self._to_host(pieces)
        self._thread = threading.Thread(target=self._write, args=(index, copies), name="checkpoint", daemon=True)
        self._thread.start()

    def finish(self, *, leaving: bool = False) -> BaseException | None:
        """Wait until the started checkpoint is written. Returns the error if it failed, else None.

        Args:
            aborting: the run ends with an error, so other ranks may never finish their parts.
        """
        if self._thread is not None:
            self._leaving = time.monotonic() if leaving else None
            self._thread.join()
            self._thread = None
        return self.error

    def _to_host(self, pieces: Sequence[Piece]) -> list[Piece]:
        copies = []
        for shard in pieces:
            key, values = (str(shard.kind), shard.name, shard.start), shard.values
            if key not in self._host:
                self._host[key] = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
            self._host[key].copy_(values.detach(), non_blocking=True)
            copies.append(replace(shard, values=self._host[key]))
        if any(shard.values.is_cuda for shard in pieces):
            torch.cuda.current_stream().synchronize()
        return copies

    def _write(self, index: Index, pieces: Sequence[Piece]) -> None:
        folder = self.folder.draft(index.step)
        try:
            if self.rank in self.ranks:
                folder.mkdir(parents=True, exist_ok=True)
                intervals, files = write_pieces(folder, self.rank, pieces)
                if self.rank:
                    part = json.dumps([list(map(asdict, intervals)), list(map(asdict, files))])
                    write_atomically(folder / _part(self.rank), part, redact=False)
            if self.rank == 0:
                self._complete(folder, index, intervals if 0 in self.ranks else [], files if 0 in self.ranks else [])
        except BaseException as error:  # every error goes to the main thread
            self.error = error
            self._tell_failure(folder)

    def _complete(self, draft: Path, index: Index, intervals: list[Interval], files: list[StoredFile]) -> None:
        """Merge the parts of all ranks on rank 0: write the index, rename the folder, remove old checkpoints."""
        for rank in (rank for rank in self.ranks if rank):
            self._wait_for(draft, rank)
            rank_intervals, rank_files = json.loads((draft / _part(rank)).read_text(encoding="utf-8"))
            intervals = intervals + [Interval(**{**one, "shape": tuple(one["shape"])}) for one in rank_intervals]
            files = files + [StoredFile(**one) for one in rank_files]
            (draft / _part(rank)).unlink()
        text = replace(index, intervals=intervals, files=files).to_text()
        write_atomically(draft / INDEX, text, redact=False)  # the settings in it are redacted already
        # an index that cannot be read again is detected now, while the state is still in memory
        Index.from_text((draft / INDEX).read_text(encoding="utf-8"), draft / INDEX)
        self.folder.place(index.step)
        self.folder.prune(self.keep_last)

    def _wait_for(self, draft: Path, rank: int) -> None:
        start = time.monotonic()
        while _part(rank) not in (
            names := os.listdir(draft)
        ):  # a listing asks the file server; a lookup of one file may use a stale cache
            if _failed(rank) in names:
                raise OSError(f"rank {rank} could not write its part")
            now = time.monotonic()
            if now - start > self.timeout_seconds or (self._leaving and now - self._leaving > LEAVING_SECONDS):
                raise OSError(f"rank {rank}'s part did not come; do all machines share the folder?")
            time.sleep(POLL_SECONDS)

    def _tell_failure(self, draft: Path) -> None:
        with contextlib.suppress(OSError):
            (draft / _failed(self.rank)).touch()  # an empty file needs no disk space

    def give_up(self) -> None:
        """Remove temporary folders of checkpoints that could not be written. Call it on rank 0 once all ranks have finished."""
        for temporary in self.folder.path.glob(".step-*"):
            with contextlib.suppress(OSError):  # the next start removes it
                remove_folder(temporary)


def write_pieces(draft: Path, rank: int, pieces: Sequence[Piece]) -> tuple[list[Interval], list[StoredFile]]:
    """Write the shards of a rank into files of about `MAX_FILE_BYTES` each.

    Returns:
        the stored intervals and the files that contain them.
    """
    intervals: list[Interval] = []
    files: list[StoredFile] = []
    for number, group in enumerate(_groups(pieces)):
        name = f"rank-{rank:05d}-{number:03d}.safetensors"
        stored = [
            Interval(item.name, str(item.kind), tuple(item.shape), item.start, item.start + len(item.values), name)
            for item in group
        ]
        tensors = [(interval.key, shard.values) for interval, shard in zip(stored, group, strict=True)]
        files.append(write_tensors(draft / name, tensors))
        intervals += stored
    return intervals, files


def _groups(pieces: Sequence[Piece]) -> list[list[Piece]]:
    groups: list[list[Piece]] = []
    free_bytes = 0
    for shard in pieces:
        if not len(shard.values):
            continue  # this rank has no row of a small tensor
        size = shard.values.numel() * shard.values.element_size()
        if not groups or size > free_bytes:
            groups.append([])
            free_bytes = FILE_BYTES
        groups[-1].append(shard)
        free_bytes -= size
    return groups


def _part(rank: int) -> str:
    return f"rank-{rank:05d}.json"


def _failed(rank: int) -> str:
    return f"rank-{rank:05d}.failed"
