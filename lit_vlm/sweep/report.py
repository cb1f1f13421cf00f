"""Tables of a sweep for the terminal: its search space and its trials."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup
from rich.table import Table
from rich.text import Text

from lit_vlm.formatting import format_duration
from lit_vlm.messages import tell, translate
from lit_vlm.reports import templates
from lit_vlm.sweep.charts import compute_axis_range, draw_metric_by_trial, draw_parallel_coordinates, format_category
from lit_vlm.sweep.results import (
    TRIAL_STATES,
    TrialRecord,
    compute_importance,
    find_best_trial,
    find_varying_keys,
    get_reliability_note,
    list_edge_warnings,
)
from lit_vlm.sweep.search_space import read_comments
from lit_vlm.sweep.sweep_file import Goal, SweepFile

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


@dataclass(frozen=True, slots=True)
class SweepReport:
    """Content of the report.

    Attributes:
        total: planned number of trials; None: not known.
        command: command line of the best trial; "" for none.
        carried: command line with the same values in another experiment; "" for none.
    """

    sweep: SweepFile
    records: Sequence[TrialRecord]
    total: int | None = None
    command: str = ""
    carried: str = ""

    @property
    def goal(self) -> Goal:
        return self.sweep.goal

    @property
    def metric(self) -> str:
        return self.sweep.metric.name if self.sweep.metric else "value"

    @property
    def best(self) -> TrialRecord | None:
        return find_best_trial(self.records, self.goal)

    @property
    def keys(self) -> list[str]:
        """Keys of the parameters that varied; without any, those of the search space."""
        return find_varying_keys(self.records) or list(self.sweep.search_space)


def write_sweep_report(path: Path, report: SweepReport) -> None:
    """Write the report atomically: a reader finds the old file or the new one."""
    templates.write_page(path, _TEMPLATE.render(**_build_context(report)))


def sort_records(report: SweepReport) -> list[TrialRecord]:
    """Sort the records: finished trials first, the best on top; then stopped, failed and running ones."""
    sign = 1 if report.goal is Goal.minimize else -1

    def get_sort_key(record: TrialRecord) -> tuple[int, float, int]:
        value = sign * record.value if record.value is not None else 0.0
        return TRIAL_STATES.index(record.state), value, record.number

    return sorted(report.records, key=get_sort_key)


def format_counts(report: SweepReport) -> str:
    """Format the counts, e.g. `12 of 12 trials: 9 finished, 2 stopped early, 1 failed`."""
    by_state = Counter(record.state for record in report.records)
    labels = {"finished": "finished", "stopped": "stopped early", "failed": "failed", "running": "under way"}
    states = ", ".join(f"{by_state[state]} {label}" for state, label in labels.items() if by_state[state])
    total = f" of {report.total}" if report.total else ""
    return f"{len(report.records)}{total} trials: {states or 'none yet'}"


def tell_counts(report: SweepReport) -> str:
    """Format the counts, as `format_counts`, in the language of this process."""
    total, _, states = format_counts(report).partition(": ")
    return f"{translate(total)}: {', '.join(map(translate, states.split(', ')))}"


def format_cell(value: Any) -> str:
    """Format a parameter's value for a table cell."""
    return f"{value:g}" if isinstance(value, float) else format_category(value)


def format_key(key: str) -> Markup:
    """Format a dotted key so that the browser may break the line after a dot."""
    return Markup(".<wbr>").join(key.split("."))


_TEMPLATE = templates.PageTemplate(
    "page.html", "page.css", folder=Path(__file__).parent, cell=format_cell, duration=format_duration, dotted=format_key
)


def _build_context(report: SweepReport) -> dict[str, Any]:
    importance = compute_importance(report.records, report.sweep)
    fixed = {key: value for key, value in report.sweep.fixed.items() if key not in report.keys}
    return {
        "page": report,
        "title": report.sweep.name,
        "lead": report.sweep.description or "",
        "counts": tell_counts(report),
        "facts": _list_facts(report),
        "parallel": Markup(draw_parallel_coordinates(report.records, report.sweep)),
        "far": _get_axis_limit(report),
        "trials": Markup(draw_metric_by_trial(report.records, report.goal, report.metric)),
        "importance": importance,
        "remark": get_reliability_note(report.records),
        "ends": list_edge_warnings(report.records, report.sweep),
        "rows": sort_records(report),
        "fixed": fixed,
    }


def _get_axis_limit(report: SweepReport) -> float | None:
    """Return the end of the metric's axis if some values lie beyond it; None otherwise."""
    values = [record.value for record in report.records if record.value is not None and record.state != "failed"]
    if not values:
        return None
    low, high = compute_axis_range(values, report.goal)
    is_clipped, limit = (max(values) > high, high) if report.goal is Goal.minimize else (min(values) < low, low)
    return limit if is_clipped else None


def _list_facts(report: SweepReport) -> list[tuple[str, str]]:
    hyperband = report.sweep.early_terminate
    seconds = [record.seconds for record in report.records if record.seconds]
    facts = [
        ("method", report.sweep.method.value),
        (
            "metric",
            tell(
                "{metric}, lower is better" if report.goal is Goal.minimize else "{metric}, higher is better",
                metric=report.metric,
            ),
        ),
        (
            "stopped early",
            tell(
                "by hyperband: first after {count} values, the best 1/{eta} continue",
                count=hyperband.rungs[0] + 1,
                eta=f"{hyperband.eta:g}",
            )
            if hyperband
            else tell("never"),
        ),
        ("time of all trials", format_duration(sum(seconds)) if seconds else ""),
        ("file", report.sweep.location),
    ]
    return [(tell(name), value) for name, value in facts if value]
