"""Buffer of log rows: all values of one optimizer step become one row, which is sent once and complete.

W&B accepts each step only once. A row that is sent before its second half is logged (the held-out loss after the training
loss) would lose that half if the process is killed in between. So a row is buffered until the next step begins.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class RowBuffer:
    """Buffer that merges logged values into one row for each optimizer step and sends complete rows.

    Args:
        send: called with an optimizer step, counted from 0, and all values logged for it.
        first_step: earlier steps were sent by an earlier start.
    """

    def __init__(self, send: Callable[[int, dict[str, Any]], None], first_step: int = 0) -> None:
        self._send, self.first_step = send, first_step
        self._step, self._row = first_step, dict[str, Any]()

    def add(self, step: int, values: dict[str, Any]) -> None:
        """Add values to the row of a step. Steps come in order; values of a step that was sent already are ignored."""
        if step < self.first_step:
            return
        if step > self._step:
            self.flush()
            self._step = step
        self._row |= values

    def flush(self) -> None:
        """Send the buffered row."""
        if self._row:
            row, self._row = self._row, {}
            self.first_step = self._step + 1
            self._send(self._step, row)

    def drop_pending(self) -> None:
        """Drop the buffered row: the start that resumes logs it again."""
        self._row = {}
