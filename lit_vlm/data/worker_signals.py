"""What a loader's workers do with signals that are meant for the run: nothing, so that its last step is read to its end.

A scheduler signals every process of a job. A worker that died of it would end the training step with an error, and the
state that the signal asked to save would be lost.
"""

from __future__ import annotations

import atexit
import multiprocessing
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import FrameType

MEANT_FOR_THE_RUN = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


@contextmanager
def holding_signals_back() -> Iterator[None]:
    """While workers are started: they begin with signals held back, until `outlast_signals` says what to do with them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, MEANT_FOR_THE_RUN)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def outlast_signals(_: int = 0) -> None:
    """For `DataLoader(worker_init_fn=...)`. The loader itself ends its workers without signals; its last resort is a
    SIGTERM, so the second one counts."""
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _first_term)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, MEANT_FOR_THE_RUN)


@cache
def end_workers_at_exit() -> None:
    """For the process that has the loader: an error of a worker keeps the loader alive to the end, where Python sends each
    worker one SIGTERM and waits for it without a limit."""
    atexit.register(_end_workers)  # later than multiprocessing's own, so called before it


def _end_workers() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises for a worker that was killed
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def _first_term(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
