"""Tables of a sweep for the terminal: its search space and its trials."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table
from rich.text import Text

from lit_vlm.engine.report_data import duration
from lit_vlm.sweep.file import SweepFile
from lit_vlm.sweep.importance import at_an_end, importance_of, remark
from lit_vlm.sweep.reasons import reasons_in
from lit_vlm.sweep.report import Page, cell, counts, ordered

MOST_ROWS = 20


def parameter_table(sweep: SweepFile) -> Table:
    """Make the table of parameters: values, and the file's comment as the reason."""
    reasons = reasons_in(Path(sweep.place))
    table = Table(title=f"{sweep.name}: what is tried", title_justify="left")
    for heading in ("parameter", "values", "why"):
        table.add_column(heading, overflow="fold")
    for key, parameter in sweep.parameters.items():
        table.add_row(
            Text(key), Text(parameter.shown() + (" (fixed)" if parameter.is_fixed else "")), Text(reasons.get(key, ""))
        )
    return table


def trial_table(page: Page) -> Table:
    """Make the table of trials, the best first; the caption holds the parameter importance."""
    table = Table(title=f"{page.sweep.name}: {counts(page)}", title_justify="left", caption_justify="left")
    table.add_column("trial", justify="right")
    table.add_column("state")
    table.add_column(Text(page.metric), justify="right")
    for key in page.keys:
        table.add_column(Text(key), overflow="fold")
    table.add_column("time", justify="right")
    for record in ordered(page)[:MOST_ROWS]:
        is_best = page.best is not None and record.number == page.best.number
        values = [Text(cell(record.parameters[key])) if key in record.parameters else "-" for key in page.keys]
        value = "-" if record.value is None else f"{record.value:.5g}"
        table.add_row(
            str(record.number),
            record.state,
            value,
            *values,
            duration(record.seconds),
            style="bold green" if is_best else None,
        )
    table.caption = Text("\n".join(_decided(page)), justify="left")
    return table


def _decided(page: Page) -> list[str]:
    """List the lines below the table: hidden rows, importance of each parameter, best values at the end of a range."""
    num_hidden = len(page.records) - MOST_ROWS
    lines = [f"and {num_hidden} more"] if num_hidden > 0 else []
    lines += [
        f"{importance.key}: {importance.share:.0%} of the order, {importance.direction}"
        for importance in importance_of(page.records, page.sweep)
    ]
    return [*lines, remark(page.records), *at_an_end(page.records, page.sweep)]
