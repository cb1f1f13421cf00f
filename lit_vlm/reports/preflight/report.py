"""Report of preflight: as a page, and for the terminal the verdict and the tables of the page in 100 columns."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from markupsafe import Markup
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lit_vlm.files import write_json
from lit_vlm.formatting import (
    format_bytes,
    format_count,
    format_estimated_time,
    format_number,
    format_percent,
    format_short,
    format_speed,
)
from lit_vlm.messages import tell, tell_count, translate
from lit_vlm.reports.charts import HISTOGRAM_STYLES, draw_histogram
from lit_vlm.reports.preflight.facts import (
    ContaminationFacts,
    Histogram,
    MemoryFacts,
    PreflightFacts,
    Severity,
    SourceRow,
    StrategyFacts,
)
from lit_vlm.reports.templates import PageTemplate, escape_text, write_page
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
        return tell("would fail: {problems}", problems=tell_count(failures, "problem"))
    warnings = len(facts.get_findings(Severity.warning))
    if not warnings:
        return tell("would run")
    return tell("would run, with {warnings}", warnings=tell_count(warnings, "warning"))


def format_run_summary(facts: PreflightFacts) -> str:
    """Format a summary of the run in one line."""
    parts = []
    if facts.plan:
        plan = facts.plan
        counts = {
            "steps": tell_count(plan.steps, "step"),
            "samples": tell_count(round(plan.samples_per_step), "sample"),
            "devices": tell_count(plan.world_size, "device"),
        }
        parts.append(tell("{steps} of {samples} on {devices}", **counts))
        parts.append(tell("{count} tokens", count=format_short(plan.tokens)))
    if facts.time:
        time = tell_time(facts.time.seconds)
        parts.append(tell("about {time} on {device}", time=time, device=translate(facts.time.device)))
    if facts.memory:
        chosen = next((row for row in facts.memory.rows if row.chosen), None)
        if chosen:
            needed, capacity = format_bytes(chosen.total), format_bytes(facts.memory.capacity)
            parts.append(tell("{needed} of {capacity} memory", needed=needed, capacity=capacity))
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
    outside = tell(", {bytes} into each node", bytes=format_bytes(strategy.outside)) if strategy.outside else ""
    return tell(
        "a step brings {bytes} to each device from its node{outside} ({network}): "
        "{sending} s of sending beside {computing} s of computing, {share} of the time is waiting",
        bytes=format_bytes(strategy.inside),
        outside=outside,
        network=translate(strategy.network),
        sending=f"{strategy.communication:.2g}",
        computing=f"{strategy.step - strategy.exposed:.2g}",
        share=format_percent(1 - strategy.share),
    )


def tell_time(seconds: float) -> str:
    """Format an estimated time, as `format_estimated_time`, in the language of this process."""
    return translate(format_estimated_time(seconds))


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
    hours=tell_time,
    speed=format_speed,
    count=format_number,
)


TERMINAL_STYLES = {Severity.failure: "bold red", Severity.warning: "yellow", Severity.advice: "cyan"}
MAX_SOURCES = 16  # of a long list, those with the largest shares; the page has all
MAX_FAULTS = 2  # of a source


def print_preflight(facts: PreflightFacts, page_path: Path, console: Console) -> None:
    """Print the report. The verdict comes last: on a terminal the end is what one sees."""
    console.rule(f"preflight: {facts.name}", align="left", style="dim")
    if facts.sources:
        console.print(_make_source_table(facts))
        if any(len(row.quarantined) > MAX_FAULTS for row in facts.sources):
            _print_lines(console, f"set aside: all faults of each source, with examples: {page_path}")
        _print_lines(console, _format_shares(facts))
    _print_lines(console, *_format_plan(facts))
    if facts.parts:
        console.print(_make_part_table(facts))
    _print_lines(console, *_format_machine(facts))
    if facts.contamination:
        _print_lines(console, *_format_contamination(facts.contamination))
    for level in Severity:
        for finding in facts.get_findings(level):
            line = Text(f"{translate(level)}: ", style=TERMINAL_STYLES[level])
            line.append(_format_plain(translate(finding.what)), style="default")
            remedy = f" {_format_plain(translate(finding.remedy))}" if finding.remedy else ""
            console.print(line.append(remedy, style="dim"))
    console.print(Text(format_verdict(facts), style="bold green" if facts.would_run else "bold red"))
    _print_lines(console, format_run_summary(facts), f"page: {page_path}")


def _format_contamination(found: ContaminationFacts) -> Iterator[str]:
    for row in found.benchmarks:
        counts = ", ".join(f"{count:,} {certainty}" for certainty, count in row.records.items() if count)
        yield f"{row.name}: compared, {format_count(row.rows, 'row')}, records found: {counts or 'none'}"
    for name, reason in found.unchecked.items():
        yield f"{name}: not checked: {reason}"


def _print_lines(console: Console, *lines: str) -> None:
    for line in lines:
        console.print(Text(_format_plain(line)), soft_wrap=True)


def _format_plain(text: str) -> str:
    return escape_text(text)


def _make_source_table(facts: PreflightFacts) -> Table:
    table = Table(title_justify="left", box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    table.add_column("source", overflow="fold", min_width=16, max_width=26)
    for heading in ("records", "usable", "set aside", "tokens", "tiles", "target", "actual", "passes"):
        table.add_column(heading, justify="right", no_wrap=True)
    rows = (
        sorted(facts.sources, key=lambda row: -row.share_samples) if len(facts.sources) > MAX_SOURCES else facts.sources
    )
    for row in rows[:MAX_SOURCES]:
        table.add_row(*_format_cells(row))
    if len(rows) > MAX_SOURCES:
        table.add_row(f"and {len(rows) - MAX_SOURCES} more", *[""] * 8, style="dim")
    return table


def _format_cells(row: SourceRow) -> list[str]:
    records = f"{row.records:,}" + (f"\nof {row.expected:,}" if row.expected not in (None, row.records) else "")
    more = [f"and {len(row.quarantined) - MAX_FAULTS} more"] if len(row.quarantined) > MAX_FAULTS else []
    aside = "\n".join([f"{row.set_aside:,}", *list(row.quarantined)[:MAX_FAULTS], *more])
    asked = f"{format_percent(row.asked)}{' tok' if row.asked_in == 'tokens' else ''}"
    scaled = [format_number(getattr(row, name) * row.scale, row.estimated) for name in ("usable", "tokens", "tiles")]
    return [
        row.name,
        records,
        scaled[0],
        aside,
        *scaled[1:],
        asked,
        format_percent(row.share_samples),
        f"{row.passes:.2f}",
    ]


def _format_shares(facts: PreflightFacts) -> str:
    groups: dict[str, list[str]] = {}
    for row in facts.shares:
        asked = f" (target {format_percent(row.asked)})" if row.asked is not None else ""
        groups.setdefault(row.group, []).append(f"{row.name.replace('_', ' ')} {format_percent(row.samples)}{asked}")
    return "; ".join(", ".join(parts[:5]) + (", ..." if len(parts) > 5 else "") for parts in groups.values())


def _format_plan(facts: PreflightFacts) -> list[str]:
    plan = facts.plan
    if plan is None:
        return []
    ways = ", ".join(f"{name} {format_percent(share)}" for name, share in plan.padding.items())
    return [
        "",
        f"plan: {format_count(plan.steps, 'step')} of {format_count(round(plan.samples_per_step), 'sample')}, k = {plan.k} on "
        f"{format_count(plan.world_size, 'rank')}; {format_short(plan.tokens)} tokens, "
        f"{format_short(plan.supervised)} of them supervised, {format_short(plan.tiles)} tiles",
        f"micro-batches: {plan.pack_tokens.mean:,.0f} tokens on average, at most {plan.pack_tokens.most:,.0f} of {plan.most_tokens:,}; "
        f"{plan.pack_tiles.mean:,.0f} tiles, at most {plan.pack_tiles.most:,.0f} of {plan.most_tiles:,}",
        f"balance: ranks {format_percent(plan.balance_ranks)}, packs side by side {format_percent(plan.balance_micro)}",
        f"padding in batches of {plan.padding_batch}: {ways}",
        "",
    ]


def _make_part_table(facts: PreflightFacts) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for heading in ("part", "parameters", "trainable", "learning rate", "how"):
        table.add_column(heading, justify="left" if heading in ("part", "how") else "right")
    for row in facts.parts:
        rate = f"{row.learning_rate:.2g}" if row.learning_rate else "-"
        table.add_row(row.part, f"{row.parameters:,}", f"{row.trainable:,}", rate, row.how)
    return table


def _format_machine(facts: PreflightFacts) -> list[str]:
    lines = ["", *(describe_strategy(facts.strategy) if facts.strategy else [])]
    if facts.memory:
        memory = facts.memory
        lines.append(f"memory of one device, an upper estimate ({memory.device}: {format_bytes(memory.capacity)})")
        width = max(len(row.name) for row in memory.rows)
        for row in memory.rows:
            notes = ["this run"] if row.chosen else []
            notes += [row.note] if row.note else []
            lines.append(f"  {row.name:<{width}}  {format_bytes(row.total):>8}  {', '.join(notes)}".rstrip())
    if facts.time:
        time = facts.time
        lines.append(
            f"time: about {format_estimated_time(time.seconds)}, {time.device_hours:,.1f} device-hours, on {time.devices:,} x {time.device} "
            f"if it reaches {time.utilisation:.0%} of {format_speed(time.peak)}"
        )
    if facts.disk:
        lines.append("disk: " + ", ".join(f"{format_bytes(row.bytes)} for {row.what}" for row in facts.disk))
    if facts.estimated:
        seen, records = (sum(getattr(row, name) for row in facts.sources) for name in ("looked_at", "records"))
        lines.append(f"looked at {seen:,} of {records:,} records; numbers with ~ are scaled up from them")
    return [*lines, ""]
