"""Report of a sweep: tables for the terminal, and the page with the charts of its trials."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup
from rich.table import Table
from rich.text import Text

from lit_vlm.config.overrides import quote_value
from lit_vlm.formatting import format_duration
from lit_vlm.messages import tell, translate
from lit_vlm.reports import templates
from lit_vlm.reports.charts import (
    PARALLEL_FRAME,
    AxisScale,
    ChartPoint,
    ParallelAxis,
    ParallelLine,
    draw_parallel_coordinates,
    draw_scatter,
    pad_range,
)
from lit_vlm.sweep.results import (
    TRIAL_STATES,
    TrialRecord,
    compute_importance,
    compute_ranks,
    find_best_trial,
    find_varying_keys,
    get_reliability_note,
    is_numeric,
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
        own_command: command line of the sweep.
    """

    sweep: SweepFile
    records: Sequence[TrialRecord]
    total: int | None = None
    command: str = ""
    carried: str = ""
    own_command: str = ""

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
        "parallel": Markup(draw_trials(report.records, report.sweep)),
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


OUTLIER_FACTOR = 5.0
MIN_LOG_RATIO = 30  # from this ratio of the largest to the smallest value on, the axis is logarithmic


def draw_trials(records: Sequence[TrialRecord], sweep: SweepFile) -> str:
    """Draw parallel coordinates as <svg>: one axis for each varying parameter and one for the metric, one line for each trial.

    The better end of the metric is on top. Returns "" if no parameter varied.
    """
    keys = [key for key in find_varying_keys(records) if all(key in record.parameters for record in records)]
    plottable = [record for record in records if _has_plottable_value(record)]
    if not keys or not plottable:
        return ""
    left, right = PARALLEL_FRAME.left, PARALLEL_FRAME.right_end
    step = (right - left) / len(keys)
    axes = [_make_axis(key, records, sweep, round(left + number * step, 1)) for number, key in enumerate(keys)]
    metric_axis = _make_metric_axis([record.logged_value for record in plottable], sweep)
    ranks = compute_relative_ranks(plottable, sweep.goal)
    best = find_best_trial(records, sweep.goal)
    order = sorted(records, key=lambda record: (record is best, ranks.get(record.number, -1.0)))
    lines = [_make_line(record, axes, metric_axis, ranks.get(record.number), record is best) for record in order]
    values = {"count": len(records), "keys": ", ".join(keys), "metric": metric_axis.key}
    return draw_parallel_coordinates(
        [*axes, metric_axis], lines, tell("{count} trials by {keys} and {metric}", **values)
    )


def draw_metric_by_trial(records: Sequence[TrialRecord], goal: Goal, metric: str) -> str:
    """Draw the metric of each trial in the order of their numbers as <svg>, with the best value so far. "" without values."""
    plottable = [record for record in records if _has_plottable_value(record)]
    if not plottable:
        return ""
    ends = compute_axis_range([record.logged_value for record in plottable], goal)
    is_log = _should_use_log(ends)
    points = []
    for record in plottable:
        name = tell("trial {number}", number=record.number)
        title = f"{name}: {metric} {record.value:.5g}, {tell(record.state)}"
        points.append(ChartPoint(record.number, record.logged_value, record.state, title))
    for record in records:
        if record.state == "failed":
            points.append(ChartPoint(record.number, None, "", tell("trial {number} failed", number=record.number)))
    x_end = max(1, records[-1].number)
    return draw_scatter(
        points,
        _compute_best_so_far(plottable, goal, x_end),
        pad_range(ends, is_log),
        x_end=x_end,
        is_log=is_log,
        unit=tell("trial"),
        label=tell("{metric} of each trial", metric=metric),
    )


def compute_relative_ranks(records: Sequence[TrialRecord], goal: Goal) -> dict[int, float]:
    """Compute relative ranks by trial number: 0 for the worst value, 1 for the best."""
    sign = -1 if goal is Goal.minimize else 1
    ranks = compute_ranks([sign * record.logged_value for record in records])
    max_rank = max(1, len(records) - 1)
    return {record.number: (rank - 1) / max_rank for record, rank in zip(records, ranks, strict=True)}


