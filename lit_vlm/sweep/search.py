"""Which values to try next, and which trials to stop: Optuna behind W&B's words.

With a journal (a file) several processes on several hosts share one search, and one that was killed goes on: whatever a
process knows is read from the file. A trial's number is given once.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, GPSampler, RandomSampler
from optuna.storages import BaseStorage, InMemoryStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from optuna.trial import FrozenTrial, TrialState

from lit_vlm.sweep.file import Goal, Hyperband, Method, SweepFile
from lit_vlm.sweep.parameter import TAIL, Parameter

STUDY = "sweep"
PARAMETERS, WORKER, OUTCOME, VALUE = "parameters", "worker", "outcome", "value"  # what we note of a trial
FIRST_RANDOM = 4  # at least, before a model of what was seen chooses; one more for each parameter beyond


class Outcome(StrEnum):
    finished = "finished"
    stopped = "stopped"  # early
    failed = "failed"


@dataclass(frozen=True, slots=True)
class Suggestion:
    """Values to try: plain Python, by dotted key, the file's fixed ones with them."""

    number: int  # of the trial, from 0
    parameters: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Trial:
    """A trial as the search knows it. `outcome` None: it is under way, or whoever ran it is gone."""

    number: int
    parameters: dict[str, Any]
    outcome: Outcome | None
    value: float | None
    worker: int
    seen: int  # values of the metric that were observed
    seconds: float | None  # from when it was given to when it was told


