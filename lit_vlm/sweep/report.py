"""Report of a sweep (sweep.html), in the style of a run's report; self-contained, without scripts.

Values and names come from files. The template escapes everything that is not `Markup`; only the charts made here are `Markup`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from lit_vlm.engine import pages
from lit_vlm.engine.report_data import duration
from lit_vlm.sweep.charts import metric_by_trial, name_of, parallel_coordinates, shown_range
from lit_vlm.sweep.file import Goal, SweepFile
from lit_vlm.sweep.importance import at_an_end, importance_of, remark
from lit_vlm.sweep.records import STATES, TrialRecord, best_of, varied


@dataclass(frozen=True, slots=True)
class Page:
    """Content of the report.

    Attributes:
        total: planned number of trials; None: not known.
        command: command line of the best trial; "" for none.
        carried: command line with the same values in another experiment; "" for none.
    """

    sweep: SweepFile
    records: Sequence[TrialRecord]
    total: int | None = None
    command: str = ""
    carried: str = ""

    @property
    def goal(self) -> Goal:
        return self.sweep.metric.goal if self.sweep.metric else Goal.minimize

    @property
    def metric(self) -> str:
        return self.sweep.metric.name if self.sweep.metric else "value"

    @property
    def best(self) -> TrialRecord | None:
        return best_of(self.records, self.goal)

    @property
    def keys(self) -> list[str]:
        """Keys of the parameters that varied; without any, those of the search space."""
        return varied(self.records) or list(self.sweep.swept)


def write_sweep_report(path: Path, page: Page) -> None:
    """Write the report atomically: a reader finds the old file or the new one."""
    pages.write_page(path, _PAGE.render(**_context(page)))


def ordered(page: Page) -> list[TrialRecord]:
    """Sort the records: finished trials first, the best on top; then stopped, failed and running ones."""
    sign = 1 if page.goal is Goal.minimize else -1

    def place(record: TrialRecord) -> tuple[int, float, int]:
        value = sign * record.value if record.value is not None else 0.0
        return STATES.index(record.state), value, record.number

    return sorted(page.records, key=place)


def counts(page: Page) -> str:
    """Format the counts, e.g. `12 of 12 trials: 9 finished, 2 stopped early, 1 failed`."""
    by_state = Counter(record.state for record in page.records)
    labels = {"finished": "finished", "stopped": "stopped early", "failed": "failed", "running": "under way"}
    states = ", ".join(f"{by_state[state]} {label}" for state, label in labels.items() if by_state[state])
    total = f" of {page.total}" if page.total else ""
    return f"{len(page.records)}{total} trials: {states or 'none yet'}"


def cell(value: Any) -> str:
    """Format a parameter's value for a table cell."""
    return f"{value:g}" if isinstance(value, float) else name_of(value)


def dotted(key: str) -> Markup:
    """Format a dotted key so that the browser may break the line after a dot."""
    return Markup(".<wbr>").join(key.split("."))


_PAGE = pages.Page("page.html", "page.css", folder=Path(__file__).parent, cell=cell, duration=duration, dotted=dotted)


def _context(page: Page) -> dict[str, Any]:
    importance = importance_of(page.records, page.sweep)
    fixed = {key: value for key, value in page.sweep.fixed.items() if key not in page.keys}
    return {
        "page": page,
        "title": page.sweep.name,
        "lead": page.sweep.description or "",
        "counts": counts(page),
        "facts": _facts(page),
        "parallel": Markup(parallel_coordinates(page.records, page.sweep)),
        "far": _far(page),
        "trials": Markup(metric_by_trial(page.records, page.goal, page.metric)),
        "importance": importance,
        "remark": remark(page.records),
        "ends": at_an_end(page.records, page.sweep),
        "rows": ordered(page),
        "fixed": fixed,
    }


def _far(page: Page) -> float | None:
    """Return the end of the metric's axis if some values lie beyond it; None otherwise."""
    values = [record.value for record in page.records if record.value is not None and record.state != "failed"]
    if not values:
        return None
    low, high = shown_range(values, page.goal)
    is_clipped, limit = (max(values) > high, high) if page.goal is Goal.minimize else (min(values) < low, low)
    return limit if is_clipped else None


def _facts(page: Page) -> list[tuple[str, str]]:
    hyperband = page.sweep.early_terminate
    seconds = [record.seconds for record in page.records if record.seconds]
    facts = [
        ("method", page.sweep.method.value),
        ("metric", f"{page.metric}, {'lower' if page.goal is Goal.minimize else 'higher'} is better"),
        (
            "stopped early",
            f"by hyperband: first after {hyperband.rungs[0] + 1} values, the best 1/{hyperband.eta:g} go on"
            if hyperband
            else "never",
        ),
        ("time of all trials", duration(sum(seconds)) if seconds else ""),
        ("file", page.sweep.place),
    ]
    return [(name, value) for name, value in facts if value]
