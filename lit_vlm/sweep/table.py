"""Tables of a sweep for the terminal: its search space and its trials."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table
from rich.text import Text

from lit_vlm.engine.report_data import format_duration
from lit_vlm.sweep.file import SweepFile
from lit_vlm.sweep.importance import compute_importance, get_reliability_note, list_edge_warnings
from lit_vlm.sweep.reasons import read_comments
from lit_vlm.sweep.report import SweepReport, format_cell, format_counts, sort_records

MAX_ROWS = 20


def make_parameter_table(sweep: SweepFile) -> Table:
    """Make the table of parameters: values, and the file's comment as the reason."""
    reasons = read_comments(Path(sweep.location))
    table = Table(title=f"{sweep.name}: what is tried", title_justify="left")
    for heading in ("parameter", "values", "why"):
        table.add_column(heading, overflow="fold")
    for key, parameter in sweep.parameters.items():
        table.add_row(
            Text(key),
            Text(parameter.format_values() + (" (fixed)" if parameter.is_fixed else "")),
            Text(reasons.get(key, "")),
        )
    return table


def make_trial_table(report: SweepReport) -> Table:
    """Make the table of trials, the best first; the caption holds the parameter importance."""
    table = Table(title=f"{report.sweep.name}: {format_counts(report)}", title_justify="left", caption_justify="left")
    table.add_column("trial", justify="right")
    table.add_column("state")
    table.add_column(Text(report.metric), justify="right")
    for key in report.keys:
        table.add_column(Text(key), overflow="fold")
    table.add_column("time", justify="right")
    for record in sort_records(report)[:MAX_ROWS]:
        is_best = report.best is not None and record.number == report.best.number
        values = [Text(format_cell(record.parameters[key])) if key in record.parameters else "-" for key in report.keys]
        value = "-" if record.value is None else f"{record.value:.5g}"
        table.add_row(
            str(record.number),
            record.state,
            value,
            *values,
            format_duration(record.seconds),
            style="bold green" if is_best else None,
        )
    table.caption = Text("\n".join(_list_remarks(report)), justify="left")
    return table


def _list_remarks(report: SweepReport) -> list[str]:
    """List the lines below the table: hidden rows, importance of each parameter, best values at the end of a range."""
    num_hidden = len(report.records) - MAX_ROWS
    lines = [f"and {num_hidden} more"] if num_hidden > 0 else []
    lines += [
        f"{importance.key}: {importance.share:.0%} of the order, {importance.direction}"
        for importance in compute_importance(report.records, report.sweep)
    ]
    return [*lines, get_reliability_note(report.records), *list_edge_warnings(report.records, report.sweep)]
