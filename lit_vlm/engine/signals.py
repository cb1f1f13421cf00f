"""What a scheduler or a person asks of a running process by signals.

A handler runs at any moment: while a library is being imported, where an exception may be caught and vanish, or in the middle
of a collective, where waiting for another rank would wait for ever. So it raises nothing. Between the first step and the
last it does nothing but tell `listener`; all ranks act together at the end of a step (`callbacks/preemption.py`). Before and
after there is nothing to save, and the process ends inside the handler: no rank may wait for another there. Every file of a run is
whole at any moment, for a run may be killed as well.

    SIGUSR1, SIGUSR2   the time limit or another job is near: save, requeue, leave
    SIGTERM            save and leave; where no step is under way, as a process that SIGTERM ended
    SIGINT (Ctrl-C)    save and leave; a second one leaves at once

A sweep that wants a run to stop says so to W&B's client in this process, which has no signal for it: `Signals.tell`.

`run.py` imports this module before all others, so it imports little.
"""

from __future__ import annotations

import _thread
import atexit
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from enum import StrEnum
from functools import partial
from types import FrameType
from typing import Any, NoReturn

from lit_vlm.engine.exits import INTERRUPTED, RESTART, TERMINATED
from lit_vlm.engine.ranks import global_rank, in_sweep
from lit_vlm.engine.slurm import is_preempted, own_job, requeue

TOGETHER_SECONDS = 1.0  # a Ctrl-C reaches a process twice, from the terminal and from torchrun
FIRST_SECONDS = 10.0  # that the first rank is given to requeue the job, and Slurm to end its processes
FLUSH_SECONDS = 1.0
LAST_SECONDS = 120.0  # for `before_leaving`, whose own limits are shorter


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
STATUS = {Ask.requeue: RESTART, Ask.leave: TERMINATED, Ask.interrupt: INTERRUPTED, Ask.stop: 0}


class Signals:
    """The signals of this process.

    Attributes:
        owner: the process is ours, and ends where nobody listens. Else its signals are ours only while somebody does.
        listener: called in the handler with what is asked; None: there is nothing to save, the process leaves at once.
        waiting: what was told by another thread while there was no listener.
        leaving: all ranks are on their way out together; what else is asked, as by Slurm that ends a requeued job, is heeded
            already, and one that left by itself would be missed by the others.
        settled: the exit status of a process that has done all it had to; a signal changes it no more.
        interrupted: when Ctrl-C came first, in seconds of the monotonic clock.
        before_leaving: called with the exit status when the process leaves at once; returns the one to leave with.
        process: whose signals they are. A child that is forked has none.
    """

    def __init__(self, owner: bool = False) -> None:
        self.owner = owner
        self.listener: Callable[[Ask], None] | None = None
        self.waiting: list[Ask] = []
        self.leaving = False
        self.settled: int | None = None
        self.interrupted: float | None = None
        self.before_leaving: Callable[[int], int] | None = None
        self.process = os.getpid()

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
        if os.getpid() != self.process:  # a worker that was forked; its parent got the signal, too
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        if self.settled is not None:
            _exit(self.settled)
        ask, now = ASKS[signal.Signals(number)], time.monotonic()
        if ask is Ask.interrupt:
            if self.interrupted is not None and now - self.interrupted > TOGETHER_SECONDS:
                _say(
                    "Interrupted twice: left at once, without saving. The same command goes on from the last checkpoint."
                )
                _exit(INTERRUPTED)  # other ranks may hold this one in a collective, or a thread in its exit
            self.interrupted = self.interrupted or now
        if self.leaving:
            return
        if self.listener is not None:
            self.listener(ask)
        elif self.owner:
            self.leave(ask)
        else:
            self.waiting.append(ask)

    def heed(self, ask: Ask) -> None:
        """Act on what `listener` was told too late: leave, or where the process is not ours, hand it to whoever's it is."""
        if self.owner:
            self.leave(ask)
        signal.raise_signal(next(number for number, meant in ASKS.items() if meant is ask))

    def leave(self, ask: Ask) -> NoReturn:
        """End this process now, wherever it is. An exception might be caught on its way out, or wait for other ranks."""
        self.leaving, code = True, STATUS[ask]
        try:
            job = None if in_sweep() else own_job()  # the agent's job is the agent's to requeue
            if ask is Ask.leave and job is not None and is_preempted(job):
                code = RESTART
            if global_rank():
                if code == RESTART and job:
                    time.sleep(FIRST_SECONDS)  # who leaves first ends the step, before Slurm was asked
                    requeue(job)  # the first one may wait for this one in C++, where no signal reaches it
            else:
                _tell_user(ask, job if code == RESTART else None)
                if self.before_leaving is not None:
                    found = _within(LAST_SECONDS, partial(self.before_leaving, code))
                    code = code if found is None else found
        finally:
            _exit(code)


