"""Records of a sweep's trials, for its report and its table. They do not depend on who ran the trials."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_vlm.sweep.file import Goal

TRIAL_STATES = ("finished", "stopped", "failed", "running")


@dataclass(frozen=True, slots=True)
class TrialRecord:
    """Record of one trial.

    Attributes:
        parameters: values by dotted key, including the fixed ones.
        value: the last logged value of the metric; None: none was logged.
        state: one of `TRIAL_STATES`.
        folder: run folder of the trial.
        seconds: duration; None: not known.
        note: why it failed.
    """

    number: int
    parameters: dict[str, Any]
    value: float | None
    state: str
    folder: Path
    seconds: float | None = None
    note: str = ""


def find_best_trial(records: Iterable[TrialRecord], goal: Goal | str) -> TrialRecord | None:
    """Find the finished trial with the best value, the first of equal ones. A trial ended by early stopping is never the best."""
    finished = [record for record in records if record.state == "finished" and record.value is not None]
    sign = 1 if Goal(goal) is Goal.minimize else -1
    return min(finished, key=lambda record: (sign * record.value, record.number), default=None)


def find_varying_keys(records: Iterable[TrialRecord]) -> list[str]:
    """Find the keys whose values differ between trials, in their order in the records."""
    values_by_key: dict[str, set[str]] = {}
    for record in records:
        for key, value in record.parameters.items():
            values_by_key.setdefault(key, set()).add(repr(value))
    return [key for key, values in values_by_key.items() if len(values) > 1]
