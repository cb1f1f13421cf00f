"""Calls of a client in a thread of their own, in order: the training step hands them over and does not wait."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue


class Sender:
    """The thread begins with the first call and ends with the process.

    Args:
        failed: called with what a call raised, in the thread; the calls behind it are made all the same.
    """

    def __init__(self, failed: Callable[[Exception], None]) -> None:
        self._failed = failed
        self._calls: SimpleQueue[Callable[[], object]] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def hand_over(self, call: Callable[[], object]) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
            self._thread.start()
        self._calls.put(call)

    def drain(self, seconds: float) -> bool:
        """Wait until all calls so far were made, no longer than this. Whether they were."""
        done = threading.Event()
        self.hand_over(done.set)
        return done.wait(seconds)

    def _work(self) -> None:
        while True:
            call = self._calls.get()
            try:
                call()
            except Exception as error:
                self._failed(error)
