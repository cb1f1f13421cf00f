"""Signal handling: stop requests that a scheduler or a person sends to a running process.

A signal handler may run at any moment. If it raised during the import of a library, the exception might be caught and lost.
If it waited for another rank in the middle of a collective, it would deadlock. So it never raises. Between the first and
the last step it only calls `listener`, and all ranks act together at the end of a step (`callbacks/preemption.py`). Before
and after that, there is nothing to save, and the process exits inside the handler. No rank may wait for another one there.
Each file of a run is valid at any moment, because a run may also be killed.

    SIGUSR1, SIGUSR2   time limit or preemption is near: save, requeue, exit
    SIGTERM            save and exit; outside of a step, exit with the status of a process ended by SIGTERM
    SIGINT (Ctrl-C)    save and exit; a second one exits at once

A sweep stops a run through the W&B client in this process, without a signal: `SignalHandler.submit`.

`run.py` imports this module before all others, so it must import little.
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

TOGETHER_SECONDS = 1.0  # one Ctrl-C reaches a process twice: from the terminal and from torchrun
FIRST_SECONDS = 10.0  # time for rank 0 to requeue the job, and for Slurm to end its processes
FLUSH_SECONDS = 1.0
LAST_SECONDS = 120.0  # timeout of `before_exit`, whose own timeouts are shorter


class Ask(StrEnum):
    """Kind of stop request."""

    requeue = "requeue"
    leave = "leave"
    interrupt = "interrupt"
    stop = "stop"


ASKS = {
    signal.SIGUSR1: Ask.requeue,
    signal.SIGUSR2: Ask.requeue,  # sent by submitit
    signal.SIGTERM: Ask.leave,
    signal.SIGINT: Ask.interrupt,
}
STATUS = {Ask.requeue: RESTART, Ask.leave: TERMINATED, Ask.interrupt: INTERRUPTED, Ask.stop: 0}


class Signals:
    """Signal handler of this process.

    Attributes:
        owns_process: this program is the whole process, which exits at once if there is no listener. False, e.g. in a
            notebook: signals are handled only while there is a listener.
        listener: called in the handler with the request. None: there is nothing to save, and the process exits at once.
        pending: requests that another thread submitted while there was no listener.
        is_exiting: all ranks are exiting together. Further requests, e.g. from Slurm ending a requeued job, are ignored,
            because the others would wait for a rank that exits alone.
        final_status: exit status of a process that has finished its work. A signal no longer changes it.
        interrupted_at: time of the first Ctrl-C, in seconds of the monotonic clock.
        before_exit: called with the exit status when the process exits at once; returns the status to use.
        pid: process id that the handler belongs to. It does not act in a forked child.
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
        """Submit a request from another thread. Without a listener, it stays pending until the first step."""
        if self.listener is None:
            self.waiting.append(ask)
        else:
            self.listener(ask)

    def listen(self, listener: Callable[[Ask], None]) -> None:
        """Set the listener, and call it at once with the pending requests."""
        self.listener = listener
        while self.waiting:
            listener(self.waiting.pop())

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal: call the listener, exit, or keep the request pending."""
        if os.getpid() != self.process:  # a forked worker; its parent got the signal too
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        if self.settled is not None:
            _exit(self.settled)
        request, now = ASKS[signal.Signals(number)], time.monotonic()
        if request is Ask.interrupt:
            if self.interrupted is not None and now - self.interrupted > TOGETHER_SECONDS:
                _say(
                    "Interrupted twice: left at once, without saving. The same command goes on from the last checkpoint."
                )
                _exit(INTERRUPTED)  # a collective or a thread may block a normal exit
            self.interrupted = self.interrupted or now
        if self.leaving:
            return
        if self.listener is not None:
            self.listener(request)
        elif self.owner:
            self.leave(request)
        else:
            self.waiting.append(request)

    def heed(self, ask: Ask) -> None:
        """Handle a request that reached the listener too late: exit, or raise the signal again for the original handler."""
        if self.owner:
            self.leave(ask)
        signal.raise_signal(next(number for number, meant in ASKS.items() if meant is ask))

    def leave(self, ask: Ask) -> NoReturn:
        """Exit this process now, without an exception, which might be caught or might wait for other ranks."""
        self.leaving, code = True, STATUS[ask]
        try:
            job = None if in_sweep() else own_job()  # the sweep agent requeues its own job
            if ask is Ask.leave and job is not None and is_preempted(job):
                code = RESTART
            if global_rank():
                if code == RESTART and job:
                    # the first exit ends the job step, before rank 0 has called Slurm
                    time.sleep(FIRST_SECONDS)
                    requeue(job)  # rank 0 may be blocked in C++, where its handler cannot run
            else:
                _tell_user(ask, job if code == RESTART else None)
                if self.before_leaving is not None:
                    status = _within(LAST_SECONDS, partial(self.before_leaving, code))
                    code = code if status is None else status
        finally:
            _exit(code)


_current: Signals | None = None


def current() -> Signals | None:
    """Return the signal handler of this process, if one is registered."""
    return _current


def handle_signals() -> Signals:
    """Register the signal handler for the rest of this process, which this program owns. A second call changes nothing.

    Python delivers signals only to the main thread. In another thread nothing is registered.
    """
    global _current
    inherited = _current is not None and _current.process != os.getpid()  # after a fork
    if (_current is None or inherited) and threading.current_thread() is threading.main_thread():
        _current = Signals(owner=True)
        for number in ASKS:
            signal.signal(number, _current.handle)
        atexit.register(_end_interpreter, _current)  # registered first, so called last
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ASKS)  # run.py has blocked them
    return _current or Signals()


@contextmanager
def listening(listener: Callable[[Ask], None]) -> Iterator[Signals]:
    """Call `listener` with stop requests inside the context. Afterwards the original handling is restored."""
    global _current
    signal_handler, previous = _current or Signals(), {}
    if _current is None and threading.current_thread() is threading.main_thread():
        _current = signal_handler
        previous = {number: signal.signal(number, signal_handler.handle) for number in ASKS}
    signal_handler.listen(listener)
    try:
        yield signal_handler
    finally:
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal_handler.listener = None
        if previous:
            _current = None


@contextmanager
def postponing() -> Iterator[None]:
    """Postpone signals to the end of the context, for work that must not be interrupted, e.g. submitting a job and storing its id."""
    requests: list[Ask] = []
    signals = _current
    if signals is None:
        yield
        return
    signals.listener = requests.append
    try:
        yield
    finally:
        signals.listener = None
        if requests:
            signals.heed(requests[0])


def _tell_user(ask: Ask, job: str | None) -> None:
    """Requeue the job, if one is given, and report the exit to the user."""
    refusal = requeue(job) if job else None
    outcome = f"not requeued ({refusal})" if refusal else f"job {job} is requeued" if job else "left"
    _say(f"Asked to {ask}: no step is under way, so nothing is to be saved; {outcome}. The same command goes on.")


def _end_interpreter(signals: Signals) -> None:
    """Ignore signals at interpreter shutdown, and exit at once if the final status is known.

    Shutdown takes seconds. During it, the default handlers would end the process with their own status.
    """
    for number in ASKS:
        signal.signal(number, signal.SIG_IGN)
    if signals.settled is not None and os.getpid() == signals.process:
        _exit(signals.settled)


def _exit(code: int) -> NoReturn:
    """End the process now: stop the children, flush the streams, skip the shutdown of the interpreter."""
    try:
        _end_children()
        _within(FLUSH_SECONDS, _flush)
        if os.isatty(1):
            os.write(1, b"\x1b[?25h")  # show the cursor, which a progress bar hides
    finally:
        os._exit(code)


def _end_children() -> None:
    """Kill loader and index workers, which would otherwise keep the lock of the run folder for seconds."""
    with suppress(Exception):  # the module may be half imported
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises for a killed worker
        for child in sys.modules["multiprocessing.process"].active_children():
            child.kill()


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):  # closed or broken stream
            stream.flush()


def _within(seconds: float, call: Callable[[], Any]) -> Any:
    """Call a function with a timeout. Return its result; None if it fails or times out.

    It times out, e.g., if it needs a lock that the interrupted thread holds.
    """
    results: list[Any] = []
    done = _thread.allocate_lock()
    done.acquire()

    def work() -> None:
        try:
            with suppress(Exception):
                results.append(call())
        finally:
            done.release()

    _thread.start_new_thread(work, ())  # Thread.start() needs a lock that the interrupted thread may hold
    done.acquire(timeout=seconds)
    return results[0] if results else None


def _say(text: str) -> None:
    with suppress(OSError):
        # not print(), which the signal may have interrupted
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"{text}\n".encode())
