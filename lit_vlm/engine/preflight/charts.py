"""Histograms as SVG, written by hand like the report's curves: the page's style sheet sets the colours."""

from __future__ import annotations

import math
from collections.abc import Callable
from html import escape
from typing import Any

from lit_vlm.engine.preflight.facts import Histogram
from lit_vlm.engine.report_charts import AxisScale, compute_log_ticks, compute_ticks
from lit_vlm.types import format_count

WIDTH, HEIGHT = 480, 190  # of the drawing; the page scales it
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 26, 40
STYLES = ("main", "second", "third")  # classes of the style sheet, one for each series


def draw_histogram(histogram: Histogram) -> str:
    """Draw a histogram as an <svg>: stacked bars, a mark at the median and one at the micro-batch limit."""
    edges, cap = histogram.edges, histogram.cap
    high = max(edges[-1], cap or 0)
    low = max(edges[0], 1e-9) if histogram.log else edges[0]
    x = AxisScale(low, high, LEFT, WIDTH - RIGHT, histogram.log)
    totals = [sum(counts) for counts in zip(*histogram.series.values(), strict=True)]
    y = AxisScale(0, max(max(totals, default=0), 1), HEIGHT - BOTTOM, TOP)
    body = _draw_axes(x, y, histogram.unit) + _draw_bars(histogram, x, y)
    body += _draw_mark(x(histogram.spread.median), "median", "median")
    if cap is not None:
        body += _draw_mark(x(cap), "cap", "cap", end=True)
    label = f"{histogram.title}: median {histogram.spread.median:g}, at most {histogram.spread.most:g}"
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label, quote=True)}">{body}</svg>'


def make_legend(histogram: Histogram) -> list[tuple[str, str]]:
    """Make the legend: (style, name) of each series; empty if there is only one."""
    return list(zip(STYLES, histogram.series, strict=False)) if len(histogram.series) > 1 else []


def _draw_bars(histogram: Histogram, x: Callable[[float], float], y: Callable[[float], float]) -> str:
    parts = []
    base = [0] * (len(histogram.edges) - 1)
    for style, (name, counts) in zip(STYLES, histogram.series.items(), strict=False):
        for number, count in enumerate(counts):
            if not count:
                continue
            left, right = x(histogram.edges[number]), x(histogram.edges[number + 1])
            upper, lower = y(base[number] + count), y(base[number])
            span = _format_bin(histogram, number)
            title = f"<title>{escape(name)}, {span}: {format_count(count, 'sample')}</title>"
            width = max(right - left - 0.8, 0.6)
            parts.append(
                f'<rect class="{style}" x="{left + 0.4:.1f}" y="{upper}" width="{width:.1f}" height="{max(lower - upper, 0.5):.1f}">{title}</rect>'
            )
            base[number] += count
    return "".join(parts)


def _format_bin(histogram: Histogram, bin_index: int) -> str:
    low, high = histogram.edges[bin_index], histogram.edges[bin_index + 1]
    first, last = math.ceil(low), math.ceil(high) - 1
    return f"{first:,} {histogram.unit}" if first == last else f"{first:,} to {last:,} {histogram.unit}"


def _draw_mark(position: float, style: str, text: str, *, end: bool = False) -> str:
    line = f'<line class="mark {style}" x1="{position}" x2="{position}" y1="{TOP - 8}" y2="{HEIGHT - BOTTOM}"/>'
    right = end or position > WIDTH - 90
    anchor, side = (" end", position + 4) if right else ("", position - 4)
    return line + f'<text class="tick{anchor}" x="{side}" y="{TOP - 12}">{text}</text>'


def _draw_axes(x: AxisScale, y: AxisScale, unit: str) -> str:
    parts, floor = [], HEIGHT - BOTTOM
    for value in compute_ticks(0, y.high, 3):
        if value == int(value):
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value)}" y2="{y(value)}"/>')
            parts.append(f'<text class="tick end" x="{LEFT - 6}" y="{y(value) + 4}">{_format_tick(value)}</text>')
    for value in compute_log_ticks(x.low, x.high) if x.log else compute_ticks(x.low, x.high, 6):
        if value == int(value) and LEFT - 1 <= x(value) <= WIDTH - RIGHT - 4:
            parts.append(f'<text class="tick middle" x="{x(value)}" y="{floor + 16}">{_format_tick(value)}</text>')
    parts.append(f'<text class="tick end" x="{WIDTH - RIGHT}" y="{floor + 34}">{unit}{", log" if x.log else ""}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{floor}" y2="{floor}"/>')
    return "".join(parts)


def _format_tick(value: Any) -> str:
    if value >= 1e6:
        return f"{value / 1e6:g}M"
    return f"{value / 1e3:g}k" if value >= 10_000 else f"{value:,g}"
