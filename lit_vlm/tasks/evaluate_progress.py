"""Progress of task=evaluate while the harness runs, and the end of a run that cannot go on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lit_vlm.fault_tolerance.signals import EXIT_STATUS, StopRequest, use_listener
from lit_vlm.tasks.terminal import console, say
from lit_vlm.types import UserError

if TYPE_CHECKING:
    from lit_vlm.serving.recording_endpoint import AnswerRecorder

PROGRESS_SECONDS = 30.0  # between two lines where there is no terminal
MAX_UNREACHABLE = 3  # requests that an endpoint may leave without an answer before the run ends
_UNREACHABLE = ("502", "504")  # statuses of the recorder for an endpoint that does not answer


@contextmanager
def show_requests(
    name: str, total: int | None, recorder: AnswerRecorder, judge: AnswerRecorder | None
) -> Iterator[Callable[[], None]]:
    """Show how many requests of a benchmark were answered. Yields the function to call while the harness runs.

    That function raises UserError when the model's endpoint or the judge no longer answers, and SystemExit after a stop
    request.
    """
    before, known = recorder.counts.answered, recorder.counts.from_log
    last_line, said = time.monotonic(), ""
    stops: list[StopRequest] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=console, transient=True) if console.is_terminal else None

    def format_counts() -> str:
        answered, old = recorder.counts.answered - before, recorder.counts.from_log - known
        numbers = f"{answered:,} of {total:,} requests" if total else f"{answered:,} requests"
        text = f"{name}: {numbers} answered" + (f", {old:,} of them from the log" if old else "")
        return text + (f"; {judge.counts.answered:,} by the judge" if judge and judge.counts.answered else "")

    def say_counts() -> None:
        nonlocal said
        if said != (said := format_counts()):
            say(said)

    def on_wait() -> None:
        nonlocal last_line
        if bar is not None and line is not None:
            bar.update(line, completed=recorder.counts.answered - before)
        elif time.monotonic() - last_line > PROGRESS_SECONDS:
            last_line = time.monotonic()
            say_counts()
        if stops:
            say(f"Stopped: {format_counts()}. They are kept: the same command asks only for what is missing.")
            raise SystemExit(EXIT_STATUS[stops[0]])
        for title, asked in (("the endpoint", recorder), ("the judge", judge)):
            errors = [] if asked is None else [error for _, error in list(asked.failures.values())]
            unreachable = [error for error in errors if error.startswith(_UNREACHABLE)]
            if len(unreachable) >= MAX_UNREACHABLE:
                raise UserError(
                    f"{format_counts()}, then {title} no longer answered: {unreachable[-1]} Start it again, and then the same"
                    " command: the answers are kept, and it asks only for what is missing."
                )

    with use_listener(stops.append), bar or nullcontext():
        line = None if bar is None else bar.add_task(name, total=total)
        yield on_wait
    say_counts()
