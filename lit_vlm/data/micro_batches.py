"""Micro-batches by number, as a loader's workers read them."""

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
    """A record turned bad and is in the ledger now: the next start goes on without it.

    Args:
        finding: which record, and what is wrong with it.
        ledger: the file.
    """

    def __init__(self, finding: str, ledger: Path) -> None:
        self.finding, self.ledger = finding, ledger
        super().__init__(
            f"{finding} It is entered in {ledger}: the same command again goes on without it. To look for more of them: "
            "task=prepare."
        )


@dataclass(frozen=True, slots=True)
class TurnedBad:
    """A record that was usable when it was indexed and is not now. Handed over as data: a worker's exception would
    reach the user with the worker's traceback."""

    source: str
    position: int
    error: RecordError
    held_out: bool = False  # of a validation source of its own

    def enter(self, ledger: Ledger | None) -> UserError:
        """The error that ends the run, after the record is entered in the ledger; one that became another is not entered."""
        if (
            ledger is None or self.error.fault is Fault.changed
        ):  # another record is no bad one, to be left out in silence
            return self.error
        found = Ledger.read(ledger.path).has(self.source, self.position, self.held_out)
        if not found:  # by a worker that looked ahead
            ledger.add(self.source, self.position, self.error, held_out=self.held_out)
        finding = (
            f"{self.error.origin}: {self.error.reason}. It could be read when the index was built, and {len(WAITS) + 1} "
            "tries failed now."
        )
        return Entered(finding, ledger.path)


class TrainMicroBatches(Dataset):
    """Micro-batch m of this rank: `plan.step(m // k)`, pack `m % k`.

    Args:
        left_out: steps for which nothing is read: their micro-batches are blank.
        pixels: see `collate`.
        contents: say what the records' pictures hold.
        look_ahead: verifies pictures while a worker waits.
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
        index, micro = divmod(number, self.plan.k)
        with self.look_ahead.reading(index) if self.look_ahead else nullcontext():
            return self._read(index, micro)

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
    """The held-out samples of this rank.

    Args:
        own: they are from sources of their own.
        pixels, contents: see `TrainMicroBatches`.
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
    """What the pictures of these samples hold, `at_once` samples at a time; 0 of those that cannot be read now, which
    whoever needs their pixels tells."""

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
    """The micro-batch of a pack; tried again before a record is given up."""
    return steadily(lambda: _read_once(processor, index, pack, **step), processor, index, pack)


def steadily(
    work: Callable[[], Result], processor: Processor, index: Index, samples: Sequence[int]
) -> Result | TurnedBad:
    """What `work` makes of the samples, tried again before one of them is given up."""
    for wait in WAITS:
        try:
            return work()
        except RecordError:
            time.sleep(wait)
    try:
        return work()
    except RecordError:
        for sample in samples:  # whoever raises alone is at fault, whatever the error calls itself
            try:
                _read_once(processor, index, (sample,))
            except RecordError as error:
                return TurnedBad(index.sources[index.source_of[sample]].name, int(index.position[sample]), error)
        return work()  # healed meanwhile


def _read_once(processor: Processor, index: Index, pack: Pack, *, contents: bool = False, **step: Any) -> Batch:
    """Raises RecordError."""
    records = [index.record(sample) for sample in pack]
    batch = collate(processor, records, **step)
    _require_unchanged(batch, records, index, pack)
    require_as_indexed(index, pack, records)
    batch.keys = index.keys(list(pack)).tolist()
    batch.contents = [content_of(record) for record in records] if contents else []
    return batch


def _require_unchanged(batch: Batch, records: list[Record], index: Index, pack: Pack) -> None:
    """The packs' sizes and the loss's divisor come from the index: a record that has become another must not pass."""
    if not records:
        return
    found = {"tokens": batch.lengths, "supervised": batch.supervised}
    for name, counts in found.items():
        now, promised = np.bincount(batch.owners, counts).astype(np.int64), getattr(index, name)[list(pack)]
        for number in np.flatnonzero(now != promised):
            what = "tokens" if name == "tokens" else "supervised tokens"
            raise RecordError(
                records[number].origin,
                f"has {now[number]} {what} now and had {promised[number]} when it was indexed",
                "Run task=prepare to index what changed",
                Fault.changed,
            )
