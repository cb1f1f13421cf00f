"""Background thread for calls of a client, in order: the training step submits them and does not wait."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue


class BackgroundCaller:
    """Queue of calls that a daemon thread runs in order. The thread starts with the first call and ends with the process.

    Args:
        on_error: called in the thread with the error of a call; the next calls run all the same.
    """

    def __init__(self, on_error: Callable[[Exception], None]) -> None:
        self._on_error = on_error
        self._calls: SimpleQueue[Callable[[], object]] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def submit(self, call: Callable[[], object]) -> None:
        """Add a call to the queue."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run_calls, name="tracking", daemon=True)
            self._thread.start()
        self._calls.put(call)

    def wait(self, seconds: float) -> bool:
        """Wait until all calls submitted so far have run, at most `seconds`. Returns whether they have."""
        done = threading.Event()
        self.submit(done.set)
        return done.wait(seconds)

    def _run_calls(self) -> None:
        while True:
            call = self._calls.get()
            try:
                call()
            except Exception as error:
                self._on_error(error)
