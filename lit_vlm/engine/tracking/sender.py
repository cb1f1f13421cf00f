"""Background thread for calls of a client, in order: the training step submits them and does not wait."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue


class Sender:
    """Queue of calls that a daemon thread runs in order. The thread starts with the first call and ends with the process.

    Args:
        on_error: called in the thread with the error of a call; the next calls run all the same.
    """

    def __init__(self, failed: Callable[[Exception], None]) -> None:
        self._failed = failed
        self._calls: SimpleQueue[Callable[[], object]] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def hand_over(self, call: Callable[[], object]) -> None:
        """Add a call to the queue."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
            self._thread.start()
        self._calls.put(call)

    def drain(self, seconds: float) -> bool:
        """Wait until all calls submitted so far have run, at most `seconds`. Returns whether they have."""
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
