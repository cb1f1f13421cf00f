"""Datasets of micro-batches by number, read by the workers of a data loader; corrupt records are retried, then reported."""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from torch.utils.data import Dataset

from lit_vlm.data.collate import collate
from lit_vlm.data.index.fingerprint import verify_unchanged
from lit_vlm.data.index.sample_index import SampleIndex
from lit_vlm.data.lazy_images import compute_image_hash
from lit_vlm.data.loader import RETRY_DELAYS, LookAheadVerifier
from lit_vlm.data.packing.plan import Pack, Plan
from lit_vlm.data.processor import Processor
from lit_vlm.data.quarantine import Ledger
from lit_vlm.types import Batch, Fault, Record, RecordError, UserError

Result = TypeVar("Result")


class RecordLoggedError(UserError):
    """Error of a corrupt record that was added to the quarantine ledger; the next start resumes without it.

    Args:
        finding: the record and its error.
        ledger: path of the ledger file.
    """

    def __init__(self, finding: str, ledger: Path) -> None:
        self.finding, self.ledger = finding, ledger
        super().__init__(
            f"{finding} It is entered in {ledger}: the same command resumes without it. To look for more of them: "
            "task=prepare."
        )


@dataclass(frozen=True, slots=True)
class CorruptRecord:
    """Corrupt record: it was usable when it was indexed, but is not now.

    It is returned as data, because an exception of a worker would be shown with the worker's traceback.
    """

    source: str
    position: int
    error: RecordError
    held_out: bool = False  # from a separate validation source

    def add_to_ledger(self, ledger: Ledger | None) -> UserError:
        """Add the record to the ledger and return the error that ends the run; a changed record is not added."""
        if (
            ledger is None or self.error.fault is Fault.changed
        ):  # a changed record is not corrupt, and must not be excluded silently
            return self.error
        is_known = Ledger.read(ledger.path).has(self.source, self.position, self.held_out)
        if not is_known:  # else a look-ahead verifier has added it
            ledger.add(self.source, self.position, self.error, held_out=self.held_out)
        finding = (
            f"{self.error.origin}: {self.error.reason}. It could be read when the index was built, and {len(RETRY_DELAYS) + 1} "
            "tries failed now."
        )
        return RecordLoggedError(finding, ledger.path)


class TrainMicroBatches(Dataset):
    """Training micro-batches of this rank.

    With gradient accumulation over k micro-batches, number m is micro-batch `m % k` of `plan.get_step(m // k)`.

    Args:
        skipped_steps: steps for which no data is read; their micro-batches are dummy batches.
        with_pixels: see `collate`.
        with_image_hashes: add content hashes of the records' images.
        look_ahead: verifies images while a worker is idle.
    """

    def __init__(
        self,
        processor: Processor,
        plan: Plan,
        rank: int,
        skipped_steps: Container[int] = frozenset(),
        *,
        with_pixels: bool = True,
        with_image_hashes: bool = False,
        look_ahead: LookAheadVerifier | None = None,
    ) -> None:
        self.processor, self.plan, self.rank, self.skipped_steps = processor, plan, rank, skipped_steps
        self.look_ahead = look_ahead
        self.options = {"with_pixels": with_pixels, "with_image_hashes": with_image_hashes}

    def __len__(self) -> int:
        return self.plan.num_steps * self.plan.accumulate_grad_batches

    def __getitem__(self, number: int) -> Batch | CorruptRecord:
        if number >= len(self):
            raise IndexError(number)
        step, micro_batch = divmod(number, self.plan.accumulate_grad_batches)
        with self.look_ahead.lock_sources(step) if self.look_ahead else nullcontext():
            return self._read(step, micro_batch)

    def _read(self, index: int, micro: int) -> Batch | CorruptRecord:
        if index in self.skipped_steps:
            return read_micro_batch(self.processor, self.plan.index, (), step=index, step_supervised_tokens=0)
        step = self.plan.get_step(index)
        pack = step.packs[micro * self.plan.world_size + self.rank]
        pairs = step.num_samples if step.num_chosen else 0
        return read_micro_batch(
            self.processor,
            self.plan.index,
            pack,
            step=index,
            step_supervised_tokens=step.num_supervised,
            step_tiles=step.num_tiles,
            step_pairs=pairs,
            step_chosen_tokens=step.num_chosen,
            **self.options,
        )


