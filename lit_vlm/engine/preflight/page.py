"""Preflight page as HTML, and the texts that it shares with the terminal output."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from markupsafe import Markup

from lit_vlm.engine.pages import Page, write_page
from lit_vlm.engine.preflight.charts import histogram_svg, legend
from lit_vlm.engine.preflight.facts import Facts, Level, MemoryFacts, SourceRow, StrategyFacts
from lit_vlm.engine.report_data import short
from lit_vlm.engine.run_folder import to_plain
from lit_vlm.files import write_json
from lit_vlm.types import counted


def write_preflight(folder: Path, facts: Facts) -> Path:
    """Write `preflight.html` and `preflight.json`. Returns the path of the page."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "preflight.json", to_plain(facts.as_dict()), indent=1)
    page = folder / "preflight.html"
    write_page(page, render(facts))
    return page


def render(facts: Facts) -> str:
    """Render the page as HTML."""
    return _PAGE.render(
        facts=facts,
        verdict=verdict_of(facts),
        lead=lead_of(facts),
        levels=[(level, facts.of_level(level)) for level in Level],
        sources=[_source(row) for row in facts.sources],
        totals=_totals(facts.sources),
        groups=_groups(facts),
        charts=[
            {"of": histogram, "svg": Markup(histogram_svg(histogram)), "legend": legend(histogram)}
            for histogram in facts.histograms
        ],
        memory=_memory(facts.memory) if facts.memory else None,
        sent=sent_of(facts.strategy) if facts.strategy and facts.strategy.communication else None,
    )


def verdict_of(facts: Facts) -> str:
    """Format the verdict: would run or would fail, with the number of findings."""
    failures = len(facts.of_level(Level.failure))
    if failures:
        return f"would fail: {counted(failures, 'problem')}"
    warnings = len(facts.of_level(Level.warning))
    return "would run" + (f", with {counted(warnings, 'warning')}" if warnings else "")


def lead_of(facts: Facts) -> str:
    """Format a summary of the run in one line."""
    parts = []
    if facts.plan:
        plan = facts.plan
        batch = counted(round(plan.samples_per_step), "sample")
        parts.append(f"{counted(plan.steps, 'step')} of {batch} on {counted(plan.world_size, 'device')}")
        parts.append(f"{short(plan.tokens)} tokens")
    if facts.time:
        parts.append(f"about {hours(facts.time.seconds)} on {facts.time.device}")
    if facts.memory:
        chosen = next((row for row in facts.memory.rows if row.chosen), None)
        if chosen:
            parts.append(f"{gigabytes(chosen.total)} of {gigabytes(facts.memory.capacity)} memory")
    return ", ".join(parts)


def said_of(strategy: StrategyFacts) -> list[str]:
    """Describe the strategy, the reason for it, and its communication. Returns lines."""
    if strategy.asked:
        lines = [f"strategy: {strategy.name}, as trainer.strategy says"]
        if strategy.advised != strategy.name:
            lines.append(f"  auto would take {strategy.advised}: {strategy.reason}")
    else:
        lines = [f"strategy: {strategy.name}: {strategy.reason}"]
    lines += [f"  {sent_of(strategy)}"] if strategy.communication else []
    asked = "as stage.activation_checkpointing says; " if strategy.level_asked else ""
    return [*lines, f"activation checkpointing: {strategy.level}: {asked}{strategy.level_reason}"]


def sent_of(strategy: StrategyFacts) -> str:
    """Describe the simulated communication of one step."""
    outside = f", {gigabytes(strategy.outside)} into each node" if strategy.outside else ""
    waits = f"{strategy.communication:.2g} s of sending beside {strategy.step - strategy.exposed:.2g} s of computing"
    return (
        f"a step brings {gigabytes(strategy.inside)} to each device from its node{outside} ({strategy.network}): {waits}, "
        f"{percent(1 - strategy.share)} of the time is waiting"
    )


def gigabytes(number: float) -> str:
    """Format a number of bytes with decimal units (1 GB = 10^9 bytes), as in data sheets."""
    for size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(number) >= size:
            value = number / size
            return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.1f} {unit}"
    return f"{number:.0f} B"


def hours(seconds: float) -> str:
    """Format an estimated time in one unit: days, hours, minutes or seconds."""
    if seconds >= 48 * 3600:
        return f"{seconds / 86400:.1f} days"
    if seconds >= 3600:
        return f"{seconds / 3600:.1f} hours"
    return f"{seconds / 60:.0f} minutes" if seconds >= 90 else f"{seconds:.0f} seconds" if seconds >= 1 else "a second"


def count(number: float, estimated: bool = False) -> str:
    """Format a count with thousands separators; an estimate is rounded and marked with ~."""
    if not estimated:
        return f"{number:,.0f}"
    digits = max(0, len(str(int(number))) - 3)
    return f"~{round(number, -digits):,.0f}"


def percent(share: float | None) -> str:
    """Format a share, 0 to 1, as a percentage; "" for None."""
    if share is None:
        return ""
    if 0 < share < 0.0005:
        return "<0.1 %"
    return ">99.9 %" if 0.9995 <= share < 1 else f"{100 * share:.1f} %"


def _source(row: SourceRow) -> dict[str, Any]:
    scaled = {
        name: count(getattr(row, name) * row.scale, row.estimated)
        for name in ("usable", "tokens", "supervised", "tiles", "images")
    }
    return {"row": row, "set_aside": sorted(row.quarantined.items(), key=lambda item: -item[1])} | scaled


def _totals(rows: list[SourceRow]) -> dict[str, str]:
    estimated = any(row.estimated for row in rows)
    totals = {"records": f"{sum(row.records for row in rows):,}"}
    for name in ("usable", "tokens", "supervised", "tiles"):
        totals[name] = count(sum(getattr(row, name) * row.scale for row in rows), estimated)
    return totals | {"looked_at": f"{sum(row.looked_at for row in rows):,}"}


def _groups(facts: Facts) -> list[tuple[str, list[Any]]]:
    titles = {"language": "Language", "images": "Images", "kind": "Kind"}
    return [(title, [row for row in facts.shares if row.group == group]) for group, title in titles.items()]


def _memory(memory: MemoryFacts) -> dict[str, Any]:
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


_PAGE = Page(
    "preflight/page.html",
    "preflight/page.css",
    short=short,
    percent=percent,
    gigabytes=gigabytes,
    hours=hours,
    count=count,
)
