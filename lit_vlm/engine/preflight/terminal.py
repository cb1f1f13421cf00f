"""Preflight report for the terminal: verdict and tables of the page, in 100 columns."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lit_vlm.engine.pages import sayable
from lit_vlm.engine.preflight.facts import Facts, Level, SourceRow
from lit_vlm.engine.preflight.page import count, gigabytes, hours, lead_of, percent, said_of, verdict_of
from lit_vlm.engine.report_data import short
from lit_vlm.types import counted

STYLES = {Level.failure: "bold red", Level.warning: "yellow", Level.advice: "cyan"}
MOST_SOURCES = 16  # of a long list, those with the largest shares; the page has all
MOST_FAULTS = 2  # of a source


def show(facts: Facts, page: Path, console: Console) -> None:
    """Print the report. The verdict comes last: on a terminal the end is what one sees."""
    console.rule(f"preflight: {facts.name}", align="left", style="dim")
    if facts.sources:
        console.print(_sources(facts))
        if any(len(row.quarantined) > MOST_FAULTS for row in facts.sources):
            _say(console, f"set aside: all faults of each source, with examples: {page}")
        _say(console, _shares(facts))
    _say(console, *_plan(facts))
    if facts.parts:
        console.print(_parts(facts))
    _say(console, *_machine(facts))
    for level in Level:
        for finding in facts.of_level(level):
            line = Text(f"{level}: ", style=STYLES[level]).append(_plain(finding.what), style="default")
            console.print(line.append(f" {_plain(finding.remedy)}" if finding.remedy else "", style="dim"))
    console.print(Text(verdict_of(facts), style="bold green" if facts.would_run else "bold red"))
    _say(console, lead_of(facts), f"page: {page}")


def _say(console: Console, *lines: str) -> None:
    for line in lines:
        console.print(Text(_plain(line)), soft_wrap=True)


def _plain(text: str) -> str:
    return sayable(text)


def _sources(facts: Facts) -> Table:
    table = Table(title_justify="left", box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    table.add_column("source", overflow="fold", min_width=16, max_width=26)
    for heading in ("records", "usable", "set aside", "tokens", "tiles", "asked", "drawn", "passes"):
        table.add_column(heading, justify="right", no_wrap=True)
    rows = (
        sorted(facts.sources, key=lambda row: -row.share_samples)
        if len(facts.sources) > MOST_SOURCES
        else facts.sources
    )
    for row in rows[:MOST_SOURCES]:
        table.add_row(*_cells(row))
    if len(rows) > MOST_SOURCES:
        table.add_row(f"and {len(rows) - MOST_SOURCES} more", *[""] * 8, style="dim")
    return table


def _cells(row: SourceRow) -> list[str]:
    records = f"{row.records:,}" + (f"\nof {row.expected:,}" if row.expected not in (None, row.records) else "")
    more = [f"and {len(row.quarantined) - MOST_FAULTS} more"] if len(row.quarantined) > MOST_FAULTS else []
    aside = "\n".join([f"{row.set_aside:,}", *list(row.quarantined)[:MOST_FAULTS], *more])
    asked = f"{percent(row.asked)}{' tok' if row.asked_in == 'tokens' else ''}"
    scaled = [count(getattr(row, name) * row.scale, row.estimated) for name in ("usable", "tokens", "tiles")]
    return [row.name, records, scaled[0], aside, *scaled[1:], asked, percent(row.share_samples), f"{row.passes:.2f}"]


def _shares(facts: Facts) -> str:
    groups: dict[str, list[str]] = {}
    for row in facts.shares:
        asked = f" (asked {percent(row.asked)})" if row.asked is not None else ""
        groups.setdefault(row.group, []).append(f"{row.name.replace('_', ' ')} {percent(row.samples)}{asked}")
    return "; ".join(", ".join(parts[:5]) + (", ..." if len(parts) > 5 else "") for parts in groups.values())


def _plan(facts: Facts) -> list[str]:
    plan = facts.plan
    if plan is None:
        return []
    ways = ", ".join(f"{name} {percent(share)}" for name, share in plan.padding.items())
    return [
        "",
        f"plan: {counted(plan.steps, 'step')} of {counted(round(plan.samples_per_step), 'sample')}, k = {plan.k} on "
        f"{counted(plan.world_size, 'rank')}; {short(plan.tokens)} tokens, {short(plan.supervised)} of them supervised, {short(plan.tiles)} tiles",
        f"micro-batches: {plan.pack_tokens.mean:,.0f} tokens on average, at most {plan.pack_tokens.most:,.0f} of {plan.most_tokens:,}; "
        f"{plan.pack_tiles.mean:,.0f} tiles, at most {plan.pack_tiles.most:,.0f} of {plan.most_tiles:,}",
        f"balance: ranks {percent(plan.balance_ranks)}, packs side by side {percent(plan.balance_micro)}",
        f"padding in batches of {plan.padding_batch}: {ways}",
        "",
    ]


def _parts(facts: Facts) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for heading in ("part", "parameters", "trainable", "learning rate", "how"):
        table.add_column(heading, justify="left" if heading in ("part", "how") else "right")
    for row in facts.parts:
        rate = f"{row.learning_rate:.2g}" if row.learning_rate else "-"
        table.add_row(row.part, f"{row.parameters:,}", f"{row.trainable:,}", rate, row.how)
    return table


def _machine(facts: Facts) -> list[str]:
    lines = ["", *(said_of(facts.strategy) if facts.strategy else [])]
    if facts.memory:
        memory = facts.memory
        caveat = "" if memory.compared else ", not compared: the trainer is on a CPU"
        lines.append(f"memory of one device, an upper estimate ({memory.device}: {gigabytes(memory.capacity)}{caveat})")
        width = max(len(row.name) for row in memory.rows)
        for row in memory.rows:
            notes = ["this run"] if row.chosen else []
            notes += [row.note] if row.note else []
            lines.append(f"  {row.name:<{width}}  {gigabytes(row.total):>8}  {', '.join(notes)}".rstrip())
    if facts.time:
        time = facts.time
        lines.append(
            f"time: about {hours(time.seconds)}, {time.device_hours:,.1f} device-hours, on {time.devices:,} x {time.device} "
            f"if it reaches {time.utilisation:.0%} of {time.peak / 1e12:.0f} TFLOP/s"
        )
    if facts.disk:
        lines.append("disk: " + ", ".join(f"{gigabytes(row.bytes)} for {row.what}" for row in facts.disk))
    if facts.estimated:
        seen, records = (sum(getattr(row, name) for row in facts.sources) for name in ("looked_at", "records"))
        lines.append(f"looked at {seen:,} of {records:,} records; numbers with ~ are scaled up from them")
    return [*lines, ""]
