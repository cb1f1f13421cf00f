"""Waiting for another process."""

import time
from collections.abc import Callable
from typing import Any

PATIENCE = 600.0  # seconds; on an idle machine no test needs a tenth of it, and a hanging test ends here. Longer waits are explicit


def until(
    condition: Callable[[], Any], seconds: float = PATIENCE, said: Callable[[], str] = str, pause: float = 0.05
) -> Any:
    """Return the value of the condition once it is true; after a timeout, report the text of `said`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(pause)
    raise AssertionError(f"not within {seconds} s\n{said()}")
