"""Terminal output of the tasks. With several ranks, only rank 0 prints."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from lit_vlm.runs.run_folder import is_rank_zero
from lit_vlm.types import escape_control_characters

console = Console(highlight=False)
if not console.is_terminal:
    console = Console(highlight=False, width=max(console.width, 110))  # tables in a log file need at least this width
MIN_PROGRESS_RECORDS = 20_000  # a pass over fewer records ends before a progress bar can be read

OnProgress = Callable[[str, int, int], None]


def say(text: str) -> None:
    """Print a line on rank 0, without colour markup and control characters."""
    if is_rank_zero():
        console.print(
            escape_control_characters(text), soft_wrap=True, markup=False
        )  # brackets in a path are not markup


@contextmanager
def show_progress(verb: str) -> Iterator[OnProgress]:
    """Show a progress bar for each source. It disappears at the end; without a terminal there is none.

    Args:
        verb: label before the name of the source, e.g. "index".
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bars: dict[str, TaskID] = {}
    with Progress(
        *columns, console=console, transient=True, disable=not (console.is_terminal and is_rank_zero())
    ) as bar:

        def on_progress(source: str, done: int, total: int) -> None:
            if total < MIN_PROGRESS_RECORDS:
                return
            if source not in bars:
                bars[source] = bar.add_task(f"{verb} {source}", total=total)
            bar.update(bars[source], completed=done)

        yield on_progress
