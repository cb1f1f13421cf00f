"""Records of a sweep's trials, for its report and its table. They do not depend on who ran the trials."""

from __future__ import annotations

import json
import math
import statistics
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_vlm.config.overrides import quote_value
from lit_vlm.sweep.sweep_file import Goal, SweepFile

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

    @property
    def logged_value(self) -> float:
        """The value, of a trial that logged one."""
        assert self.value is not None
        return self.value


def find_best_trial(records: Iterable[TrialRecord], goal: Goal | str) -> TrialRecord | None:
    """Find the finished trial with the best value, the first of equal ones. A trial ended by early stopping is never the best."""
    finished = [record for record in records if record.state == "finished" and record.value is not None]
    sign = 1 if Goal(goal) is Goal.minimize else -1
    return min(finished, key=lambda record: (sign * record.logged_value, record.number), default=None)


def find_varying_keys(records: Iterable[TrialRecord]) -> list[str]:
    """Find the keys whose values differ between trials, in their order in the records."""
    values_by_key: dict[str, set[str]] = {}
    for record in records:
        for key, value in record.parameters.items():
            values_by_key.setdefault(key, set()).add(repr(value))
    return [key for key, values in values_by_key.items() if len(values) > 1]


MIN_TRIALS = 4  # finished trials; with fewer, no importance is computed
MIN_RELIABLE_TRIALS = 30  # finished trials; with fewer, shares change with every further trial
EDGE_FRACTION = 0.03  # share of a range that counts as its end
MIN_CORRELATION = 0.3  # absolute rank correlation from which a direction is named
NUMBER_TYPES = (int, float)


@dataclass(frozen=True, slots=True)
class ParameterImportance:
    """Importance of one parameter.

    Attributes:
        share: of the variance of the trials' ranks that it explains alone and together with others, 0 to 1 (fANOVA, Hutter et
            al. 2014); all parameters add up to 1.
        correlation: Spearman correlation of its value and the metric, -1 to 1; None if its values have no order.
        direction: meaning of the correlation, as text.
    """

    key: str
    share: float
    correlation: float | None
    direction: str


def compute_importance(records: Sequence[TrialRecord], sweep: SweepFile) -> list[ParameterImportance]:
    """Compute the importance of each varying parameter, the most important first.

    The metric's values are replaced by their ranks, because the value of one diverged trial would explain everything.

    Returns:
        [] if fewer than `MIN_TRIALS` trials finished, no parameter varied, or all values are equal.
    """
    finished = [record for record in records if record.state == "finished" and record.value is not None]
    keys = [key for key in find_varying_keys(finished) if all(key in record.parameters for record in finished)]
    ranks = compute_ranks([record.logged_value for record in finished])
    if len(finished) < MIN_TRIALS or not keys or len(set(ranks)) < 2:
        return []
    goal = sweep.goal
    shares = _compute_shares({key: [record.parameters[key] for record in finished] for key in keys}, ranks, sweep)
    importances = [_make_importance(key, shares[key], finished, ranks, goal) for key in keys]
    return sorted(importances, key=lambda importance: -importance.share)


def get_reliability_note(records: Sequence[TrialRecord]) -> str:
    """Return a note on how reliable the shares are, from the number of finished trials."""
    count = sum(record.state == "finished" for record in records)
    if count < MIN_TRIALS:
        return f"{count} finished trials say nothing about which parameter matters."
    if count < MIN_RELIABLE_TRIALS:
        return f"From {count} finished trials: a hint at the order, not a measurement. From about {MIN_RELIABLE_TRIALS} on the shares settle."
    return f"From {count} finished trials."


def list_edge_warnings(records: Sequence[TrialRecord], sweep: SweepFile) -> list[str]:
    """List warnings for parameters whose best value is at an end of the range; a better value may lie outside."""
    best, messages = find_best_trial(records, sweep.goal), []
    for key, parameter in sweep.search_space.items():
        if best is None or not parameter.is_range or key not in best.parameters:
            continue
        low, high, value = (
            math.log(end) if parameter.is_log else end for end in (parameter.min, parameter.max, best.parameters[key])
        )
        position = (value - low) / (high - low)
        if not EDGE_FRACTION < position < 1 - EDGE_FRACTION:
            end = "lower" if position < 0.5 else "upper"
            messages.append(
                f"{key}: the best value, {best.parameters[key]:g}, is at the {end} end of its range; try a wider one."
            )
    return messages


def compute_ranks(values: Sequence[float]) -> list[float]:
    """Compute ranks: 1 for the smallest value; equal values share the mean of their ranks."""
    ordered = sorted(values)
    first_index = {value: ordered.index(value) for value in set(values)}
    return [first_index[value] + (ordered.count(value) + 1) / 2 for value in values]


def is_numeric(value: Any) -> bool:
    """Return whether a value is a number and no boolean."""
    return isinstance(value, NUMBER_TYPES) and not isinstance(value, bool)


def _compute_shares(columns: dict[str, list[Any]], ranks: list[float], sweep: SweepFile) -> dict[str, float]:
    """Compute the fANOVA share of each parameter with Optuna."""
    import optuna
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    encoded = {key: _encode_values(values, key, sweep) for key, values in columns.items()}
    study = optuna.create_study()
    for index, rank in enumerate(ranks):
        study.add_trial(
            optuna.create_trial(
                params={key: values[index] for key, (values, _) in encoded.items()},
                distributions={key: distribution for key, (_, distribution) in encoded.items()},
                value=rank,
            )
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importances = get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=0), params=list(columns))
    return {key: float(share) for key, share in importances.items()}


def _encode_values(values: list[Any], key: str, sweep: SweepFile) -> tuple[list[Any], Any]:
    """Encode values for Optuna: numbers as floats, others as JSON text; return them with their distribution."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    if all(map(is_numeric, values)):
        log = key in sweep.parameters and sweep.parameters[key].is_log and min(values) > 0
        return [float(value) for value in values], FloatDistribution(float(min(values)), float(max(values)), log=log)
    texts = [json.dumps(value, ensure_ascii=False, sort_keys=True) for value in values]
    return texts, CategoricalDistribution(list(dict.fromkeys(texts)))


def _make_importance(
    key: str, share: float, finished: list[TrialRecord], ranks: list[float], goal: Goal
) -> ParameterImportance:
    values = [record.parameters[key] for record in finished]
    if all(map(is_numeric, values)):
        correlation = statistics.correlation(compute_ranks(values), ranks)
        return ParameterImportance(key, share, correlation, _get_direction(correlation, goal))
    sign = 1 if goal is Goal.minimize else -1
    groups: dict[str, list[float]] = {}
    for value, rank in zip(values, ranks, strict=True):
        groups.setdefault(_format_value(value), []).append(rank)
    best = min(groups, key=lambda name: sign * statistics.median(groups[name]))
    return ParameterImportance(key, share, None, f"best: {best}")


def _get_direction(correlation: float, goal: Goal) -> str:
    if abs(correlation) < MIN_CORRELATION:
        return "no one direction"
    return "lower is better" if (correlation > 0) == (goal is Goal.minimize) else "higher is better"


def _format_value(value: Any) -> str:
    return value if isinstance(value, str) else quote_value(value)
