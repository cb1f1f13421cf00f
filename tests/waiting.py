"""Waiting for what another process does."""

import time
from collections.abc import Callable
from typing import Any


def until(condition: Callable[[], Any], seconds: float = 120.0, said: Callable[[], str] = str) -> Any:
    """What the condition gives, once it gives something; `said` tells what was seen instead."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError(f"not within {seconds} s\n{said()}")
