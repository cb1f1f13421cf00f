"""Signal handling in data loader workers: ignore signals that are meant for the run, so that it can finish its step.

A scheduler sends signals to every process of a job. A worker that is killed by one would end the training step with an
error, and the checkpoint that the signal requests would be lost.
"""

from __future__ import annotations

import atexit
import multiprocessing
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from types import FrameType

import numpy as np
from torch.utils.data import get_worker_info

from lit_vlm.data.index.verify import find_image_fault
from lit_vlm.data.packing.plan import Plan
from lit_vlm.data.quarantine import Ledger
from lit_vlm.types import RecordError, UserError

RUN_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


@contextmanager
def mask_run_signals() -> Iterator[None]:
    """Block signals while workers are started; in a worker they stay blocked until `setup_worker_signals`."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, RUN_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def setup_worker_signals(_: int = 0) -> None:
    """Set up the signals of a worker, for `DataLoader(worker_init_fn=...)`.

    The loader stops its workers without signals; as a last resort it sends SIGTERM, so the second SIGTERM is obeyed.
    """
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _handle_first_sigterm)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, RUN_SIGNALS)


@cache
def register_worker_cleanup() -> None:
    """Register the cleanup of workers at exit, in the process of the loader.

    An error of a worker keeps the loader alive until exit. There Python sends each worker one SIGTERM and waits for it
    without a time limit.
    """
    atexit.register(_stop_workers)  # registered after multiprocessing's handler, so it is called before it


def _stop_workers() -> None:
    """Kill the workers that still run."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises an error for a killed worker
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def _handle_first_sigterm(number: int, frame: FrameType | None) -> None:
    """Ignore the first SIGTERM; the next one has its default effect."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


RETRY_DELAYS = (0.2, 1.0)  # seconds before a record is read again: network file systems have temporary errors
MAX_STEPS_AHEAD = (
    1000  # ahead of the current step; a larger value would load a network file system more than training does
)
POLL_SECONDS = 0.5  # seconds between two checks of the current step


class LookAheadVerifier:
    """Verifier that decodes the samples of later steps in the plan's order, and adds corrupt ones to the ledger.

    Args:
        plan: training plan.
        ledger: quarantine ledger of the run.
        rank: of this process; the samples are divided among the workers of all ranks.
    """

    def __init__(self, plan: Plan, ledger: Ledger, rank: int) -> None:
        self.plan, self.ledger, self.rank = plan, ledger, rank
        self._thread: threading.Thread | None = None

    @contextmanager
    def lock_sources(self, step: int) -> Iterator[None]:
        """Lock the sources while a micro-batch is read: archive readers are not thread-safe.

        In a worker, the first call starts the verifying thread.
        """
        worker = get_worker_info()
        if worker is None:
            yield
            return
        if self._thread is None:
            self._step, self._idle, self._sources_lock = step, threading.Event(), threading.Lock()
            verifier_numbers = (self.rank * worker.num_workers + worker.id, self.plan.world_size * worker.num_workers)
            self._thread = threading.Thread(target=self._verify, args=verifier_numbers, name="look ahead", daemon=True)
            self._thread.start()
        self._step = step
        self._idle.clear()
        try:
            with self._sources_lock:
                yield
        finally:
            self._idle.set()

    def _verify(self, verifier: int, num_verifiers: int) -> None:
        """Verify every `num_verifiers`-th sample of the sequence, at most MAX_STEPS_AHEAD steps ahead."""
        sample_sequence, step_ends = self.plan.get_sample_sequence(), self.plan.step_ends
        checked = np.zeros(len(self.plan.index), dtype=bool)
        checked[self.plan.excluded_samples] = True
        position = verifier
        while position < len(sample_sequence):
            num_read = int(step_ends[self._step])  # samples of the steps that are read or being read
            if position < num_read:
                position += -(-(num_read - position) // num_verifiers) * num_verifiers
                continue
            if position >= step_ends[
                min(self._step + MAX_STEPS_AHEAD, len(step_ends) - 1)
            ] and self._step + MAX_STEPS_AHEAD < len(step_ends):
                time.sleep(POLL_SECONDS)
                continue
            sample = int(sample_sequence[position])
            position += num_verifiers
            if not checked[sample]:
                checked[sample] = True
                self._verify_sample(sample)

    def _verify_sample(self, sample: int) -> None:
        """Decode the images of a sample, with retries; add the record to the ledger if it stays corrupt."""
        index = self.plan.index
        if not index.images[sample]:
            return
        for wait in (*RETRY_DELAYS, 0.0):
            fault = self._find_fault(sample)
            if fault is None:
                return
            time.sleep(wait)
        assert fault is not None
        source, position = index.sources[index.source_ids[sample]].name, int(index.position[sample])
        with suppress(OSError, UserError):  # the run folder is full: the reader of the record reports the error
            if not Ledger.read(self.ledger.path).has(source, position):
                self.ledger.add(source, position, fault)

    def _find_fault(self, sample: int) -> RecordError | None:
        self._idle.wait()
        with self._sources_lock:
            try:
                return find_image_fault(self.plan.index.get_record(sample), {})
            except RecordError as error:
                return error
