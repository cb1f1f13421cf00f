"""Profile page as HTML."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lit_vlm.formatting import format_count, format_milliseconds, format_percent
from lit_vlm.reports.profile.summary import MatrixProduct, PhaseTime, ProfileFacts
from lit_vlm.reports.profile.trace import DATA, REST
from lit_vlm.reports.templates import PageTemplate, write_page

MAX_PRODUCTS, MAX_OTHERS = 10, 10
NUM_COLOURS = 11  # number of colours in the style sheet
MIN_BAR_SHARE = 0.002  # of a step; smaller times get no piece of the bar


def write_profile_page(path: Path, facts: ProfileFacts) -> None:
    """Write the profile page."""
    write_page(path, render_profile_page(facts))


def render_profile_page(facts: ProfileFacts) -> str:
    """Render the profile page as HTML."""
    shown = facts.products[:MAX_PRODUCTS]
    return _PAGE.render(
        facts=facts,
        findings=collect_profile_findings(facts),
        pieces=_make_bar_pieces(facts),
        rows=[{"name": format_title(row.phase, row.part), "of": row} for row in facts.rows],
        products=[
            {"of": one, "where": format_title(*one.costliest_place), "wrong": one in facts.float32_products}
            for one in shown
        ],
        shown_time=sum(one.milliseconds for one in shown),
        others=facts.others[:MAX_OTHERS],
    )


def collect_profile_findings(facts: ProfileFacts) -> list[tuple[str, str, str]]:
    """Collect findings as (level, text, remedy): float32 products, waiting for data, an idle GPU."""
    found = []
    if float32_products := facts.float32_products:
        time, calls = sum(one.milliseconds for one in float32_products), sum(one.calls for one in float32_products)
        first = float32_products[0]
        found.append(
            (
                "warning",
                f"{format_count(round(calls), 'float32 product')} a step in a {facts.precision} run, "
                f"{format_percent(time / facts.milliseconds)} of its time; "
                f"the costliest is {first.shape_text} in {format_title(*first.costliest_place)}.",
                "Something keeps its inputs or weights in float32 there.",
            )
        )
    if facts.data > 0.1 * facts.milliseconds:
        share = format_percent(facts.data / facts.milliseconds)
        found.append(("warning", f"{share} of the time is spent waiting for data.", "Raise data.num_workers."))
    if facts.on_gpu and facts.idle > 0.1 * facts.milliseconds:
        share = format_percent(facts.idle / facts.milliseconds)
        remedy = (
            "The host launches work too slowly: larger micro-batches (data.tokens_per_micro_batch) give it more to do."
        )
        found.append(("advice", f"The GPU does nothing {share} of the time, beside waiting for data.", remedy))
    return found


def format_title(phase: str, part: str) -> str:
    """Format phase and part of the model as one name."""
    if not part:
        return phase
    return f"{phase}: {'what is in no part' if part == REST else part}"


def _make_bar_pieces(facts: ProfileFacts) -> list[dict[str, Any]]:
    """Make the pieces of the bar: busy time of each row, with waiting for data, and all idle time at the end."""

    def get_size(row: PhaseTime) -> float:
        return row.busy + (row.idle if row.phase == DATA else 0.0)

    pieces = [(format_title(row.phase, row.part), get_size(row)) for row in facts.rows]
    pieces = [(name, time) for name, time in pieces if time > MIN_BAR_SHARE * facts.milliseconds]
    coloured = [
        {"name": name, "time": time, "style": f"c{number % NUM_COLOURS}"} for number, (name, time) in enumerate(pieces)
    ]
    return [*coloured, {"name": "idle", "time": facts.idle, "style": "idle"}]


def format_rate(product: MatrixProduct) -> str:
    """Format the rate of a matrix product in TFLOP/s or GFLOP/s; "" if it is unknown."""
    if product.rate is None:
        return ""
    size, unit = (1e12, "T") if product.rate >= 1e12 else (1e9, "G")
    return f"{product.rate / size:,.3g} {unit}FLOP/s"


def format_calls(number: float) -> str:
    """Format the mean number of calls in a step."""
    return f"{number:,.0f}" if abs(number - round(number)) < 0.05 else f"{number:,.1f}"


_PAGE = PageTemplate(
    "profile/page.html",
    "profile/page.css",
    percent=format_percent,
    ms=format_milliseconds,
    rate=format_rate,
    calls=format_calls,
)
