"""Imports of heavy libraries without the garbage collector, which finds nothing in modules: they stay to the end."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def pause_collector() -> Iterator[None]:
    """Import modules inside without collections, and keep what they made out of later collections (`gc.freeze`).

    Importing torch, Lightning and transformers makes a million objects; looking through them again and again costs a sixth of the
    time. Where everything is imported already, nothing is frozen.
    """
    before, was_enabled = len(sys.modules), gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            if len(sys.modules) > before:
                gc.freeze()
            gc.enable()
