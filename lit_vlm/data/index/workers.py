"""Work over many processes that outlives the death of one of them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from lit_vlm.types import UserError

Task = TypeVar("Task")
Result = TypeVar("Result")

PATIENCE = 3  # deaths in a row without a task done
_work: Callable[[Any], Any]  # a worker process's own


def parallel(work: Callable[[Task], Result], tasks: Sequence[Task], workers: int) -> Iterator[tuple[Task, Result]]:
    """Each task with its result, in the order in which they are done; at most two results a worker are waiting.

    The processes are forked where the system can, so that neither `work` nor what it holds needs to pickle.

    Raises:
        UserError: workers keep dying.
    """
    left, deaths = list(tasks), 0
    while left:
        if min(workers, len(left)) <= 1 and not deaths:
            yield from ((task, work(task)) for task in left)
            return
        try:
            for task, result in _attempt(work, left[:], workers):
                left.remove(task)
                deaths = 0
                yield task, result
        except BrokenProcessPool:
            deaths += 1
            if deaths == PATIENCE:
                raise UserError(
                    f"Worker processes died {PATIENCE} times in a row over {left[0]} and what follows it, killed from outside or by "
                    "their memory. Set data.index_workers lower, and look into the system's log."
                ) from None


def _attempt(work: Callable[[Task], Result], tasks: list[Task], workers: int) -> Iterator[tuple[Task, Result]]:
    context = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else None)
    pool = ProcessPoolExecutor(min(workers, len(tasks)), context, initializer=_start, initargs=(work,))
    running: dict[Future[Result], Task] = {}
    tasks.reverse()
    try:
        while tasks or running:
            while tasks and len(running) < 2 * workers:
                task = tasks.pop()
                running[pool.submit(_do, task)] = task
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _start(work: Callable[[Any], Any]) -> None:
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends its workers
    threading.Thread(target=_follow_parent, daemon=True).start()


def _follow_parent() -> None:
    """A parent that is killed cannot end its workers, which would hold its locks for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _do(task: Any) -> Any:
    return _work(task)
