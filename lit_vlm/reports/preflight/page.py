"""Preflight page: its texts, and the values of its template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from markupsafe import Markup

from lit_vlm.files import write_json
from lit_vlm.formatting import (
    format_bytes,
    format_count,
    format_estimated_time,
    format_number,
    format_percent,
    format_short,
)
from lit_vlm.reports.charts import HISTOGRAM_STYLES, draw_histogram
from lit_vlm.reports.preflight.facts import Histogram, MemoryFacts, PreflightFacts, Severity, SourceRow, StrategyFacts
from lit_vlm.reports.templates import PageTemplate, write_page
from lit_vlm.runs.run_folder import to_plain


def make_legend(histogram: Histogram) -> list[tuple[str, str]]:
    """Make the legend: (style, name) of each series; empty if there is only one."""
    return list(zip(HISTOGRAM_STYLES, histogram.series, strict=False)) if len(histogram.series) > 1 else []


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
    count=format_number,
)
