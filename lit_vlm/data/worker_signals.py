"""What a loader's workers do with signals that are meant for the run: nothing, so that its last step is read to its end.

A scheduler signals every process of a job. A worker that died of it would end the training step with an error, and the
state that the signal asked to save would be lost.
"""

from __future__ import annotations

import signal
from types import FrameType


def outlast_signals(_: int = 0) -> None:
    """For `DataLoader(worker_init_fn=...)`. The loader itself ends its workers without signals; its last resort is a
    SIGTERM, so the second one counts."""
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _first_term)


def _first_term(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