def compute_axis_range(values: Sequence[float], goal: Goal) -> tuple[float, float]:
    """Compute the ends of the metric's axis.

    Values far worse than the median (`OUTLIER_FACTOR` times as far from it as the best) are drawn at the end of the axis.
    Otherwise one diverged trial would squeeze all other trials together.
    """
    low, high, median = min(values), max(values), statistics.median(values)
    if goal is Goal.minimize:
        return low, min(high, median + OUTLIER_FACTOR * (median - low)) if median > low else high
    return max(low, median - OUTLIER_FACTOR * (high - median)) if high > median else low, high


def format_category(value: Any) -> str:
    """Format a value as a category: as on the command line, but text without quotes."""
    return value if isinstance(value, str) else quote_value(value)


def _has_plottable_value(record: TrialRecord) -> bool:
    return record.value is not None and math.isfinite(record.value) and record.state != "failed"


def _should_use_log(values: Sequence[float]) -> bool:
    return min(values) > 0 and max(values) / min(values) > MIN_LOG_RATIO


def _make_axis(key: str, records: Sequence[TrialRecord], sweep: SweepFile, x: float) -> ParallelAxis:
    values, parameter = [record.parameters[key] for record in records], sweep.parameters.get(key)
    if not all(map(is_numeric, values)) or (parameter is not None and parameter.values and len(parameter.values) <= 8):
        listed_values = parameter.values if parameter is not None and parameter.values else ()
        return ParallelAxis(key, x, None, tuple(dict.fromkeys(map(format_category, [*listed_values, *values]))))
    is_log = parameter.is_log if parameter is not None else _should_use_log(values)
    ends = (
        (parameter.min, parameter.max) if parameter is not None and parameter.is_range else (min(values), max(values))
    )
    ends = (min(*ends, *values), max(*ends, *values))
    is_log = is_log and ends[0] > 0
    low, high = ends if ends[0] < ends[1] else pad_range(values)
    return ParallelAxis(key, x, AxisScale(low, high, PARALLEL_FRAME.floor, PARALLEL_FRAME.top, is_log), is_log=is_log)


def _make_metric_axis(values: list[float], sweep: SweepFile) -> ParallelAxis:
    goal = sweep.goal
    low, high = compute_axis_range(values, goal)
    is_log = _should_use_log((low, high))
    if low == high:
        low, high = pad_range(values)
    ends = (PARALLEL_FRAME.top, PARALLEL_FRAME.floor)
    ends = ends if goal is Goal.minimize else ends[::-1]
    name = sweep.metric.name if sweep.metric else "metric"
    return ParallelAxis(name, PARALLEL_FRAME.right_end, AxisScale(low, high, *ends, is_log), is_log=is_log)


def _make_line(
    record: TrialRecord, axes: list[ParallelAxis], metric_axis: ParallelAxis, rank: float | None, is_best: bool
) -> ParallelLine:
    """Make the line of a trial. Without a value it ends at its last parameter."""
    values = [
        record.parameters[axis.key] if axis.scale else format_category(record.parameters[axis.key]) for axis in axes
    ]
    value = f"{metric_axis.key} {record.value:.5g}, " if record.value is not None else ""
    parameters = ", ".join(f"{axis.key}={format_category(record.parameters[axis.key])}" for axis in axes)
    title = f"{tell('trial {number}', number=record.number)}, {tell(record.state)}: {value}{parameters}"
    style = f"trial {'best' if is_best else record.state}"
    return ParallelLine([*values, *([record.value] if rank is not None else [])], style, title, rank)


def _compute_best_so_far(records: Sequence[TrialRecord], goal: Goal, end: int) -> list[tuple[float, float]]:
    """Compute the points of the best value so far, as steps over the finished trials."""
    points: list[tuple[float, float]] = []
    best: float | None = None
    for record in records:
        if record.state == "finished" and (best is None or (record.logged_value < best) == (goal is Goal.minimize)):
            points += [(record.number, best)] if best is not None else []
            best = record.logged_value
            points.append((record.number, best))
    return [*points, (end, best)] if best is not None else points
