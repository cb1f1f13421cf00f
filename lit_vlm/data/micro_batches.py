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
from lit_vlm.data.content import content_of
from lit_vlm.data.index.columns import Index
from lit_vlm.data.index.unchanged import require_as_indexed
from lit_vlm.data.look_ahead import WAITS, LookAhead
from lit_vlm.data.plan.ledger import Ledger
from lit_vlm.data.plan.plan import Pack, Plan
from lit_vlm.data.processor import Processor
from lit_vlm.types import Batch, Fault, Record, RecordError, UserError

Result = TypeVar("Result")


class Entered(UserError):
    """Error of a corrupt record that was added to the quarantine ledger; the next start resumes without it.

    Args:
        finding: the record and its error.
        ledger: path of the ledger file.
    """

    def __init__(self, finding: str, ledger: Path) -> None:
        self.finding, self.ledger = finding, ledger
        super().__init__(
            f"{finding} It is entered in {ledger}: the same command again goes on without it. To look for more of them: "
            "task=prepare."
        )


@dataclass(frozen=True, slots=True)
class TurnedBad:
    """Corrupt record: it was usable when it was indexed, but is not now.

    It is returned as data, because an exception of a worker would be shown with the worker's traceback.
    """

    source: str
    position: int
    error: RecordError
    held_out: bool = False  # from a separate validation source

    def enter(self, ledger: Ledger | None) -> UserError:
        """Add the record to the ledger and return the error that ends the run; a changed record is not added."""
        if (
            ledger is None or self.error.fault is Fault.changed
        ):  # a changed record is not corrupt, and must not be excluded silently
            return self.error
        is_known = Ledger.read(ledger.path).has(self.source, self.position, self.held_out)
        if not is_known:  # else a look-ahead verifier has added it
            ledger.add(self.source, self.position, self.error, held_out=self.held_out)
        finding = (
            f"{self.error.origin}: {self.error.reason}. It could be read when the index was built, and {len(WAITS) + 1} "
            "tries failed now."
        )
        return Entered(finding, ledger.path)


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
        left_out: Container[int] = frozenset(),
        *,
        pixels: bool = True,
        contents: bool = False,
        look_ahead: LookAhead | None = None,
    ) -> None:
        self.processor, self.plan, self.rank, self.left_out = processor, plan, rank, left_out
        self.look_ahead = look_ahead
        self.options = {"pixels": pixels, "contents": contents}

    def __len__(self) -> int:
        return self.plan.num_steps * self.plan.k

    def __getitem__(self, number: int) -> Batch | TurnedBad:
        if number >= len(self):
            raise IndexError(number)
        step, micro_batch = divmod(number, self.plan.k)
        with self.look_ahead.reading(step) if self.look_ahead else nullcontext():
            return self._read(step, micro_batch)

    def _read(self, index: int, micro: int) -> Batch | TurnedBad:
        if index in self.left_out:
            return read(self.processor, self.plan.index, (), step=index, step_supervised_tokens=0)
        step = self.plan.step(index)
        pack = step.packs[micro * self.plan.world_size + self.rank]
        pairs = step.num_samples if step.num_chosen else 0
        return read(
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
        index: Index,
        packs: Sequence[Pack],
        *,
        own: bool = False,
        pixels: bool = True,
        contents: bool = False,
    ) -> None:
        self.processor, self.index, self.packs, self.own = processor, index, packs, own
        self.options = {"pixels": pixels, "contents": contents}

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, number: int) -> Batch | TurnedBad:
        pack = list(self.packs[number])
        batch = read(
            self.processor,
            self.index,
            self.packs[number],
            step_supervised_tokens=int(self.index.supervised[pack].sum()) if pack else 0,
            step_pairs=int(np.count_nonzero(self.index.chosen[pack])) if pack else 0,
            step_chosen_tokens=int(self.index.chosen[pack].sum()) if pack else 0,
            **self.options,
        )
        return replace(batch, held_out=self.own) if isinstance(batch, TurnedBad) else batch


class Contents(Dataset):
    """Content hashes of the images of these samples, `batch_size` samples at a time.

    The hash is 0 if an image cannot be read now; the error is reported when its pixels are read.
    """

    def __init__(self, index: Index, samples: Sequence[int], at_once: int = 256) -> None:
        self.index, self.samples, self.at_once = index, samples, at_once

    def __len__(self) -> int:
        return -(-len(self.samples) // self.at_once)

    def __getitem__(self, number: int) -> list[int]:
        return [self._content(sample) for sample in self.samples[number * self.at_once :][: self.at_once]]

    def _content(self, sample: int) -> int:
        try:
            return content_of(self.index.record(sample))
        except RecordError:
            return 0


def read(processor: Processor, index: Index, pack: Pack, **step: Any) -> Batch | TurnedBad:
    """Read the micro-batch of a pack, with retries before a record is reported as corrupt."""
    return steadily(lambda: _read_once(processor, index, pack, **step), processor, index, pack)


def steadily(
    work: Callable[[], Result], processor: Processor, index: Index, samples: Sequence[int]
) -> Result | TurnedBad:
    """Run `function` over the samples, with retries; return its result, or the sample that stays corrupt."""
    for wait in WAITS:
        try:
            return work()
        except RecordError:
            time.sleep(wait)
    try:
        return work()
    except RecordError:
        for sample in samples:  # the corrupt sample is the one that fails alone, whichever record the error names
            try:
                _read_once(processor, index, (sample,))
            except RecordError as error:
                return TurnedBad(index.sources[index.source_of[sample]].name, int(index.position[sample]), error)
        return work()  # readable again


def _read_once(processor: Processor, index: Index, pack: Pack, *, contents: bool = False, **step: Any) -> Batch:
    """Read and collate the records of a pack, and verify that they are as indexed. Raises RecordError."""
    records = [index.record(sample) for sample in pack]
    batch = collate(processor, records, **step)
    _require_unchanged(batch, records, index, pack)
    require_as_indexed(index, pack, records)
    batch.keys = index.keys(list(pack)).tolist()
    batch.contents = [content_of(record) for record in records] if contents else []
    return batch


def _require_unchanged(batch: Batch, records: list[Record], index: Index, pack: Pack) -> None:
    """Verify that tokens and supervised tokens equal the index, from which pack sizes and the divisor of the loss come."""
    if not records:
        return
    found = {"tokens": batch.lengths, "supervised": batch.supervised}
    for name, counts in found.items():
        now, indexed = np.bincount(batch.owners, counts).astype(np.int64), getattr(index, name)[list(pack)]
        for number in np.flatnonzero(now != indexed):
            what = "tokens" if name == "tokens" else "supervised tokens"
            raise RecordError(
                records[number].origin,
                f"has {now[number]} {what} now and had {indexed[number]} when it was indexed",
                "Run task=prepare to index what changed",
                Fault.changed,
            )
