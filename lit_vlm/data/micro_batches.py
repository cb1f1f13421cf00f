"""Micro-batches by number, as a loader's workers read them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Dataset

from lit_vlm.data.collate import collate
from lit_vlm.data.index import Index
from lit_vlm.data.ledger import Ledger
from lit_vlm.data.plan import Pack, Plan
from lit_vlm.data.processor import Processor
from lit_vlm.types import Batch, Fault, Record, RecordError, UserError

WAITS = (0.2, 1.0)  # seconds before a record is tried again: network file systems stumble


@dataclass(frozen=True, slots=True)
class TurnedBad:
    """A record that was usable when it was indexed and is not now. Handed over as data: a worker's exception would
    reach the user with the worker's traceback."""

    source: str
    position: int
    error: RecordError

    def enter(self, ledger: Ledger | None) -> UserError:
        """The error that ends the run, after the record is entered in the ledger."""
        if ledger is None:
            return self.error
        ledger.add(self.source, self.position, self.error)
        return UserError(
            f"{self.error} The index was built when it could be read, and {len(WAITS) + 1} tries failed now. It is entered "
            f"in {ledger.path}: the same command again goes on without it. To look for more of them: task=prepare."
        )


class TrainMicroBatches(Dataset):
    """Micro-batch m of this rank: `plan.step(m // k)`, pack `m % k`."""

    def __init__(self, processor: Processor, plan: Plan, rank: int) -> None:
        self.processor, self.plan, self.rank = processor, plan, rank

    def __len__(self) -> int:
        return self.plan.num_steps * self.plan.k

    def __getitem__(self, number: int) -> Batch | TurnedBad:
        if number >= len(self):
            raise IndexError(number)
        index, micro = divmod(number, self.plan.k)
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
        )


class ValidationMicroBatches(Dataset):
    """The held-out samples of this rank."""

    def __init__(self, processor: Processor, index: Index, packs: Sequence[Pack]) -> None:
        self.processor, self.index, self.packs = processor, index, packs

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, number: int) -> Batch | TurnedBad:
        pack = list(self.packs[number])
        return read(
            self.processor,
            self.index,
            self.packs[number],
            step_supervised_tokens=int(self.index.supervised[pack].sum()) if pack else 0,
            step_pairs=int(np.count_nonzero(self.index.chosen[pack])) if pack else 0,
            step_chosen_tokens=int(self.index.chosen[pack].sum()) if pack else 0,
        )


def read(processor: Processor, index: Index, pack: Pack, **step: int) -> Batch | TurnedBad:
    """The micro-batch of a pack; tried again before a record is given up."""
    for wait in (*WAITS, None):
        batch = _read_once(processor, index, pack, **step)
        if wait is None or isinstance(batch, Batch):
            return batch
        time.sleep(wait)
    raise AssertionError


def _read_once(processor: Processor, index: Index, pack: Pack, **step: int) -> Batch | TurnedBad:
    records: list[Record] = []
    try:
        for sample in pack:
            records.append(index.record(sample))
        batch = collate(processor, records, **step)
        _require_unchanged(batch, records, index, pack)
        return batch
    except RecordError as error:
        origins = [record.origin for record in records]
        sample = (
            pack[origins.index(error.origin)] if error.origin in origins else pack[min(len(records), len(pack) - 1)]
        )
        return TurnedBad(index.sources[index.source_of[sample]].name, int(index.position[sample]), error)


def _require_unchanged(batch: Batch, records: list[Record], index: Index, pack: Pack) -> None:
    """The packs' sizes and the loss's divisor come from the index: a record that has become another must not pass."""
    if not records:
        return
    lengths = np.array(batch.lengths).reshape(-1, len(records)).sum(axis=0)  # of a pair, both segments
    promised = index.tokens[list(pack)]
    for number in np.flatnonzero(lengths != promised):
        raise RecordError(
            records[number].origin,
            f"has {lengths[number]} tokens now and had {promised[number]} when it was indexed",
            "Run task=prepare to index what changed",
            Fault.changed,
        )
