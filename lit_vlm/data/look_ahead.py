"""Verifies pictures ahead of the plan, in a loader's worker while it has nothing to read.

A picture that turned bad costs a single process a new start when its step comes. Those that were found and entered in the
ledger before are left out by the same start.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import numpy as np
from torch.utils.data import get_worker_info

from lit_vlm.data.index.verify import find_fault
from lit_vlm.data.plan.ledger import Ledger
from lit_vlm.data.plan.plan import Plan
from lit_vlm.types import RecordError, UserError

WAITS = (0.2, 1.0)  # seconds before a record is tried again: network file systems stumble
MOST_STEPS = 1000  # ahead of what is read; further would ask more of a network file system than training does
PAUSE = 0.5  # seconds until it looks whether the plan got on


class LookAhead:
    """Decodes the samples of the steps to come, in the plan's order; a bad one is entered in the ledger.

    Args:
        rank: the workers of all ranks share the samples out.
    """

    def __init__(self, plan: Plan, ledger: Ledger, rank: int) -> None:
        self.plan, self.ledger, self.rank = plan, ledger, rank
        self._thread: threading.Thread | None = None

    @contextmanager
    def reading(self, step: int) -> Iterator[None]:
        """Keep the sources for the reader alone: what reads archives is not made for two at once."""
        worker = get_worker_info()
        if worker is None:
            yield
            return
        if self._thread is None:
            self._step, self._idle, self._sources = step, threading.Event(), threading.Lock()
            share = (self.rank * worker.num_workers + worker.id, self.plan.world_size * worker.num_workers)
            self._thread = threading.Thread(target=self._verify, args=share, name="look ahead", daemon=True)
            self._thread.start()
        self._step = step
        self._idle.clear()
        try:
            with self._sources:
                yield
        finally:
            self._idle.set()

    def _verify(self, number: int, of: int) -> None:
        draws, ends = self.plan.draws(), self.plan.ends
        checked = np.zeros(len(self.plan.index), dtype=bool)
        checked[self.plan.left_out] = True
        draw = number
        while draw < len(draws):
            read = int(ends[self._step])  # draws of the steps that are read or being read
            if draw < read:
                draw += -(-(read - draw) // of) * of
                continue
            if draw >= ends[min(self._step + MOST_STEPS, len(ends) - 1)] and self._step + MOST_STEPS < len(ends):
                time.sleep(PAUSE)
                continue
            sample = int(draws[draw])
            draw += of
            if not checked[sample]:
                checked[sample] = True
                self._check(sample)

    def _check(self, sample: int) -> None:
        index = self.plan.index
        if not index.images[sample]:
            return
        for wait in (*WAITS, None):
            fault = self._find_fault(sample)
            if fault is None:
                return
            if wait is not None:
                time.sleep(wait)
        source, position = index.sources[index.source_of[sample]].name, int(index.position[sample])
        with suppress(OSError, UserError):  # no room in the run's folder: whoever reads the record tells
            if not Ledger.read(self.ledger.path).has(source, position):
                self.ledger.add(source, position, fault)

    def _find_fault(self, sample: int) -> RecordError | None:
        self._idle.wait()
        with self._sources:
            try:
                return find_fault(self.plan.index.record(sample), {})
            except RecordError as error:
                return error
