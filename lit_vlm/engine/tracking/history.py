"""Rows by optimizer step: what is logged of one step, by whomever, becomes one row, which is sent once and whole.

W&B takes a step no second time. A row that was sent while its second half was still to come (the held-out loss after the
training loss) would lose that half to a kill in between. So a row is kept until the next step begins.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class History:
    """Collects rows and hands each on when it is whole.

    Args:
        send: takes an optimizer step, counted from 0, and all that was logged of it.
        first: steps before it were sent by an earlier start.
    """

    def __init__(self, send: Callable[[int, dict[str, Any]], None], first: int = 0) -> None:
        self._send, self.first = send, first
        self._step, self._row = first, dict[str, Any]()

    def add(self, step: int, values: dict[str, Any]) -> None:
        """Steps come in order; what belongs to one that was sent already is left out."""
        if step < self.first:
            return
        if step > self._step:
            self.flush()
            self._step = step
        self._row |= values

    def flush(self) -> None:
        """Send what is kept."""
        if self._row:
            row, self._row = self._row, {}
            self.first = self._step + 1
            self._send(self._step, row)

    def forget(self) -> None:
        """What is kept is logged again by the start that goes on."""
        self._row = {}
