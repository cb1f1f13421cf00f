"""Histograms as SVG, written by hand like the report's curves: the page's style sheet sets the colours."""

from __future__ import annotations

import math
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

from markupsafe import Markup

from lit_vlm.files import write_json
from lit_vlm.reports.charts import AxisScale, compute_log_ticks, compute_ticks
from lit_vlm.reports.preflight.facts import Histogram, MemoryFacts, PreflightFacts, Severity, SourceRow, StrategyFacts
from lit_vlm.reports.run_record import format_short
from lit_vlm.reports.templates import PageTemplate, write_page
from lit_vlm.runs.run_folder import to_plain
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


def write_preflight_page(folder: Path, facts: PreflightFacts) -> Path:
    """Write `preflight.html` and `preflight.json`. Returns the path of the page."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "preflight.json", to_plain(facts.to_dict()), indent=1)
    page = folder / "preflight.html"
    write_page(page, render_preflight_page(facts))
    return page


def render_preflight_page(facts: PreflightFacts) -> str:
    """Render the page as HTML."""
    return _PAGE.render(
        facts=facts,
        verdict=format_verdict(facts),
        lead=format_run_summary(facts),
        levels=[(level, facts.get_findings(level)) for level in Severity],
        sources=[_prepare_source(row) for row in facts.sources],
        totals=_sum_sources(facts.sources),
        groups=_group_shares(facts),
        charts=[
            {"of": histogram, "svg": Markup(draw_histogram(histogram)), "legend": make_legend(histogram)}
            for histogram in facts.histograms
        ],
        memory=_prepare_memory(facts.memory) if facts.memory else None,
        sent=describe_communication(facts.strategy) if facts.strategy and facts.strategy.communication else None,
    )


def format_verdict(facts: PreflightFacts) -> str:
    """Format the verdict: would run or would fail, with the number of findings."""
    failures = len(facts.get_findings(Severity.failure))
    if failures:
        return f"would fail: {format_count(failures, 'problem')}"
    warnings = len(facts.get_findings(Severity.warning))
    return "would run" + (f", with {format_count(warnings, 'warning')}" if warnings else "")


def format_run_summary(facts: PreflightFacts) -> str:
    """Format a summary of the run in one line."""
    parts = []
    if facts.plan:
        plan = facts.plan
        batch = format_count(round(plan.samples_per_step), "sample")
        parts.append(f"{format_count(plan.steps, 'step')} of {batch} on {format_count(plan.world_size, 'device')}")
        parts.append(f"{format_short(plan.tokens)} tokens")
    if facts.time:
        parts.append(f"about {format_estimated_time(facts.time.seconds)} on {facts.time.device}")
    if facts.memory:
        chosen = next((row for row in facts.memory.rows if row.chosen), None)
        if chosen:
            parts.append(f"{format_bytes(chosen.total)} of {format_bytes(facts.memory.capacity)} memory")
    return ", ".join(parts)


def describe_strategy(strategy: StrategyFacts) -> list[str]:
    """Describe the strategy, the reason for it, and its communication. Returns lines."""
    if strategy.asked:
        lines = [f"strategy: {strategy.name}, as trainer.strategy says"]
        if strategy.advised != strategy.name:
            lines.append(f"  auto would take {strategy.advised}: {strategy.reason}")
    else:
        lines = [f"strategy: {strategy.name}: {strategy.reason}"]
    lines += [f"  {describe_communication(strategy)}"] if strategy.communication else []
    asked = "as stage.activation_checkpointing says; " if strategy.level_asked else ""
    return [*lines, f"activation checkpointing: {strategy.level}: {asked}{strategy.level_reason}"]


def describe_communication(strategy: StrategyFacts) -> str:
    """Describe the simulated communication of one step."""
    outside = f", {format_bytes(strategy.outside)} into each node" if strategy.outside else ""
    waits = f"{strategy.communication:.2g} s of sending beside {strategy.step - strategy.exposed:.2g} s of computing"
    return (
        f"a step brings {format_bytes(strategy.inside)} to each device from its node{outside} ({strategy.network}): {waits}, "
        f"{format_percent(1 - strategy.share)} of the time is waiting"
    )


def format_bytes(number: float) -> str:
    """Format a number of bytes with decimal units (1 GB = 10^9 bytes), as in data sheets."""
    for size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(number) >= size:
            value = number / size
            return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.1f} {unit}"
    return f"{number:.0f} B"


def format_speed(flops_per_second: float) -> str:
    """Format a speed in TFLOP/s, or in GFLOP/s below one TFLOP/s."""
    teraflops = flops_per_second / 1e12
    return f"{teraflops:.0f} TFLOP/s" if teraflops >= 1 else f"{1000 * teraflops:.0f} GFLOP/s"


def format_estimated_time(seconds: float) -> str:
    """Format an estimated time in one unit: days, hours, minutes or seconds."""
    if seconds >= 48 * 3600:
        return f"{seconds / 86400:.1f} days"
    if seconds >= 3600:
        return f"{seconds / 3600:.1f} hours"
    return f"{seconds / 60:.0f} minutes" if seconds >= 90 else f"{seconds:.0f} seconds" if seconds >= 1 else "a second"


def format_number(number: float, estimated: bool = False) -> str:
    """Format a count with thousands separators; an estimate is rounded and marked with ~."""
    if not estimated:
        return f"{number:,.0f}"
    digits = max(0, len(str(int(number))) - 3)
    return f"~{round(number, -digits):,.0f}"


def format_percent(share: float | None) -> str:
    """Format a share, 0 to 1, as a percentage; "" for None."""
    if share is None:
        return ""
    if 0 < share < 0.0005:
        return "<0.1 %"
    return ">99.9 %" if 0.9995 <= share < 1 else f"{100 * share:.1f} %"


def _prepare_source(row: SourceRow) -> dict[str, Any]:
    scaled = {
        name: format_number(getattr(row, name) * row.scale, row.estimated)
        for name in ("usable", "tokens", "supervised", "tiles", "images")
    }
    return {"row": row, "set_aside": sorted(row.quarantined.items(), key=lambda item: -item[1])} | scaled


def _sum_sources(rows: list[SourceRow]) -> dict[str, str]:
    estimated = any(row.estimated for row in rows)
    totals = {"records": f"{sum(row.records for row in rows):,}"}
    for name in ("usable", "tokens", "supervised", "tiles"):
        totals[name] = format_number(sum(getattr(row, name) * row.scale for row in rows), estimated)
    return totals | {"looked_at": f"{sum(row.looked_at for row in rows):,}"}


def _group_shares(facts: PreflightFacts) -> list[tuple[str, list[Any]]]:
    titles = {"language": "Language", "images": "Images", "kind": "Kind"}
    return [(title, [row for row in facts.shares if row.group == group]) for group, title in titles.items()]


def _prepare_memory(memory: MemoryFacts) -> dict[str, Any]:
    """Prepare the memory bars: widths in percent of the largest bar, and a colour number for each name."""
    max_bytes = max([row.total for row in memory.rows] + ([memory.capacity] if memory.compared else []))
    names = dict.fromkeys(name for row in memory.rows for name, size in row.parts.items() if size > 0.002 * max_bytes)
    colours = {name: number for number, name in enumerate(names)}
    rows = []
    for row in memory.rows:
        parts = [
            {"name": name, "colour": colours[name], "width": 100 * size / max_bytes, "bytes": size}
            for name, size in row.parts.items()
            if name in colours and size > 0
        ]
        rows.append({"row": row, "parts": parts, "fits": row.total <= memory.capacity})
    return {"of": memory, "rows": rows, "colours": colours, "capacity": 100 * memory.capacity / max_bytes}


_PAGE = PageTemplate(
    "preflight/page.html",
    "preflight/page.css",
    short=format_short,
    percent=format_percent,
    gigabytes=format_bytes,
    hours=format_estimated_time,
    speed=format_speed,
    count=format_number,
)
