"""Charts of a sweep as SVG: parallel coordinates, and the metric of each trial.

Colours come from the report's style sheet, so they follow its light and dark mode. The CSS variable `--rank` of a line holds the
relative rank of its trial in percent.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from lit_vlm.config.overrides import quote_value
from lit_vlm.messages import tell
from lit_vlm.reports.charts import AxisScale, ChartFrame, compute_log_ticks, compute_ticks
from lit_vlm.sweep.results import TrialRecord, compute_ranks, find_best_trial, find_varying_keys, is_numeric
from lit_vlm.sweep.sweep_file import Goal, SweepFile

PARALLEL_FRAME = ChartFrame(1040, 380, left=92, right=46, top=58, bottom=18)
TRIAL_FRAME = ChartFrame(480, 250, left=44, right=14, top=12, bottom=36)
OUTLIER_FACTOR = 5.0
MIN_LOG_RATIO = 30  # from this ratio of the largest to the smallest value on, the axis is logarithmic
MAX_LABEL_LETTERS = 16  # of a category, or of a name above its axis


@dataclass(frozen=True, slots=True)
class ParallelAxis:
    """Vertical axis of the parallel coordinates: position of each value, and the ticks.

    Attributes:
        scale: of numbers; None: the axis has categories.
        categories: from the bottom to the top.
    """

    key: str
    x: float
    scale: AxisScale | None
    categories: tuple[str, ...] = ()
    is_log: bool = False

    def get_position(self, value: Any) -> float:
        """Return the y position of a value, in SVG units."""
        if self.scale is not None:
            return self.scale(float(value))
        return self._get_row_position(self.categories.index(format_category(value)))

    def list_ticks(self) -> list[tuple[float, str]]:
        """List the ticks: y position and label."""
        if self.scale is None:
            return [(self._get_row_position(row), clip_label(name)) for row, name in enumerate(self.categories)]
        low, high = self.scale.low, self.scale.high
        values = compute_log_ticks(low, high) if self.is_log else compute_ticks(low, high)
        if len(values) < 2:
            values = [low, high]
        return [(self.scale(value), f"{value:.4g}") for value in values]

    def _get_row_position(self, row: int) -> float:
        share = (row + 0.5) / len(self.categories)
        return round(PARALLEL_FRAME.floor - share * (PARALLEL_FRAME.floor - PARALLEL_FRAME.top), 1)


def draw_parallel_coordinates(records: Sequence[TrialRecord], sweep: SweepFile) -> str:
    """Draw parallel coordinates as <svg>: one axis for each varying parameter and one for the metric, one line for each trial.

    The better end of the metric is on top. Returns "" if no parameter varied.
    """
    keys = [key for key in find_varying_keys(records) if all(key in record.parameters for record in records)]
    plottable = [record for record in records if _has_plottable_value(record)]
    if not keys or not plottable:
        return ""
    goal = sweep.goal
    left, right = PARALLEL_FRAME.left, PARALLEL_FRAME.right_end
    step = (right - left) / len(keys)
    axes = [_make_axis(key, records, sweep, round(left + number * step, 1)) for number, key in enumerate(keys)]
    metric_axis = _make_metric_axis([record.logged_value for record in plottable], goal, sweep)
    relative_ranks = compute_relative_ranks(plottable, goal)
    best = find_best_trial(records, goal)
    order = sorted(records, key=lambda record: (record is best, relative_ranks.get(record.number, -1.0)))
    lines = "".join(
        _draw_trial(record, axes, metric_axis, relative_ranks.get(record.number), record is best) for record in order
    )
    values = {"count": len(records), "keys": ", ".join(keys), "metric": metric_axis.key}
    label = tell("{count} trials by {keys} and {metric}", **values)
    return PARALLEL_FRAME.draw(lines + "".join(map(_draw_axis, [*axes, metric_axis])), label, "parallel")


def draw_metric_by_trial(records: Sequence[TrialRecord], goal: Goal, metric: str) -> str:
    """Draw the metric of each trial in the order of their numbers as <svg>, with the best value so far. "" without values."""
    plottable = [record for record in records if _has_plottable_value(record)]
    if not plottable:
        return ""
    frame = TRIAL_FRAME
    values = [record.logged_value for record in plottable]
    ends = compute_axis_range(values, goal)
    is_log = _should_use_log(ends)
    low, high = _pad_range(ends, is_log)
    y = AxisScale(low, high, frame.floor, frame.top, is_log)
    x = AxisScale(0, max(1, records[-1].number), frame.left + 10, frame.right_end - 6)
    parts = [
        frame.draw_grid_line(y(value), f"{value:.4g}", "end")
        for value in (compute_log_ticks(low, high) if is_log else compute_ticks(low, high))
    ]
    parts += [
        f'<text class="middle" x="{x(n)}" y="{frame.height - 18}">{n:g}</text>'
        for n in compute_ticks(0, x.high)
        if n == int(n)
    ]
    parts.append(f'<text class="end" x="{frame.right_end}" y="{frame.height - 3}">{tell("trial")}</text>')
    parts.append(f'<polyline class="main" points="{_compute_best_so_far(plottable, goal, x, y)}"/>')
    for record in plottable:
        name = tell("trial {number}", number=record.number)
        title = f"<title>{escape(f'{name}: {metric} {record.value:.5g}, {tell(record.state)}')}</title>"
        parts.append(
            f'<circle class="{record.state}" cx="{x(record.number)}" cy="{y(record.logged_value)}" r="4">{title}</circle>'
        )
    for record in records:
        if record.state == "failed" and not _has_plottable_value(record):
            title = f"<title>{tell('trial {number} failed', number=record.number)}</title>"
            parts.append(f'<text class="cross middle" x="{x(record.number)}" y="{frame.top + 4}">×{title}</text>')
    return frame.draw("".join(parts), tell("{metric} of each trial", metric=metric), "trials")


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


def clip_label(text: str) -> str:
    """Clip a label to `MAX_LABEL_LETTERS` letters."""
    return text if len(text) <= MAX_LABEL_LETTERS else f"{text[: MAX_LABEL_LETTERS - 1]}…"


def _has_plottable_value(record: TrialRecord) -> bool:
    return record.value is not None and math.isfinite(record.value) and record.state != "failed"


def _should_use_log(values: Sequence[float]) -> bool:
    return min(values) > 0 and max(values) / min(values) > MIN_LOG_RATIO


def _pad_range(values: Sequence[float], log: bool = False) -> tuple[float, float]:
    """Return the ends of an axis with some padding; a single value gets padding on both sides."""
    low, high = float(min(values)), float(max(values))
    if low < high:
        padding = 0.0 if log else 0.04 * (high - low)
        return low - padding, high + padding
    return low - (abs(low) or 1.0) * 0.1, high + (abs(high) or 1.0) * 0.1


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
    low, high = ends if ends[0] < ends[1] else _pad_range(values)
    return ParallelAxis(key, x, AxisScale(low, high, PARALLEL_FRAME.floor, PARALLEL_FRAME.top, is_log), is_log=is_log)


def _make_metric_axis(values: list[float], goal: Goal, sweep: SweepFile) -> ParallelAxis:
    low, high = compute_axis_range(values, goal)
    is_log = _should_use_log((low, high))
    if low == high:
        low, high = _pad_range(values)
    ends = (PARALLEL_FRAME.top, PARALLEL_FRAME.floor)
    ends = ends if goal is Goal.minimize else ends[::-1]
    name = sweep.metric.name if sweep.metric else "metric"
    return ParallelAxis(name, PARALLEL_FRAME.right_end, AxisScale(low, high, *ends, is_log), is_log=is_log)


def _draw_trial(
    record: TrialRecord, axes: list[ParallelAxis], metric_axis: ParallelAxis, share: float | None, is_best: bool
) -> str:
    """Draw the line of a trial. Without a value it ends at its last parameter."""
    points = [(axis.x, axis.get_position(record.parameters[axis.key])) for axis in axes]
    if share is not None:
        points.append((metric_axis.x, metric_axis.get_position(record.value)))
    value = f"{metric_axis.key} {record.value:.5g}, " if record.value is not None else ""
    parameters = ", ".join(f"{axis.key}={format_category(record.parameters[axis.key])}" for axis in axes)
    name = tell("trial {number}", number=record.number)
    title = f"<title>{escape(f'{name}, {tell(record.state)}: {value}{parameters}')}</title>"
    style = f' style="--rank:{100 * share:.0f}%"' if share is not None else ""
    path = " ".join(f"{x},{y}" for x, y in points)
    kind = "best" if is_best else record.state
    return f'<polyline class="trial {kind}"{style} points="{path}">{title}</polyline>'


def _draw_axis(axis: ParallelAxis) -> str:
    parts = [f'<line class="axis" x1="{axis.x}" x2="{axis.x}" y1="{PARALLEL_FRAME.top}" y2="{PARALLEL_FRAME.floor}"/>']
    for y, text in axis.list_ticks():
        parts.append(f'<line class="axis" x1="{axis.x - 4}" x2="{axis.x}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="mark end" x="{axis.x - 8}" y="{y + 4}">{escape(text)}</text>')
    prefix, _, word = axis.key.rpartition("." if "." in axis.key else "/")
    prefix = clip_label(prefix.rpartition(".")[2])
    title = f"<title>{escape(axis.key)}</title>"
    parts.append(f'<text class="middle" x="{axis.x}" y="18">{escape(prefix)}{title}</text>')
    scale = tell(" (log)") if axis.is_log else ""
    parts.append(f'<text class="name middle" x="{axis.x}" y="36">{escape(clip_label(word))}{scale}{title}</text>')
    return "".join(parts)


def _compute_best_so_far(records: Sequence[TrialRecord], goal: Goal, x: AxisScale, y: AxisScale) -> str:
    """Compute the points of the best value so far, as steps over the finished trials."""
    points: list[str] = []
    best: float | None = None
    for record in records:
        if record.state == "finished" and (best is None or (record.logged_value < best) == (goal is Goal.minimize)):
            points += [f"{x(record.number)},{y(best)}"] if best is not None else []
            best = record.logged_value
            points.append(f"{x(record.number)},{y(best)}")
    return " ".join([*points, f"{x(x.high)},{y(best)}"] if best is not None else points)
