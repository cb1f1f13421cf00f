"""How much each parameter decided, and which way: from the finished trials alone, whoever ran them."""

from __future__ import annotations

import json
import statistics
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lit_vlm.sweep.file import Goal, SweepFile
from lit_vlm.sweep.records import TrialRecord, varied

FEWEST = 4  # finished trials; below, there is nothing to say
FEW = 30  # below, shares move with every further trial
CLEAR = 0.3  # rank correlation, from which a direction is named
NUMBERS = (int, float)


@dataclass(frozen=True, slots=True)
class Importance:
    """Of one parameter.

    Attributes:
        share: of the variance of the trials' ranks that it explains by itself and with others, 0 to 1 (fANOVA, Hutter et
            al. 2014); all parameters add up to 1.
        correlation: Spearman's, of its value and the metric, -1 to 1; None where its values have no order.
        direction: what that means, in words.
    """

    key: str
    share: float
    correlation: float | None
    direction: str


def importance_of(records: Sequence[TrialRecord], sweep: SweepFile) -> list[Importance]:
    """The most important first; [] where fewer than `FEWEST` trials finished, nothing varied or all came out alike.

    Ranks stand for the values: one trial that diverged would explain everything by its value.
    """
    finished = [record for record in records if record.state == "finished" and record.value is not None]
    keys = [key for key in varied(finished) if all(key in record.parameters for record in finished)]
    ranks = ranked([record.value for record in finished])
    if len(finished) < FEWEST or not keys or len(set(ranks)) < 2:
        return []
    goal = sweep.metric.goal if sweep.metric else Goal.minimize
    shares = _shares({key: [record.parameters[key] for record in finished] for key in keys}, ranks, sweep)
    found = [_importance(key, shares[key], finished, ranks, goal) for key in keys]
    return sorted(found, key=lambda one: -one.share)


def remark(records: Sequence[TrialRecord]) -> str:
    """How far the shares can be trusted."""
    count = sum(record.state == "finished" for record in records)
    if count < FEWEST:
        return f"{count} finished trials say nothing about which parameter matters."
    if count < FEW:
        return f"From {count} finished trials: a hint at the order, not a measurement. From about {FEW} on the shares settle."
    return f"From {count} finished trials."


def ranked(values: Sequence[float]) -> list[float]:
    """1 for the smallest; equal ones share the mean of their ranks."""
    ordered = sorted(values)
    first = {value: ordered.index(value) for value in set(values)}
    return [first[value] + (ordered.count(value) + 1) / 2 for value in values]


def is_number(value: Any) -> bool:
    return isinstance(value, NUMBERS) and not isinstance(value, bool)


def _shares(columns: dict[str, list[Any]], ranks: list[float], sweep: SweepFile) -> dict[str, float]:
    import optuna
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    encoded = {key: _encoded(values, key, sweep) for key, values in columns.items()}
    study = optuna.create_study()
    for place, rank in enumerate(ranks):
        study.add_trial(
            optuna.create_trial(
                params={key: values[place] for key, (values, _) in encoded.items()},
                distributions={key: distribution for key, (_, distribution) in encoded.items()},
                value=rank,
            )
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=0), params=list(columns))
    return {key: float(share) for key, share in found.items()}


def _encoded(values: list[Any], key: str, sweep: SweepFile) -> tuple[list[Any], Any]:
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    if all(map(is_number, values)):
        log = key in sweep.parameters and sweep.parameters[key].is_log and min(values) > 0
        return [float(value) for value in values], FloatDistribution(float(min(values)), float(max(values)), log=log)
    texts = [json.dumps(value, ensure_ascii=False, sort_keys=True) for value in values]
    return texts, CategoricalDistribution(list(dict.fromkeys(texts)))


def _importance(key: str, share: float, finished: list[TrialRecord], ranks: list[float], goal: Goal) -> Importance:
    values = [record.parameters[key] for record in finished]
    if all(map(is_number, values)):
        correlation = statistics.correlation(ranked(values), ranks)
        return Importance(key, share, correlation, _direction(correlation, goal))
    sign = 1 if goal is Goal.minimize else -1
    groups: dict[str, list[float]] = {}
    for value, rank in zip(values, ranks, strict=True):
        groups.setdefault(_word(value), []).append(rank)
    best = min(groups, key=lambda name: sign * statistics.median(groups[name]))
    return Importance(key, share, None, f"best: {best}")


def _direction(correlation: float, goal: Goal) -> str:
    if abs(correlation) < CLEAR:
        return "no one direction"
    return "lower is better" if (correlation > 0) == (goal is Goal.minimize) else "higher is better"


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