class Search:
    """One sweep's search.

    Args:
        journal: a file that is shared and kept; None: in memory.
        seed: of what is drawn. Trial n of the same trials before it gets the same values, also after an interruption.
        most: trials altogether; None: the file's run_cap, or no end.
    """

    def __init__(self, sweep: SweepFile, journal: Path | None = None, seed: int = 0, most: int | None = None) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.sweep, self.seed = sweep, seed
        self.grid = list(_grid(sweep)) if sweep.method is Method.grid else None
        caps = [most or sweep.run_cap, len(self.grid) if self.grid is not None else None]
        self.most = min((cap for cap in caps if cap is not None), default=None)
        self._journal = journal
        self._storage = _storage(journal)
        goal = sweep.metric.goal if sweep.metric else Goal.minimize
        with _quiet(), self._alone():
            self._study = optuna.create_study(
                storage=self._storage,
                sampler=RandomSampler(seed=seed),
                study_name=STUDY,
                direction=goal.value,
                load_if_exists=True,
            )
        self._id = self._storage.get_study_id_from_name(STUDY)

    def ask(self, worker: int = 0) -> Suggestion | None:
        """The next trial; None when the grid is used up or all trials were given.

        Args:
            worker: who runs it, so that the same one finds it again after an interruption.
        """
        with _quiet(), self._alone():  # counting and taking are one act, for every process
            given = len(self.trials())
            if self.most is not None and given >= self.most:
                return None
            self._drop_half_made()
            space = {key: _distribution(one) for key, one in self.sweep.swept.items()} if self.grid is None else {}
            self._study.sampler = self._sampler(given, len(space))
            trial = self._study.ask(space)
            drawn = self.grid[given] if self.grid is not None else self._values(trial.params)
            together = {**self.sweep.fixed, **drawn}
            parameters = {key: together[key] for key in self.sweep.parameters}
            trial.set_user_attr(WORKER, worker)
            trial.set_user_attr(PARAMETERS, json.dumps(parameters, ensure_ascii=False))  # now it is given
            return Suggestion(trial.number, parameters)

    def observe(self, number: int, values: list[float]) -> bool:
        """Tell all values of the metric that a trial has logged so far, oldest first.

        Returns:
            Whether to stop it, by the rule of W&B's hyperband.
        """
        trial, band = self._frozen()[number], self.sweep.early_terminate
        seen = len(trial.intermediate_values)
        if len(values) <= seen:  # others may have raised the bar meanwhile
            return band is not None and self._falls_behind(number, band)
        for place in range(seen, len(values)):
            self._storage.set_trial_intermediate_value(trial._trial_id, place + 1, values[place])
            if band is not None and self._falls_behind(number, band):
                return True
        return False

    def tell(self, number: int, value: float | None, outcome: Outcome | str) -> None:
        """Tell what came of a trial. A value that is no number is a failure; a trial that was told already stays as it is.

        A stopped trial is told to the model like a finished one, with the value that it had reached: Optuna's models of
        this kind learn nothing from what Optuna calls pruned.
        """
        outcome = Outcome(outcome)
        if value is not None and not math.isfinite(value):
            value, outcome = None, Outcome.failed
        trial = self._frozen()[number]
        if trial.state.is_finished():
            return
        self._storage.set_trial_user_attr(trial._trial_id, OUTCOME, outcome.value)
        self._storage.set_trial_user_attr(trial._trial_id, VALUE, value)
        if outcome is Outcome.failed or value is None:  # nothing that could be learnt from
            self._study.tell(number, state=TrialState.FAIL)
        else:
            self._study.tell(number, value)

    def _falls_behind(self, number: int, band: Hyperband) -> bool:
        """Compare a trial's best value with those of all trials at the last rung that it has passed."""
        sign = -1 if self.sweep.metric and self.sweep.metric.goal is Goal.maximize else 1
        curves = {
            trial.number: [sign * value for value in trial.intermediate_values.values() if math.isfinite(value)]
            for trial in self._frozen()
        }
        mine = curves[number]
        passed = [rung for rung in band.rungs if rung < len(mine)]
        if not passed:
            return False
        there = sorted(curve[passed[-1]] for curve in curves.values() if len(curve) > passed[-1])
        return min(mine) > there[int(1.0 / band.eta * len(there))]

    def trials(self) -> list[Trial]:
        """All trials that were given so far, by number."""
        return [_trial(frozen) for frozen in self._frozen() if PARAMETERS in frozen.user_attrs]

    def outcome_of(self, number: int) -> Outcome | None:
        """What was told of a trial; a value that is no number was a failure."""
        return next((trial.outcome for trial in self.trials() if trial.number == number), None)

    def unfinished(self) -> list[Trial]:
        """Trials that were given and of which nothing was told."""
        return [trial for trial in self.trials() if trial.outcome is None]

    def _frozen(self) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False)

    def _drop_half_made(self) -> None:
        """Trials of a process that was killed while it asked; nobody runs them, and they do not count."""
        for frozen in self._frozen():
            if PARAMETERS not in frozen.user_attrs and not frozen.state.is_finished():
                self._study.tell(frozen.number, state=TrialState.FAIL)

    def _sampler(self, number: int, dimensions: int) -> BaseSampler:
        """Seeded by the trial's number, so that a search that goes on draws what it would have drawn."""
        seed = int(np.random.SeedSequence([self.seed, number]).generate_state(1)[0])
        if self.sweep.method is not Method.bayes or not dimensions:
            return RandomSampler(seed=seed)
        first = max(FIRST_RANDOM, dimensions + 1)
        if self.most is not None:
            first = min(first, max(2, self.most // 3))
        return GPSampler(seed=seed, n_startup_trials=first)

    def _values(self, raw: dict[str, Any]) -> dict[str, Any]:
        swept = self.sweep.swept
        return {key: json.loads(one) if isinstance(one, str) else swept[key].value(one) for key, one in raw.items()}

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """No other process asks meanwhile; one that was killed in here is passed by after half a minute."""
        if self._journal is None:
            yield
            return
        lock = JournalFileSymlinkLock(f"{self._journal}.ask")
        lock.acquire()
        try:
            yield
        finally:
            lock.release()


def _storage(journal: Path | None) -> BaseStorage:
    if journal is None:
        return InMemoryStorage()
    journal.parent.mkdir(parents=True, exist_ok=True)
    journal.touch()  # what its lock is a link to
    with _quiet():
        return JournalStorage(JournalFileBackend(str(journal)))


def _distribution(one: Parameter) -> BaseDistribution:
    """Where Optuna draws: the range itself, a list's values as JSON, of anything else a quantile."""
    if one.values and not one.probabilities:
        return CategoricalDistribution([json.dumps(value, ensure_ascii=False) for value in one.values])
    if one.distribution == "int_uniform":
        return IntDistribution(int(one.min), int(one.max))
    if one.is_range:
        return FloatDistribution(one.min, one.max, log=one.is_log)
    return FloatDistribution(0.0 if one.probabilities else TAIL, 1.0 if one.probabilities else 1 - TAIL)


def _grid(sweep: SweepFile) -> Iterator[dict[str, Any]]:
    """Every combination once, the last parameter of the file changing first."""
    swept = sweep.swept
    for values in product(*(_unique(one.points or ()) for one in swept.values())):
        yield dict(zip(swept, values, strict=True))


def _unique(values: tuple[Any, ...]) -> list[Any]:
    return [json.loads(text) for text in dict.fromkeys(json.dumps(value) for value in values)]


def _trial(frozen: FrozenTrial) -> Trial:
    noted = frozen.user_attrs
    outcome = noted[OUTCOME] if frozen.state.is_finished() else None
    return Trial(
        number=frozen.number,
        parameters=json.loads(noted[PARAMETERS]),
        outcome=Outcome(outcome) if outcome else None,
        value=noted.get(VALUE),
        worker=noted[WORKER],
        seen=len(frozen.intermediate_values),
        seconds=frozen.duration.total_seconds() if frozen.duration else None,
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Optuna's notes on what is experimental."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        warnings.filterwarnings("ignore", module="optuna.*")
        yield