class ValidationMicroBatches(Dataset):
    """Validation micro-batches: the held-out samples of this rank, each once.

    Args:
        separate_sources: the samples are from separate validation sources.
        with_pixels, with_image_hashes: see `TrainMicroBatches`.
    """

    def __init__(
        self,
        processor: Processor,
        index: SampleIndex,
        packs: Sequence[Pack],
        *,
        separate_sources: bool = False,
        with_pixels: bool = True,
        with_image_hashes: bool = False,
    ) -> None:
        self.processor, self.index, self.packs, self.separate_sources = processor, index, packs, separate_sources
        self.options = {"with_pixels": with_pixels, "with_image_hashes": with_image_hashes}

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, number: int) -> Batch | CorruptRecord:
        pack = list(self.packs[number])
        batch = read_micro_batch(
            self.processor,
            self.index,
            self.packs[number],
            step_supervised_tokens=int(self.index.supervised[pack].sum()) if pack else 0,
            step_pairs=int(np.count_nonzero(self.index.chosen[pack])) if pack else 0,
            step_chosen_tokens=int(self.index.chosen[pack].sum()) if pack else 0,
            **self.options,
        )
        return replace(batch, held_out=self.separate_sources) if isinstance(batch, CorruptRecord) else batch


class ImageHashes(Dataset):
    """Content hashes of the images of these samples, `batch_size` samples at a time.

    The hash is 0 if an image cannot be read now; the error is reported when its pixels are read.
    """

    def __init__(self, index: SampleIndex, samples: Sequence[int], batch_size: int = 256) -> None:
        self.index, self.samples, self.batch_size = index, samples, batch_size

    def __len__(self) -> int:
        return -(-len(self.samples) // self.batch_size)

    def __getitem__(self, number: int) -> list[int]:
        return [self._compute_hash(sample) for sample in self.samples[number * self.batch_size :][: self.batch_size]]

    def _compute_hash(self, sample: int) -> int:
        try:
            return compute_image_hash(self.index.get_record(sample))
        except RecordError:
            return 0


def read_micro_batch(processor: Processor, index: SampleIndex, pack: Pack, **step: Any) -> Batch | CorruptRecord:
    """Read the micro-batch of a pack, with retries before a record is reported as corrupt."""
    return run_with_retries(lambda: _read_micro_batch_once(processor, index, pack, **step), processor, index, pack)


def run_with_retries(
    function: Callable[[], Result], processor: Processor, index: SampleIndex, samples: Sequence[int]
) -> Result | CorruptRecord:
    """Run `function` over the samples, with retries; return its result, or the sample that stays corrupt."""
    for wait in RETRY_DELAYS:
        try:
            return function()
        except RecordError:
            time.sleep(wait)
    try:
        return function()
    except RecordError:
        for sample in samples:  # the corrupt sample is the one that fails alone, whichever record the error names
            try:
                _read_micro_batch_once(processor, index, (sample,))
            except RecordError as error:
                return CorruptRecord(index.sources[index.source_ids[sample]].name, int(index.position[sample]), error)
        return function()  # readable again


def _read_micro_batch_once(
    processor: Processor, index: SampleIndex, pack: Pack, *, with_image_hashes: bool = False, **step: Any
) -> Batch:
    """Read and collate the records of a pack, and verify that they are as indexed. Raises RecordError."""
    records = [index.get_record(sample) for sample in pack]
    batch = collate(processor, records, **step)
    _verify_lengths(batch, records, index, pack)
    verify_unchanged(index, pack, records)
    batch.record_keys = index.compute_keys(list(pack)).tolist()
    batch.image_hashes = [compute_image_hash(record) for record in records] if with_image_hashes else []
    return batch


def _verify_lengths(batch: Batch, records: list[Record], index: SampleIndex, pack: Pack) -> None:
    """Verify that tokens and supervised tokens equal the index, from which pack sizes and the divisor of the loss come."""
    if not records:
        return
    found = {"tokens": batch.segment_lengths, "supervised": batch.segment_supervised_tokens}
    for name, counts in found.items():
        now, indexed = np.bincount(batch.record_ids, counts).astype(np.int64), getattr(index, name)[list(pack)]
        for number in np.flatnonzero(now != indexed):
            what = "tokens" if name == "tokens" else "supervised tokens"
            raise RecordError(
                records[number].origin,
                f"has {now[number]} {what} now and had {indexed[number]} when it was indexed",
                "Run task=prepare to index what changed",
                Fault.changed,
            )
