"""Restarts of a stage in the same process, after a rollback, out of memory or a corrupt record."""

from __future__ import annotations

import gc
from collections.abc import Callable
from itertools import count


class Restart(Exception):
    """Request to restart the stage from its last checkpoint."""


def run_with_restarts(attempt: Callable[[bool], None]) -> None:
    """Call `attempt` until it returns without `Restart`.

    Args:
        attempt: one start; its argument is False at the first start and True at every restart.
    """
    for number in count():
        try:
            return attempt(number > 0)
        except Restart:
            pass  # the memory is freed only after the exception and its frames are gone
        free_memory()


def free_memory() -> None:
    """Free the memory of the attempt that ended, also on the device."""
    import torch  # late: a run that is finished already never restarts, and needs no torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
