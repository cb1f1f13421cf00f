"""Signal handling in data loader workers: ignore signals that are meant for the run, so that it can finish its step.

A scheduler sends signals to every process of a job. A worker that is killed by one would end the training step with an
error, and the checkpoint that the signal requests would be lost.
"""

from __future__ import annotations

import atexit
import multiprocessing
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import FrameType

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
