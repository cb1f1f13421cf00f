"""Search with Optuna: the sampler chooses the values of the next trial, and early stopping prunes trials.

The settings are those of a W&B sweep file. With a journal file (Optuna's `JournalStorage`) several processes on several hosts
share one search, and a killed process resumes: all state is read from the file. A trial number is given only once.
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

from lit_vlm.sweep.search_space import TAIL_PROBABILITY, SweepParameter
from lit_vlm.sweep.sweep_file import Goal, Hyperband, SearchMethod, SweepFile

STUDY_NAME = "sweep"
PARAMETERS_KEY, WORKER_KEY, OUTCOME_KEY, VALUE_KEY = (
    "parameters",
    "worker",
    "outcome",
    "value",
)  # user attributes of an Optuna trial
MIN_RANDOM_TRIALS = 4  # random trials before the Gaussian process samples; with d > 3 parameters there are d + 1


class TrialOutcome(StrEnum):
    """Outcome of a trial."""

    finished = "finished"
    stopped = "stopped"  # by early stopping
    failed = "failed"


@dataclass(frozen=True, slots=True)
class Suggestion:
    """Suggested values of a trial: plain Python values by dotted key, with the fixed parameters of the file."""

    number: int  # of the trial, from 0
    parameters: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Trial:
    """Trial as the search knows it.

    Attributes:
        outcome: None if the trial is running, or if the process that ran it is gone.
        num_values: number of values of the metric that were reported.
        seconds: time from `ask` to `tell`.
    """

    number: int
    parameters: dict[str, Any]
    outcome: TrialOutcome | None
    value: float | None
    worker: int
    num_values: int
    seconds: float | None


class Search:
    """Search of one sweep, with Optuna's ask-and-tell interface.

    Args:
        journal_path: shared journal file; None: in memory.
        seed: of the sampler. After the same earlier trials, trial n gets the same values, also after an interruption.
        max_trials: total number of trials; None: the file's run_cap, or no limit.
    """

    def __init__(
        self, sweep: SweepFile, journal_path: Path | None = None, seed: int = 0, max_trials: int | None = None
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.sweep, self.seed = sweep, seed
        self.grid = list(_iter_grid(sweep)) if sweep.method is SearchMethod.grid else None
        limits = [max_trials or sweep.run_cap, len(self.grid) if self.grid is not None else None]
        self.max_trials = min((limit for limit in limits if limit is not None), default=None)
        self._journal_path = journal_path
        self._storage = _open_storage(journal_path)
        goal = sweep.goal
        with _filter_warnings(), self._lock_journal():
            self._study = optuna.create_study(
                storage=self._storage,
                sampler=RandomSampler(seed=seed),
                study_name=STUDY_NAME,
                direction=goal.value,
                load_if_exists=True,
            )
        self._study_id = self._storage.get_study_id_from_name(STUDY_NAME)

    def ask(self, worker: int = 0) -> Suggestion | None:
        """Sample the values of the next trial; None if the grid is used up or all trials were given.

        Args:
            worker: number of the worker that runs the trial, so that the same worker finds it after an interruption.
        """
        with _filter_warnings(), self._lock_journal():  # counting and taking a trial must be atomic across processes
            num_given = len(self.list_trials())
            if self.max_trials is not None and num_given >= self.max_trials:
                return None
            self._drop_incomplete_trials()
            distributions = (
                {key: _make_distribution(parameter) for key, parameter in self.sweep.search_space.items()}
                if self.grid is None
                else {}
            )
            self._study.sampler = self._make_sampler(num_given, len(distributions))
            trial = self._study.ask(distributions)
            sampled = self.grid[num_given] if self.grid is not None else self._decode_values(trial.params)
            values = {**self.sweep.fixed, **sampled}
            parameters = {key: values[key] for key in self.sweep.parameters}
            trial.set_user_attr(WORKER_KEY, worker)
            # the next line makes the trial count as given
            trial.set_user_attr(PARAMETERS_KEY, json.dumps(parameters, ensure_ascii=False))
            return Suggestion(trial.number, parameters)

    def check_early_stopping(self, number: int, values: list[float]) -> bool:
        """Report the metric's values to the search and check early stopping (W&B's hyperband rule).

        Args:
            values: all values that the trial has logged so far, oldest first.

        Returns:
            Whether to stop the trial.
        """
        trial, hyperband = self._get_frozen_trials()[number], self.sweep.early_terminate
        num_reported = len(trial.intermediate_values)
        if len(values) <= num_reported:  # other trials may have become better meanwhile
            return hyperband is not None and self._should_prune(number, hyperband)
        trial_id = self._storage.get_trial_id_from_study_id_trial_number(self._study_id, number)
        for step in range(num_reported, len(values)):
            self._storage.set_trial_intermediate_value(trial_id, step + 1, values[step])
            if hyperband is not None and self._should_prune(number, hyperband):
                return True
        return False

    def tell(self, number: int, value: float | None, outcome: TrialOutcome | str) -> None:
        """Tell the search the outcome of a trial. A value that is not finite is a failure. A second outcome is ignored.

        A trial ended by early stopping is reported to the search like a finished one, with its last value: Optuna's Gaussian process sampler
        learns nothing from trials in the state `PRUNED`.
        """
        outcome = TrialOutcome(outcome)
        if value is not None and not math.isfinite(value):
            value, outcome = None, TrialOutcome.failed
        trial = self._get_frozen_trials()[number]
        if trial.state.is_finished():
            return
        trial_id = self._storage.get_trial_id_from_study_id_trial_number(self._study_id, number)
        self._storage.set_trial_user_attr(trial_id, OUTCOME_KEY, outcome.value)
        self._storage.set_trial_user_attr(trial_id, VALUE_KEY, value)
        if outcome is TrialOutcome.failed or value is None:  # the sampler cannot learn from it
            self._study.tell(number, state=TrialState.FAIL)
        else:
            self._study.tell(number, value)

    def _should_prune(self, number: int, hyperband: Hyperband) -> bool:
        """Return whether a trial's best value is worse than the best 1/eta of all trials at the last rung that it passed."""
        sign = -1 if self.sweep.goal is Goal.maximize else 1
        curves = {
            trial.number: [sign * value for value in trial.intermediate_values.values() if math.isfinite(value)]
            for trial in self._get_frozen_trials()
        }
        own_values = curves[number]
        passed = [rung for rung in hyperband.rungs if rung < len(own_values)]
        if not passed:
            return False
        values_at_rung = sorted(curve[passed[-1]] for curve in curves.values() if len(curve) > passed[-1])
        return min(own_values) > values_at_rung[int(1.0 / hyperband.eta * len(values_at_rung))]

    def list_trials(self) -> list[Trial]:
        """List all trials that were given so far, in the order of their numbers."""
        return [_make_trial(frozen) for frozen in self._get_frozen_trials() if PARAMETERS_KEY in frozen.user_attrs]

    def get_outcome(self, number: int) -> TrialOutcome | None:
        """Return the outcome of a trial; None without one. A value that is not finite was a failure."""
        return next((trial.outcome for trial in self.list_trials() if trial.number == number), None)

    def list_unfinished_trials(self) -> list[Trial]:
        """List the trials that were given and have no outcome."""
        return [trial for trial in self.list_trials() if trial.outcome is None]

    def _get_frozen_trials(self) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False)

    def _drop_incomplete_trials(self) -> None:
        """Drop trials of a process that was killed inside `ask`. No process runs them, and they do not count."""
        for frozen in self._get_frozen_trials():
            if PARAMETERS_KEY not in frozen.user_attrs and not frozen.state.is_finished():
                self._study.tell(frozen.number, state=TrialState.FAIL)

    def _make_sampler(self, number: int, num_dimensions: int) -> BaseSampler:
        """Make the sampler, seeded by the trial's number, so that a resumed search samples the same values."""
        seed = int(np.random.SeedSequence([self.seed, number]).generate_state(1)[0])
        if self.sweep.method is not SearchMethod.bayes or not num_dimensions:
            return RandomSampler(seed=seed)
        num_random = max(MIN_RANDOM_TRIALS, num_dimensions + 1)
        if self.max_trials is not None:
            num_random = min(num_random, max(2, self.max_trials // 3))
        return GPSampler(seed=seed, n_startup_trials=num_random)

    def _decode_values(self, raw: dict[str, Any]) -> dict[str, Any]:
        """Decode Optuna's raw parameters into the values of the trial."""
        search_space = self.sweep.search_space
        return {
            key: json.loads(value) if isinstance(value, str) else search_space[key].convert_value(value)
            for key, value in raw.items()
        }

    @contextmanager
    def _lock_journal(self) -> Iterator[None]:
        """Lock `ask` against other processes. The lock of a killed process expires after half a minute."""
        if self._journal_path is None:
            yield
            return
        lock = JournalFileSymlinkLock(f"{self._journal_path}.ask")
        lock.acquire()
        try:
            yield
        finally:
            lock.release()


def _open_storage(journal_path: Path | None) -> BaseStorage:
    """Open Optuna's storage: the journal file, or memory."""
    if journal_path is None:
        return InMemoryStorage()
    journal_path.parent.mkdir(parents=True, exist_ok=True)
    journal_path.touch()  # the lock is a symbolic link to this file
    with _filter_warnings():
        return JournalStorage(JournalFileBackend(str(journal_path)))


def _make_distribution(parameter: SweepParameter) -> BaseDistribution:
    """Make Optuna's distribution: a range as it is, listed values as JSON, everything else by a quantile."""
    if parameter.values and not parameter.probabilities:
        return CategoricalDistribution([json.dumps(value, ensure_ascii=False) for value in parameter.values])
    if parameter.distribution == "int_uniform":
        return IntDistribution(int(parameter.min), int(parameter.max))
    if parameter.is_range:
        return FloatDistribution(parameter.min, parameter.max, log=parameter.is_log)
    return FloatDistribution(
        0.0 if parameter.probabilities else TAIL_PROBABILITY, 1.0 if parameter.probabilities else 1 - TAIL_PROBABILITY
    )


def _iter_grid(sweep: SweepFile) -> Iterator[dict[str, Any]]:
    """Iterate over all combinations of the grid; the last parameter of the file changes fastest."""
    search_space = sweep.search_space
    for values in product(*(_drop_duplicates(parameter.grid_points or ()) for parameter in search_space.values())):
        yield dict(zip(search_space, values, strict=True))


def _drop_duplicates(values: tuple[Any, ...]) -> list[Any]:
    return [json.loads(text) for text in dict.fromkeys(json.dumps(value) for value in values)]


def _make_trial(frozen: FrozenTrial) -> Trial:
    attributes = frozen.user_attrs
    outcome = attributes[OUTCOME_KEY] if frozen.state.is_finished() else None
    return Trial(
        number=frozen.number,
        parameters=json.loads(attributes[PARAMETERS_KEY]),
        outcome=TrialOutcome(outcome) if outcome else None,
        value=attributes.get(VALUE_KEY),
        worker=attributes[WORKER_KEY],
        num_values=len(frozen.intermediate_values),
        seconds=frozen.duration.total_seconds() if frozen.duration else None,
    )


@contextmanager
def _filter_warnings() -> Iterator[None]:
    """Suppress Optuna's warnings about experimental features."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        warnings.filterwarnings("ignore", module="optuna.*")
        yield
