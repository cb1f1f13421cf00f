"""What a task says on the terminal; on several ranks, the first one's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from lit_vlm.engine.run_folder import is_rank_zero
from lit_vlm.types import escape_controls

console = Console(highlight=False)
if not console.is_terminal:
    console = Console(highlight=False, width=max(console.width, 110))  # a log file is no narrower than its tables
MANY = 20_000  # records: a pass over fewer is over before its bar is read

OnProgress = Callable[[str, int, int], None]


def say(text: str) -> None:
    if is_rank_zero():
        console.print(escape_controls(text), soft_wrap=True, markup=False)  # brackets in a path are a path's


@contextmanager
def progress_over(verb: str) -> Iterator[OnProgress]:
    """A bar per source while records are gone through; gone at the end, and none where nobody watches."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bars: dict[str, TaskID] = {}
    with Progress(
        *columns, console=console, transient=True, disable=not (console.is_terminal and is_rank_zero())
    ) as bar:

        def on_progress(source: str, done: int, total: int) -> None:
            if total < MANY:
                return
            if source not in bars:
                bars[source] = bar.add_task(f"{verb} {source}", total=total)
            bar.update(bars[source], completed=done)

        yield on_progress
