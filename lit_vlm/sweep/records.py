"""What a sweep left, trial by trial: what its page and its table are made of, whoever ran the trials."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_vlm.sweep.file import Goal

STATES = ("finished", "stopped", "failed", "running")


@dataclass(frozen=True, slots=True)
class TrialRecord:
    """One trial.

    Attributes:
        parameters: values by dotted key, fixed ones among them.
        value: of the metric, the last one logged; None: none.
        state: one of `STATES`.
        folder: of its run.
        seconds: that it took; None: not known.
        note: why it failed.
    """

    number: int
    parameters: dict[str, Any]
    value: float | None
    state: str
    folder: Path
    seconds: float | None = None
    note: str = ""


def best_of(records: Iterable[TrialRecord], goal: Goal | str) -> TrialRecord | None:
    """The finished trial with the best value; of equal ones the first. A trial that was stopped early is never the best."""
    finished = [record for record in records if record.state == "finished" and record.value is not None]
    sign = 1 if Goal(goal) is Goal.minimize else -1
    return min(finished, key=lambda record: (sign * record.value, record.number), default=None)


def varied(records: Iterable[TrialRecord]) -> list[str]:
    """Keys whose value is not the same in all trials, in the order in which they stand."""
    seen: dict[str, set[str]] = {}
    for record in records:
        for key, value in record.parameters.items():
            seen.setdefault(key, set()).add(repr(value))
    return [key for key, values in seen.items() if len(values) > 1]
