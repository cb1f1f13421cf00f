"""Waiting for what another process does."""

import time
from collections.abc import Callable
from typing import Any

PATIENCE = (
    600.0  # seconds; no test needs a tenth of it on a quiet machine, and what hangs ends here. Longer ones say so
)


def until(
    condition: Callable[[], Any], seconds: float = PATIENCE, said: Callable[[], str] = str, pause: float = 0.05
) -> Any:
    """What the condition gives, once it gives something; `said` tells what was seen instead."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(pause)
    raise AssertionError(f"not within {seconds} s\n{said()}")
