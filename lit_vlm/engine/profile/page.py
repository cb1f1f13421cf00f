"""Profile page as HTML."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lit_vlm.engine.pages import Page, write_page
from lit_vlm.engine.preflight.page import percent
from lit_vlm.engine.profile.facts import ProfileFacts, Row
from lit_vlm.engine.profile.products import Product
from lit_vlm.engine.profile.rooms import DATA, REST
from lit_vlm.types import counted

MOST_PRODUCTS, MOST_OTHERS = 10, 10
COLOURS = 11  # number of colours in the style sheet
NARROW = 0.002  # of a step; smaller times get no piece of the bar


def write_profile(path: Path, facts: ProfileFacts) -> None:
    """Write the profile page."""
    write_page(path, render(facts))


def render(facts: ProfileFacts) -> str:
    """Render the profile page as HTML."""
    shown = facts.products[:MOST_PRODUCTS]
    return _PAGE.render(
        facts=facts,
        findings=findings_of(facts),
        pieces=_pieces(facts),
        rows=[{"name": title(row.phase, row.part), "of": row} for row in facts.rows],
        products=[{"of": one, "where": title(*one.place), "wrong": one in facts.wrong_types} for one in shown],
        shown_time=sum(one.milliseconds for one in shown),
        others=facts.others[:MOST_OTHERS],
    )


def findings_of(facts: ProfileFacts) -> list[tuple[str, str, str]]:
    """Collect findings as (level, text, remedy): float32 products, waiting for data, an idle GPU."""
    found = []
    if float32_products := facts.wrong_types:
        time, calls = sum(one.milliseconds for one in float32_products), sum(one.calls for one in float32_products)
        first = float32_products[0]
        found.append(
            (
                "warning",
                f"{counted(round(calls), 'float32 product')} a step in a {facts.precision} run, {percent(time / facts.milliseconds)} of its "
                f"time; the costliest is {first.written} in {title(*first.place)}.",
                "Something keeps its inputs or weights in float32 there.",
            )
        )
    if facts.data > 0.1 * facts.milliseconds:
        share = percent(facts.data / facts.milliseconds)
        found.append(("warning", f"{share} of the time is spent waiting for data.", "Raise data.num_workers."))
    if facts.on_gpu and facts.idle > 0.1 * facts.milliseconds:
        share = percent(facts.idle / facts.milliseconds)
        remedy = (
            "The host launches work too slowly: larger micro-batches (data.tokens_per_micro_batch) give it more to do."
        )
        found.append(("advice", f"The GPU does nothing {share} of the time, beside waiting for data.", remedy))
    return found


def title(phase: str, part: str) -> str:
    """Format phase and part of the model as one name."""
    if not part:
        return phase
    return f"{phase}: {'what is in no part' if part == REST else part}"


def _pieces(facts: ProfileFacts) -> list[dict[str, Any]]:
    """Make the pieces of the bar: busy time of each row, with waiting for data, and all idle time at the end."""

    def size(row: Row) -> float:
        return row.busy + (row.idle if row.phase == DATA else 0.0)

    pieces = [(title(row.phase, row.part), size(row)) for row in facts.rows]
    pieces = [(name, time) for name, time in pieces if time > NARROW * facts.milliseconds]
    coloured = [
        {"name": name, "time": time, "style": f"c{number % COLOURS}"} for number, (name, time) in enumerate(pieces)
    ]
    return [*coloured, {"name": "idle", "time": facts.idle, "style": "idle"}]


def milliseconds(time: float) -> str:
    """Format milliseconds with about three significant digits."""
    if not time:
        return "-"
    digits = 0 if time >= 100 else 1 if time >= 10 else 2 if time >= 0.095 else 3
    return f"{time:,.{digits}f}"


def rate(product: Product) -> str:
    """Format the rate of a matrix product in TFLOP/s or GFLOP/s; "" if it is unknown."""
    if product.rate is None:
        return ""
    size, unit = (1e12, "T") if product.rate >= 1e12 else (1e9, "G")
    return f"{product.rate / size:,.3g} {unit}FLOP/s"


def calls(number: float) -> str:
    """Format the mean number of calls in a step."""
    return f"{number:,.0f}" if abs(number - round(number)) < 0.05 else f"{number:,.1f}"


_PAGE = Page(
    "profile/page.html",
    "preflight/page.css",
    "profile/page.css",
    percent=percent,
    ms=milliseconds,
    rate=rate,
    calls=calls,
)
