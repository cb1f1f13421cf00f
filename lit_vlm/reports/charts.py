"""Line charts as SVG, written by hand: the page's style sheet sets the colours, so they follow its light and dark mode."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import accumulate

from lit_vlm.reports.run_record import Points

WIDTH, HEIGHT = 480, 250  # of the drawing; the page scales it
LEFT, RIGHT, TOP, BOTTOM = 44, 14, 12, 30
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
    x = AxisScale(0, 1 + max(step for step, _ in points), LEFT, WIDTH - RIGHT)
    y = AxisScale(bottom, top if top > bottom else bottom + 1, HEIGHT - BOTTOM, TOP, log)
    body = _draw_axes(x, y) + "".join(_draw_line(line, x, y) for line in lines)
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label, quote=True)}">{body}</svg>'


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
    parts = []
    for value in compute_log_ticks(y.low, y.high) if y.log else compute_ticks(y.low, y.high):
        position = y(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{position}" y2="{position}"/>')
        parts.append(f'<text class="tick end" x="{LEFT - 6}" y="{position + 4}">{value:g}</text>')
    floor = HEIGHT - BOTTOM
    for value in compute_ticks(x.low, x.high):
        if x(value) < WIDTH - RIGHT - 90:  # the corner is reserved for the last step
            parts.append(f'<text class="tick middle" x="{x(value)}" y="{floor + 17}">{_format_thousands(value)}</text>')
    corner = f'x="{WIDTH - RIGHT}" y="{floor + 17}"'
    parts.append(f'<text class="tick end" {corner}>{_format_thousands(x.high)} steps</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{floor}" y2="{floor}"/>')
    return "".join(parts)


def _draw_line(line: ChartLine, x: Callable[[float], float], y: Callable[[float], float]) -> str:
    positions = [(x(step + 1), y(value)) for step, value in line.points]  # loggers count steps from 0
    path = " ".join(f"{left},{top}" for left, top in positions)
    svg = f'<polyline class="{line.style}" points="{path}"/>' if len(positions) > 1 else ""
    if line.dots or len(positions) == 1:
        for (left, top), (step, value) in zip(positions, line.points, strict=True):
            title = f"<title>{escape(line.name)}, step {step + 1}: {value:.4g}</title>"
            svg += f'<circle class="{line.style}" cx="{left}" cy="{top}" r="4">{title}</circle>'
    return svg


def _format_thousands(value: float) -> str:
    return f"{value / 1000:.4g}k" if value >= 10_000 else f"{value:g}"
