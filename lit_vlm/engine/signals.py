"""What a scheduler or a person asks of a running process by signals.

A handler runs at any moment, in the middle of a collective as well, where waiting for another rank would wait for ever.
So between the first step and the last it does nothing but tell `listener`; all ranks act together at the end of a step
(`callbacks/preemption.py`). Before and after there is nothing to save, and the process leaves at once, by itself: no rank
may wait for another there.

    SIGUSR1, SIGUSR2   the time limit or another job is near: save, requeue, leave
    SIGTERM            save and leave; where no step is under way, as a process that SIGTERM ended
    SIGINT (Ctrl-C)    save and leave; a second one leaves at once

A sweep that wants a run to stop says so to W&B's client in this process, which has no signal for it: `Signals.tell`.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from types import FrameType

from lit_vlm.engine.exits import INTERRUPTED, RESTART, TERMINATED
from lit_vlm.engine.ranks import global_rank, in_sweep
from lit_vlm.engine.slurm import is_preempted, own_job, requeue

TOGETHER_SECONDS = 1.0  # a Ctrl-C reaches a process twice, from the terminal and from torchrun
FIRST_SECONDS = 10.0  # that the first rank is given to requeue the job, and Slurm to end its processes


class Ask(StrEnum):
    requeue = "requeue"
    leave = "leave"
    interrupt = "interrupt"
    stop = "stop"


ASKS = {
    signal.SIGUSR1: Ask.requeue,
    signal.SIGUSR2: Ask.requeue,  # submitit's
    signal.SIGTERM: Ask.leave,
    signal.SIGINT: Ask.interrupt,
}


class Signals:
    """The signals of this process while `listening`.

    Attributes:
        listener: called in the handler with what is asked; None: there is nothing to save, the process leaves at once.
        waiting: what was told by another thread while there was no listener.
        leaving: all ranks are on their way out together; what else is asked, as by Slurm that ends a requeued job, is heeded
            already, and one that left by itself would be missed by the others.
        interrupted: when Ctrl-C came first, in seconds of the monotonic clock.
    """

    def __init__(self) -> None:
        self.listener: Callable[[Ask], None] | None = None
        self.waiting: list[Ask] = []
        self.leaving = False
        self.interrupted: float | None = None
        self._process = os.getpid()

    def tell(self, ask: Ask) -> None:
        """From another thread. Where no step is under way it waits for the first one."""
        if self.listener is None:
            self.waiting.append(ask)
        else:
            self.listener(ask)

    def listen(self, listener: Callable[[Ask], None]) -> None:
        """From now on this is called with what is asked, and at once with what waited."""
        self.listener = listener
        while self.waiting:
            listener(self.waiting.pop())

    def handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a worker that was forked; its parent got the signal, too
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        ask, now = ASKS[signal.Signals(number)], time.monotonic()
        if ask is Ask.interrupt:
            if self.interrupted is not None and now - self.interrupted > TOGETHER_SECONDS:
                _say(
                    "Interrupted twice: left at once, without saving. The same command goes on from the last checkpoint."
                )
                os._exit(INTERRUPTED)  # other ranks may hold this one in a collective, or a thread in its exit
            self.interrupted = self.interrupted or now
        if self.leaving:
            return
        if self.listener is None:
            _leave_now(ask)
        else:
            self.listener(ask)


_current: Signals | None = None


def current() -> Signals | None:
    """The signals that this process listens to."""
    return _current


@contextmanager
def listening() -> Iterator[Signals]:
    """Listen to the signals of `ASKS`; afterwards they are whoever's they were. Within another `listening`, that one.

    Python hands signals to the main thread alone; in another one nothing is heard.
    """
    global _current
    if _current is not None or threading.current_thread() is not threading.main_thread():
        yield _current or Signals()
        return
    _current = Signals()
    before = {number: signal.signal(number, _current.handle) for number in ASKS}
    try:
        yield _current
    finally:
        _current = None
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _leave_now(ask: Ask) -> None:
    job = None if in_sweep() else own_job()  # the agent's job is the agent's to requeue
    again = ask is Ask.requeue or (ask is Ask.leave and job is not None and is_preempted(job))
    code = RESTART if again else INTERRUPTED if ask is Ask.interrupt else TERMINATED
    if global_rank():
        if again and job:
            time.sleep(FIRST_SECONDS)  # who leaves first ends the step, before Slurm was asked
            requeue(job)  # the first one may wait for this one in C++, where no signal reaches it
        os._exit(code)  # an exit in order might wait for the other ranks
    refused = requeue(job) if again and job else None
    done = f"not requeued ({refused})" if refused else f"job {job} is requeued" if again and job else "left"
    _say(f"Asked to {ask}: no step is under way, so nothing is to be saved; {done}. The same command goes on.")
    raise SystemExit(code)


def _say(text: str) -> None:
    os.write(
        sys.__stderr__.fileno() if sys.__stderr__ else 2, f"{text}\n".encode()
    )  # print() may be what was interrupted
