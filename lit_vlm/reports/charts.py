"""Charts of all pages as SVG: line charts, histograms, parallel coordinates and scatter charts. The style sheets set the colours,
so that charts follow light and dark mode.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import accumulate
from typing import Any

from lit_vlm.formatting import format_tick
from lit_vlm.messages import tell, tell_count, translate
from lit_vlm.reports.preflight.facts import Histogram
from lit_vlm.reports.run_record import Points

MAX_POINTS = 400  # of one line; more points are averaged in groups
MIN_LOG_RATIO = 12  # from this ratio of largest to smallest value on, the scale is logarithmic


@dataclass(frozen=True, slots=True)
class ChartLine:
    """One series of a chart. `style` is a class of the style sheet; `dots` marks each point, if there are few."""

    name: str
    points: Points
    style: str
    dots: bool = False


@dataclass(frozen=True, slots=True)
class AxisScale:
    """Mapping from values to pixels, linear or logarithmic."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = self._transform(self.low), self._transform(self.high)
        share = (self._transform(min(max(value, self.low), self.high)) - low) / ((high - low) or 1.0)
        return round(self.start + share * (self.end - self.start), 1)

    def _transform(self, value: float) -> float:
        return math.log10(value) if self.log else value


@dataclass(frozen=True, slots=True)
class ChartFrame:
    """Size of a drawing and the margins of its plot area, in SVG units; the page scales the drawing."""

    width: int
    height: int
    left: int
    right: int
    top: int
    bottom: int

    @property
    def right_end(self) -> int:
        """Right end of the plot area."""
        return self.width - self.right

    @property
    def floor(self) -> int:
        """Lower end of the plot area."""
        return self.height - self.bottom

    def draw(self, body: str, label: str, style: str = "") -> str:
        """Draw the <svg> element around a body. `label` is a description for screen readers."""
        start = f'<svg class="{style}"' if style else "<svg"
        box = f'viewBox="0 0 {self.width} {self.height}" role="img" aria-label="{escape(label, quote=True)}"'
        return f"{start} {box}>{body}</svg>"

    def draw_grid_line(self, y: float, text: str, style: str) -> str:
        """Draw a horizontal grid line with its number at the left."""
        line = f'<line class="grid" x1="{self.left}" x2="{self.right_end}" y1="{y}" y2="{y}"/>'
        return f'{line}<text class="{style}" x="{self.left - 6}" y="{y + 4}">{text}</text>'

    def draw_floor(self) -> str:
        """Draw the horizontal axis."""
        return f'<line class="axis" x1="{self.left}" x2="{self.right_end}" y1="{self.floor}" y2="{self.floor}"/>'


LINE_FRAME = ChartFrame(480, 250, left=44, right=14, top=12, bottom=30)
HISTOGRAM_FRAME = ChartFrame(480, 190, left=46, right=12, top=26, bottom=40)
HISTOGRAM_STYLES = ("main", "second", "third")  # classes of the style sheet, one for each series


def draw_line_chart(
    lines: Sequence[ChartLine],
    *,
    label: str,
    low: float | None = None,
    high: float | None = None,
    allow_log: bool = False,
) -> str:
    """Draw a line chart as an <svg>; "" if there are no points.

    Args:
        label: description for screen readers.
        low, high: ends of the scale; None: those of the values.
        allow_log: use a logarithmic scale if the ratio of the values exceeds `MIN_LOG_RATIO`.
    """
    lines = [ChartLine(line.name, reduce_points(line.points), line.style, line.dots) for line in lines]
    points = [point for line in lines for point in line.points]
    if not points:
        return ""
    values = [value for _, value in points]
    bottom, top = min(values) if low is None else low, max(values) if high is None else high
    log = allow_log and bottom > 0 and top / bottom > MIN_LOG_RATIO
    if not log and low is None:
        bottom = max(0.0, bottom - 0.05 * (top - bottom)) if bottom >= 0 else bottom
    x = AxisScale(0, 1 + max(step for step, _ in points), LINE_FRAME.left, LINE_FRAME.right_end)
    y = AxisScale(bottom, top if top > bottom else bottom + 1, LINE_FRAME.floor, LINE_FRAME.top, log)
    return LINE_FRAME.draw(_draw_axes(x, y) + "".join(_draw_line(line, x, y) for line in lines), label)


