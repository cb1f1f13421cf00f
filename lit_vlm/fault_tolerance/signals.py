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

from lit_vlm.cluster.slurm import get_own_job, is_preempted, requeue
from lit_vlm.distributed.ranks import get_global_rank, is_in_sweep
from lit_vlm.fault_tolerance.exit_status import INTERRUPTED, RESTART, TERMINATED

DUPLICATE_SIGNAL_SECONDS = 1.0  # one Ctrl-C reaches a process twice: from the terminal and from torchrun
RANK_ZERO_SECONDS = 10.0  # time for rank 0 to requeue the job, and for Slurm to end its processes
FLUSH_SECONDS = 1.0
BEFORE_EXIT_SECONDS = 120.0  # timeout of `before_exit`, whose own timeouts are shorter


class StopRequest(StrEnum):
    """Kind of stop request."""

    requeue = "requeue"
    save_and_stop = "leave"
    interrupt = "interrupt"
    early_stop = "stop"


STOP_REQUESTS = {
    signal.SIGUSR1: StopRequest.requeue,
    signal.SIGUSR2: StopRequest.requeue,  # sent by submitit
    signal.SIGTERM: StopRequest.save_and_stop,
    signal.SIGINT: StopRequest.interrupt,
}
EXIT_STATUS = {
    StopRequest.requeue: RESTART,
    StopRequest.save_and_stop: TERMINATED,
    StopRequest.interrupt: INTERRUPTED,
    StopRequest.early_stop: 0,
}


