"""Line charts as SVG, written by hand: the page's style sheet sets the colours, so they follow its light and dark mode."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import accumulate

from lit_vlm.engine.report_data import Points

WIDTH, HEIGHT = 480, 250  # of the drawing; the page scales it
LEFT, RIGHT, TOP, BOTTOM = 44, 14, 12, 30
MOST_POINTS = 400  # of one line; more points are averaged in groups
LOG_SPAN = 12  # from this ratio of largest to smallest value on, the scale is logarithmic


@dataclass(frozen=True, slots=True)
class Line:
    """One series of a chart. `style` is a class of the style sheet; `dots` marks each point, if there are few."""

    name: str
    points: Points
    style: str
    dots: bool = False


@dataclass(frozen=True, slots=True)
class Scale:
    """Mapping from values to pixels, linear or logarithmic."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = self._warped(self.low), self._warped(self.high)
        share = (self._warped(min(max(value, self.low), self.high)) - low) / ((high - low) or 1.0)
        return round(self.start + share * (self.end - self.start), 1)

    def _warped(self, value: float) -> float:
        return math.log10(value) if self.log else value


def line_chart(
    lines: Sequence[Line], *, label: str, low: float | None = None, high: float | None = None, may_log: bool = False
) -> str:
    """Draw a line chart as an <svg>; "" if there are no points.

    Args:
        label: description for screen readers.
        low, high: ends of the scale; None: those of the values.
        allow_log: use a logarithmic scale if the ratio of the values exceeds `MIN_LOG_RATIO`.
    """
    lines = [Line(line.name, thinned(line.points), line.style, line.dots) for line in lines]
    points = [point for line in lines for point in line.points]
    if not points:
        return ""
    values = [value for _, value in points]
    bottom, top = min(values) if low is None else low, max(values) if high is None else high
    log = may_log and bottom > 0 and top / bottom > LOG_SPAN
    if not log and low is None:
        bottom = max(0.0, bottom - 0.05 * (top - bottom)) if bottom >= 0 else bottom
    x = Scale(0, 1 + max(step for step, _ in points), LEFT, WIDTH - RIGHT)
    y = Scale(bottom, top if top > bottom else bottom + 1, HEIGHT - BOTTOM, TOP, log)
    body = _axes(x, y) + "".join(_drawn(line, x, y) for line in lines)
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label, quote=True)}">{body}</svg>'


def smoothed(points: Points, share: float = 0.04) -> Points:
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


def thinned(points: Points, most: int = MOST_POINTS) -> Points:
    """Reduce the finite points to at most `max_points`, by means of neighbours."""
    points = [(step, value) for step, value in points if math.isfinite(value)]
    if len(points) <= most:
        return points
    size = math.ceil(len(points) / most)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Compute round tick values between the ends, about `max_ticks` at most."""
    if high <= low:
        return [low]
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(size * power for size in (1, 2, 5, 10) if size * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(number * step, 12) for number in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Compute tick values 1, 2 and 5 times the powers of ten; the powers alone if these are too many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [size * 10.0**power for power in powers for size in (1, 2, 5) if low <= size * 10.0**power <= high]
    return found if len(found) <= 7 else [value for value in found if math.log10(value).is_integer()]


def _axes(x: Scale, y: Scale) -> str:
    parts = []
    for value in log_ticks(y.low, y.high) if y.log else ticks(y.low, y.high):
        position = y(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{position}" y2="{position}"/>')
        parts.append(f'<text class="tick end" x="{LEFT - 6}" y="{position + 4}">{value:g}</text>')
    floor = HEIGHT - BOTTOM
    for value in ticks(x.low, x.high):
        if x(value) < WIDTH - RIGHT - 90:  # the corner is reserved for the last step
            parts.append(f'<text class="tick middle" x="{x(value)}" y="{floor + 17}">{_thousands(value)}</text>')
    corner = f'x="{WIDTH - RIGHT}" y="{floor + 17}"'
    parts.append(f'<text class="tick end" {corner}>{_thousands(x.high)} steps</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{floor}" y2="{floor}"/>')
    return "".join(parts)


def _drawn(line: Line, x: Callable[[float], float], y: Callable[[float], float]) -> str:
    positions = [(x(step + 1), y(value)) for step, value in line.points]  # loggers count steps from 0
    path = " ".join(f"{left},{top}" for left, top in positions)
    svg = f'<polyline class="{line.style}" points="{path}"/>' if len(positions) > 1 else ""
    if line.dots or len(positions) == 1:
        for (left, top), (step, value) in zip(positions, line.points, strict=True):
            title = f"<title>{escape(line.name)}, step {step + 1}: {value:.4g}</title>"
            svg += f'<circle class="{line.style}" cx="{left}" cy="{top}" r="4">{title}</circle>'
    return svg


def _thousands(value: float) -> str:
    return f"{value / 1000:.4g}k" if value >= 10_000 else f"{value:g}"
