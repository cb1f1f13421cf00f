"""Parallel map over worker processes that survives the death of a worker."""

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

MAX_WORKER_DEATHS = 3  # deaths in a row without a completed task
_task_function: Callable[[Any], Any]  # of this worker process


def map_parallel(
    function: Callable[[Task], Result], tasks: Sequence[Task], workers: int
) -> Iterator[tuple[Task, Result]]:
    """Map a function over tasks in parallel; yield (task, result) in the order of completion.

    At most two tasks for each worker are submitted at a time. Processes are forked if the system supports it, so neither
    `function` nor its data need to be picklable.

    Raises:
        UserError: workers died MAX_WORKER_DEATHS times in a row.
    """
    remaining, deaths = list(tasks), 0
    while remaining:
        if min(workers, len(remaining)) <= 1 and not deaths:
            yield from ((task, function(task)) for task in remaining)
            return
        try:
            for task, result in _run_pool(function, remaining[:], workers):
                remaining.remove(task)
                deaths = 0
                yield task, result
        except BrokenProcessPool:
            deaths += 1
            if deaths == MAX_WORKER_DEATHS:
                raise UserError(
                    f"Worker processes died {MAX_WORKER_DEATHS} times in a row over {remaining[0]} and what follows it, killed from outside or by "
                    "their memory. Set data.index_workers lower, and look into the system's log."
                ) from None


def _run_pool(function: Callable[[Task], Result], tasks: list[Task], workers: int) -> Iterator[tuple[Task, Result]]:
    """Run a process pool over the tasks; raises BrokenProcessPool if a worker dies."""
    context = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else None)
    pool = ProcessPoolExecutor(min(workers, len(tasks)), context, initializer=_init_worker, initargs=(function,))
    running: dict[Future[Result], Task] = {}
    tasks.reverse()
    try:
        while tasks or running:
            while tasks and len(running) < 2 * workers:
                task = tasks.pop()
                running[pool.submit(_run_task, task)] = task
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _init_worker(function: Callable[[Any], Any]) -> None:
    """Initialise a worker process."""
    global _task_function
    _task_function = function
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and stops its workers
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    """Exit when the parent ends: a killed parent cannot stop its workers, and they would hold its locks for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _run_task(task: Any) -> Any:
    return _task_function(task)