class SignalHandler:
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

    def __init__(self, owns_process: bool = False) -> None:
        self.owns_process = owns_process
        self.listener: Callable[[StopRequest], None] | None = None
        self.pending: list[StopRequest] = []
        self.is_exiting = False
        self.final_status: int | None = None
        self.interrupted_at: float | None = None
        self.before_exit: Callable[[int], int] | None = None
        self.pid = os.getpid()

    def submit(self, request: StopRequest) -> None:
        """Submit a request from another thread. Without a listener, it stays pending until the first step."""
        if self.listener is None:
            self.pending.append(request)
        else:
            self.listener(request)

    def set_listener(self, listener: Callable[[StopRequest], None]) -> None:
        """Set the listener, and call it at once with the pending requests."""
        self.listener = listener
        while self.pending:
            listener(self.pending.pop())

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal: call the listener, exit, or keep the request pending."""
        if os.getpid() != self.pid:  # a forked worker; its parent got the signal too
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        if self.final_status is not None:
            _exit_now(self.final_status)
        request, now = STOP_REQUESTS[signal.Signals(number)], time.monotonic()
        if request is StopRequest.interrupt:
            if self.interrupted_at is not None and now - self.interrupted_at > DUPLICATE_SIGNAL_SECONDS:
                _write_to_stderr(
                    "Interrupted twice: left at once, without saving. The same command resumes from the last checkpoint."
                )
                _exit_now(INTERRUPTED)  # a collective or a thread may block a normal exit
            self.interrupted_at = self.interrupted_at or now
        if self.is_exiting:
            return
        if self.listener is not None:
            self.listener(request)
        elif self.owns_process:
            self.exit_process(request)
        else:
            self.pending.append(request)

    def handle_late_request(self, request: StopRequest) -> None:
        """Handle a request that reached the listener too late: exit, or raise the signal again for the original handler."""
        if self.owns_process:
            self.exit_process(request)
        signal.raise_signal(next(number for number, meant in STOP_REQUESTS.items() if meant is request))

    def exit_process(self, request: StopRequest) -> NoReturn:
        """Exit this process now, without an exception, which might be caught or might wait for other ranks."""
        self.is_exiting, code = True, EXIT_STATUS[request]
        try:
            job = None if is_in_sweep() else get_own_job()  # the sweep agent requeues its own job
            if request is StopRequest.save_and_stop and job is not None and is_preempted(job):
                code = RESTART
            if get_global_rank():
                if code == RESTART and job:
                    # the first exit ends the job step, before rank 0 has called Slurm
                    time.sleep(RANK_ZERO_SECONDS)
                    requeue(job)  # rank 0 may be blocked in C++, where its handler cannot run
            else:
                _requeue_and_report(request, job if code == RESTART else None)
                if self.before_exit is not None:
                    status = _call_within(BEFORE_EXIT_SECONDS, partial(self.before_exit, code))
                    code = code if status is None else status
        finally:
            _exit_now(code)


_signal_handler: SignalHandler | None = None


def get_signal_handler() -> SignalHandler | None:
    """Return the signal handler of this process, if one is registered."""
    return _signal_handler


def handle_signals() -> SignalHandler:
    """Register the signal handler for the rest of this process, which this program owns. A second call changes nothing.

    Python delivers signals only to the main thread. In another thread nothing is registered.
    """
    global _signal_handler
    inherited = _signal_handler is not None and _signal_handler.pid != os.getpid()  # after a fork
    if (_signal_handler is None or inherited) and threading.current_thread() is threading.main_thread():
        _signal_handler = SignalHandler(owns_process=True)
        for number in STOP_REQUESTS:
            signal.signal(number, _signal_handler.handle)
        atexit.register(_stop_interpreter, _signal_handler)  # registered first, so called last
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_REQUESTS)  # run.py has blocked them
    return _signal_handler or SignalHandler()


@contextmanager
def use_listener(listener: Callable[[StopRequest], None]) -> Iterator[SignalHandler]:
    """Call `listener` with stop requests inside the context. Afterwards the original handling is restored."""
    global _signal_handler
    signal_handler, previous = _signal_handler or SignalHandler(), {}
    if _signal_handler is None and threading.current_thread() is threading.main_thread():
        _signal_handler = signal_handler
        previous = {number: signal.signal(number, signal_handler.handle) for number in STOP_REQUESTS}
    signal_handler.set_listener(listener)
    try:
        yield signal_handler
    finally:
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal_handler.listener = None
        if previous:
            _signal_handler = None


@contextmanager
def postpone_signals() -> Iterator[None]:
    """Postpone signals to the end of the context, for work that must not be interrupted, e.g. submitting a job and storing its id."""
    requests: list[StopRequest] = []
    signals = _signal_handler
    if signals is None:
        yield
        return
    signals.listener = requests.append
    try:
        yield
    finally:
        signals.listener = None
        if requests:
            signals.handle_late_request(requests[0])


def _requeue_and_report(request: StopRequest, job: str | None) -> None:
    """Requeue the job, if one is given, and report the exit to the user."""
    refusal = requeue(job) if job else None
    outcome = f"not requeued ({refusal})" if refusal else f"job {job} is requeued" if job else "left"
    _write_to_stderr(
        f"Asked to {request}: no step is under way, so nothing is to be saved; {outcome}. The same command resumes it."
    )


def _stop_interpreter(handler: SignalHandler) -> None:
    """Ignore signals at interpreter shutdown, and exit at once if the final status is known.

    Shutdown takes seconds. During it, the default handlers would end the process with their own status.
    """
    for number in STOP_REQUESTS:
        signal.signal(number, signal.SIG_IGN)
    if handler.final_status is not None and os.getpid() == handler.pid:
        _exit_now(handler.final_status)


def _exit_now(code: int) -> NoReturn:
    """End the process now: stop the children, flush the streams, skip the shutdown of the interpreter."""
    try:
        _stop_children()
        _call_within(FLUSH_SECONDS, _flush_streams)
        if os.isatty(1):
            os.write(1, b"\x1b[?25h")  # show the cursor, which a progress bar hides
    finally:
        os._exit(code)


def _stop_children() -> None:
    """Kill loader and index workers, which would otherwise keep the lock of the run folder for seconds."""
    with suppress(Exception):  # the module may be half imported
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises for a killed worker
        for child in sys.modules["multiprocessing.process"].active_children():
            child.kill()


def _flush_streams() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):  # closed or broken stream
            stream.flush()


def _call_within(seconds: float, function: Callable[[], Any]) -> Any:
    """Call a function with a timeout. Return its result; None if it fails or times out.

    It times out, e.g., if it needs a lock that the interrupted thread holds.
    """
    results: list[Any] = []
    done = _thread.allocate_lock()
    done.acquire()

    def run_function() -> None:
        try:
            with suppress(Exception):
                results.append(function())
        finally:
            done.release()

    _thread.start_new_thread(run_function, ())  # Thread.start() needs a lock that the interrupted thread may hold
    done.acquire(timeout=seconds)
    return results[0] if results else None


def _write_to_stderr(text: str) -> None:
    with suppress(OSError):
        # not print(), which the signal may have interrupted
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"{text}\n".encode())