_current: Signals | None = None


def current() -> Signals | None:
    """The signals that this process listens to."""
    return _current


def handle_signals() -> Signals:
    """Answer the signals of this process, which is ours, from now to its end. Called again it changes nothing.

    Python hands signals to the main thread alone; in another one nothing is heard.
    """
    global _current
    inherited = _current is not None and _current.process != os.getpid()  # by a fork
    if (_current is None or inherited) and threading.current_thread() is threading.main_thread():
        _current = Signals(owner=True)
        for number in ASKS:
            signal.signal(number, _current.handle)
        atexit.register(_end_interpreter, _current)  # the first to be registered is the last to be called
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ASKS)  # run.py held them back
    return _current or Signals()


@contextmanager
def listening(listener: Callable[[Ask], None]) -> Iterator[Signals]:
    """Tell `listener` what is asked. Afterwards the process leaves at once again, or its signals are whoever's they were."""
    global _current
    signals, before = _current or Signals(), {}
    if _current is None and threading.current_thread() is threading.main_thread():
        _current = signals
        before = {number: signal.signal(number, signals.handle) for number in ASKS}
    signals.listen(listener)
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signals.listener = None
        if before:
            _current = None


@contextmanager
def postponing() -> Iterator[None]:
    """Act on signals afterwards: for what must not be cut in two, as submitting a job and noting its number."""
    asked: list[Ask] = []
    signals = _current
    if signals is None:
        yield
        return
    signals.listener = asked.append
    try:
        yield
    finally:
        signals.listener = None
        if asked:
            signals.heed(asked[0])


def _tell_user(ask: Ask, job: str | None) -> None:
    """Requeue the job, if one is named, and say what becomes of the run."""
    refused = requeue(job) if job else None
    done = f"not requeued ({refused})" if refused else f"job {job} is requeued" if job else "left"
    _say(f"Asked to {ask}: no step is under way, so nothing is to be saved; {done}. The same command goes on.")


def _end_interpreter(signals: Signals) -> None:
    """Nothing is left but to take all modules apart, which takes seconds, and in which signals would do what they do by
    default: end the process with a status of their own."""
    for number in ASKS:
        signal.signal(number, signal.SIG_IGN)
    if signals.settled is not None and os.getpid() == signals.process:
        _exit(signals.settled)


def _exit(code: int) -> NoReturn:
    try:
        _end_children()
        _within(FLUSH_SECONDS, _flush)
        if os.isatty(1):
            os.write(1, b"\x1b[?25h")  # a progress bar hides the cursor
    finally:
        os._exit(code)


def _end_children() -> None:
    """Loader and index workers would notice only seconds later, and hold the run's folder until then."""
    with suppress(Exception):  # half imported, perhaps
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises for a worker that was killed
        for child in sys.modules["multiprocessing.process"].active_children():
            child.kill()


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):  # closed, or broken
            stream.flush()


def _within(seconds: float, call: Callable[[], Any]) -> Any:
    """Return its result; None where it fails or takes longer, as when it needs a lock that the interrupted thread holds."""
    results: list[Any] = []
    done = _thread.allocate_lock()
    done.acquire()

    def work() -> None:
        try:
            with suppress(Exception):
                results.append(call())
        finally:
            done.release()

    _thread.start_new_thread(work, ())  # threading's own start takes a lock that the interrupted thread may hold
    done.acquire(timeout=seconds)
    return results[0] if results else None


def _say(text: str) -> None:
    with suppress(OSError):
        # print() may be what was interrupted
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"{text}\n".encode())