def smooth(points: Points, share: float = 0.04) -> Points:
    """Smooth with a centred mean over about this share of the points; it does not lag behind a falling curve."""
    max_half_width = int(share * len(points) / 2)
    totals = [0.0, *accumulate(value for _, value in points)]
    result = []
    for i, (step, _) in enumerate(points):
        half_width = min(
            max_half_width, i, len(points) - 1 - i
        )  # the same number of points on the left and on the right
        result.append((step, (totals[i + half_width + 1] - totals[i - half_width]) / (2 * half_width + 1)))
    return result


def reduce_points(points: Points, max_points: int = MAX_POINTS) -> Points:
    """Reduce the finite points to at most `max_points`, by means of neighbours."""
    points = [(step, value) for step, value in points if math.isfinite(value)]
    if len(points) <= max_points:
        return points
    size = math.ceil(len(points) / max_points)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]


def compute_ticks(low: float, high: float, max_ticks: int = 5) -> list[float]:
    """Compute round tick values between the ends, about `max_ticks` at most."""
    if high <= low:
        return [low]
    raw = (high - low) / max_ticks
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(size * power for size in (1, 2, 5, 10) if size * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(number * step, 12) for number in range(first, math.floor(high / step + 1e-9) + 1)]


def compute_log_ticks(low: float, high: float) -> list[float]:
    """Compute tick values 1, 2 and 5 times the powers of ten; the powers alone if these are too many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [size * 10.0**power for power in powers for size in (1, 2, 5) if low <= size * 10.0**power <= high]
    return found if len(found) <= 7 else [value for value in found if math.log10(value).is_integer()]


def _draw_axes(x: AxisScale, y: AxisScale) -> str:
    frame = LINE_FRAME
    values = compute_log_ticks(y.low, y.high) if y.log else compute_ticks(y.low, y.high)
    parts = [frame.draw_grid_line(y(value), f"{value:g}", "tick end") for value in values]
    for value in compute_ticks(x.low, x.high):
        if x(value) < frame.right_end - 90:  # the corner is reserved for the last step
            parts.append(f'<text class="tick middle" x="{x(value)}" y="{frame.floor + 17}">{format_tick(value)}</text>')
    corner = f'x="{frame.right_end}" y="{frame.floor + 17}"'
    steps = tell("{count} steps", count=format_tick(x.high))
    parts.append(f'<text class="tick end" {corner}>{steps}</text>')
    return "".join(parts) + frame.draw_floor()


def _draw_line(line: ChartLine, x: Callable[[float], float], y: Callable[[float], float]) -> str:
    positions = [(x(step + 1), y(value)) for step, value in line.points]  # loggers count steps from 0
    path = " ".join(f"{left},{top}" for left, top in positions)
    svg = f'<polyline class="{line.style}" points="{path}"/>' if len(positions) > 1 else ""
    if line.dots or len(positions) == 1:
        for (left, top), (step, value) in zip(positions, line.points, strict=True):
            place = tell("step {number}", number=step + 1)
            title = f"<title>{escape(line.name)}, {place}: {value:.4g}</title>"
            svg += f'<circle class="{line.style}" cx="{left}" cy="{top}" r="4">{title}</circle>'
    return svg


def draw_histogram(histogram: Histogram) -> str:
    """Draw a histogram as an <svg>: stacked bars, a mark at the median and one at the micro-batch limit."""
    edges, cap = histogram.edges, histogram.cap
    high = max(edges[-1], cap or 0)
    low = max(edges[0], 1e-9) if histogram.log else edges[0]
    frame = HISTOGRAM_FRAME
    x = AxisScale(low, high, frame.left, frame.right_end, histogram.log)
    totals = [sum(counts) for counts in zip(*histogram.series.values(), strict=True)]
    y = AxisScale(0, max(max(totals, default=0), 1), frame.floor, frame.top)
    body = _draw_histogram_axes(x, y, histogram.unit) + _draw_bars(histogram, x, y)
    body += _draw_mark(x(histogram.spread.median), "median", tell("median"))
    if cap is not None:
        body += _draw_mark(x(cap), "cap", translate(histogram.cap_name), end=True)
    spread = {"median": f"{histogram.spread.median:g}", "most": f"{histogram.spread.most:g}"}
    label = tell("{title}: median {median}, at most {most}", title=translate(histogram.title), **spread)
    return frame.draw(body, label)


def _draw_bars(histogram: Histogram, x: Callable[[float], float], y: Callable[[float], float]) -> str:
    parts = []
    base = [0] * (len(histogram.edges) - 1)
    for style, (name, counts) in zip(HISTOGRAM_STYLES, histogram.series.items(), strict=False):
        for number, count in enumerate(counts):
            if not count:
                continue
            left, right = x(histogram.edges[number]), x(histogram.edges[number + 1])
            upper, lower = y(base[number] + count), y(base[number])
            span = _format_bin(histogram, number)
            title = f"<title>{escape(name)}, {span}: {tell_count(count, 'sample')}</title>"
            width = max(right - left - 0.8, 0.6)
            parts.append(
                f'<rect class="{style}" x="{left + 0.4:.1f}" y="{upper}" width="{width:.1f}" height="{max(lower - upper, 0.5):.1f}">{title}</rect>'
            )
            base[number] += count
    return "".join(parts)


def _format_bin(histogram: Histogram, bin_index: int) -> str:
    low, high = histogram.edges[bin_index], histogram.edges[bin_index + 1]
    unit = tell(histogram.unit)
    if low % 1 != 0.5 or high % 1 != 0.5:  # a bin of whole numbers ends between two of them
        return tell("{low} to {high} {unit}", low=f"{low:.4g}", high=f"{high:.4g}", unit=unit)
    first, last = math.ceil(low), math.ceil(high) - 1
    return (
        f"{first:,} {unit}"
        if first == last
        else tell("{low} to {high} {unit}", low=f"{first:,}", high=f"{last:,}", unit=unit)
    )


def _draw_mark(position: float, style: str, text: str, *, end: bool = False) -> str:
    frame = HISTOGRAM_FRAME
    line = f'<line class="mark {style}" x1="{position}" x2="{position}" y1="{frame.top - 8}" y2="{frame.floor}"/>'
    right = end or position > frame.width - 90
    anchor, side = (" end", position + 4) if right else ("", position - 4)
    return line + f'<text class="tick{anchor}" x="{side}" y="{frame.top - 12}">{text}</text>'


def _draw_histogram_axes(x: AxisScale, y: AxisScale, unit: str) -> str:
    frame = HISTOGRAM_FRAME
    counts = [value for value in compute_ticks(0, y.high, 3) if value == int(value)]
    parts = [frame.draw_grid_line(y(value), format_tick(value), "tick end") for value in counts]
    for value in compute_log_ticks(x.low, x.high) if x.log else compute_ticks(x.low, x.high, 6):
        if value == int(value) and frame.left - 1 <= x(value) <= frame.right_end - 4:
            parts.append(f'<text class="tick middle" x="{x(value)}" y="{frame.floor + 16}">{format_tick(value)}</text>')
    corner = f'x="{frame.right_end}" y="{frame.floor + 34}"'
    parts.append(f'<text class="tick end" {corner}>{tell(unit)}{tell(", log") if x.log else ""}</text>')
    return "".join(parts) + frame.draw_floor()


PARALLEL_FRAME = ChartFrame(1040, 380, left=92, right=46, top=58, bottom=18)
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
        return self._get_row_position(self.categories.index(value))

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


@dataclass(frozen=True, slots=True)
class ParallelLine:
    """Line of parallel coordinates.

    Attributes:
        values: of the axes from the left; fewer than axes: the line ends before.
        rank: relative rank, 0 to 1, as `--rank` in percent; None: without.
    """

    values: Sequence[Any]
    style: str
    title: str
    rank: float | None = None


def draw_parallel_coordinates(axes: Sequence[ParallelAxis], lines: Sequence[ParallelLine], label: str) -> str:
    """Draw parallel coordinates as an <svg>: vertical axes, and one line for each of `lines`, the last on top."""
    parts = []
    for line in lines:
        points = [(axis.x, axis.get_position(value)) for axis, value in zip(axes, line.values, strict=False)]
        path = " ".join(f"{x},{y}" for x, y in points)
        rank = f' style="--rank:{100 * line.rank:.0f}%"' if line.rank is not None else ""
        title = f"<title>{escape(line.title)}</title>"
        parts.append(f'<polyline class="{line.style}"{rank} points="{path}">{title}</polyline>')
    return PARALLEL_FRAME.draw("".join([*parts, *map(_draw_axis, axes)]), label, "parallel")


def clip_label(text: str) -> str:
    """Clip a label to `MAX_LABEL_LETTERS` letters."""
    return text if len(text) <= MAX_LABEL_LETTERS else f"{text[: MAX_LABEL_LETTERS - 1]}…"


def pad_range(values: Sequence[float], log: bool = False) -> tuple[float, float]:
    """Return the ends of an axis with some padding; a single value gets padding on both sides."""
    low, high = float(min(values)), float(max(values))
    if low < high:
        padding = 0.0 if log else 0.04 * (high - low)
        return low - padding, high + padding
    return low - (abs(low) or 1.0) * 0.1, high + (abs(high) or 1.0) * 0.1


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


TRIAL_FRAME = ChartFrame(480, 250, left=44, right=14, top=12, bottom=36)


@dataclass(frozen=True, slots=True)
class ChartPoint:
    """Point of a scatter chart with its style and title. `y` None: a cross at the top."""

    x: int
    y: float | None
    style: str
    title: str


def draw_scatter(
    points: Sequence[ChartPoint],
    line: Sequence[tuple[float, float]],
    ends: tuple[float, float],
    *,
    x_end: int,
    is_log: bool,
    unit: str,
    label: str,
) -> str:
    """Draw points over whole numbers as an <svg>, with a line through other points.

    Args:
        ends: of the vertical scale.
        x_end: end of the horizontal scale, which begins at 0; `unit` stands below it.
    """
    frame, (low, high) = TRIAL_FRAME, ends
    y = AxisScale(low, high, frame.floor, frame.top, is_log)
    x = AxisScale(0, x_end, frame.left + 10, frame.right_end - 6)
    ticks = compute_log_ticks(low, high) if is_log else compute_ticks(low, high)
    parts = [frame.draw_grid_line(y(value), f"{value:.4g}", "end") for value in ticks]
    for n in compute_ticks(0, x.high):
        if n == int(n):
            parts.append(f'<text class="middle" x="{x(n)}" y="{frame.height - 18}">{n:g}</text>')
    parts.append(f'<text class="end" x="{frame.right_end}" y="{frame.height - 3}">{unit}</text>')
    path = " ".join(f"{x(left)},{y(value)}" for left, value in line)
    parts.append(f'<polyline class="main" points="{path}"/>')
    for point in points:
        title = f"<title>{escape(point.title)}</title>"
        if point.y is None:
            parts.append(f'<text class="cross middle" x="{x(point.x)}" y="{frame.top + 4}">×{title}</text>')
        else:
            parts.append(f'<circle class="{point.style}" cx="{x(point.x)}" cy="{y(point.y)}" r="4">{title}</circle>')
    return frame.draw("".join(parts), label, "trials")
