"""The trials of a sweep, several at a time: asked for, started, watched, told.

What is known stands in the search's journal and in the trials' own folders, so whatever ends this process, the next one
goes on: a trial of which nothing was told is begun again in its folder, and its run resumes by itself.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from lit_vlm.config.settings import did_you_mean, nearest
from lit_vlm.engine.exits import RESTART
from lit_vlm.engine.report_data import read_metrics
from lit_vlm.engine.run_folder import find_manifest
from lit_vlm.engine.signals import ASKS, TOGETHER_SECONDS, Ask, current
from lit_vlm.sweep.file import Goal
from lit_vlm.sweep.process import LOG, TrialProcess, end_left_behind, is_finished, last_lines, values_in
from lit_vlm.sweep.records import TrialRecord
from lit_vlm.sweep.search import Outcome, Search, Trial
from lit_vlm.types import UserError

POLL_SECONDS = 0.5
FAILURES = 3  # in a row, before any trial went well: it is not the values
ERROR_LINES = 8  # of a log, that hold a run's error
MOST_STARTS = 4  # of a trial that leaves to be started again, as after a device ran out of memory

Place = tuple[str, ...]  # CUDA devices of one trial


class Trials:
    """Runs a search's trials in this process's children.

    Args:
        metric: what is compared.
        folder: of the sweep; a trial's is below it, by its number.
        make: the process of a trial, from its number and its values.
        places: devices for each trial that runs at a time.
        worker, num_workers: which share of an interrupted sweep's trials this process takes up.
        say: told what happens.
        on_change: called after each trial.
    """

    def __init__(
        self,
        search: Search,
        metric: str,
        folder: Path,
        make: Callable[[int, dict[str, Any]], TrialProcess],
        *,
        places: list[Place],
        worker: int = 0,
        num_workers: int = 1,
        say: Callable[[str], None] = print,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self.search, self.metric, self.folder, self.make = search, metric, folder, make
        self.worker, self.num_workers, self.say, self.on_change = worker, num_workers, say, on_change
        self.asked: list[Ask] = []
        self._free = list(places)
        self._running: list[TrialProcess] = []
        self._told = {Outcome.finished: 0, Outcome.stopped: 0, Outcome.failed: 0}
        self._asked_at = 0.0

    def run(self) -> list[Ask]:
        """Until all trials are told, or this process is asked to leave; returns what was asked.

        Raises:
            UserError: the first trials all failed.
        """
        waiting = [trial for trial in self.search.unfinished() if trial.worker % self.num_workers == self.worker]
        try:
            with self._listening():
                while self._begin(waiting) or self._running:
                    time.sleep(POLL_SECONDS)
                    self._look()
        finally:
            for trial in self._running:
                trial.ask_to_leave()
        return self.asked

    def _begin(self, waiting: list[Trial]) -> bool:
        """Start what there is place for; whether something was started."""
        begun = False
        while self._free and not self.asked and not self._reached():
            trial = waiting.pop(0) if waiting else self.search.ask(self.worker)
            if trial is None:
                break
            folder = self.folder / str(trial.number)
            end_left_behind(folder)
            if is_finished(folder):
                self._settle(self.make(trial.number, trial.parameters), 0)
                continue
            process = self.make(trial.number, trial.parameters)
            process.devices = self._free.pop(0)
            process.start()
            self._running.append(process)
            self.say(f"trial {trial.number}: {shown(trial.parameters, self.search)}")
            begun = True
        return begun

    def _look(self) -> None:
        for trial in list(self._running):
            if self.asked or trial.leaving:
                trial.ask_to_leave()
            status = trial.ended()  # before its table is read, so that the last row is in it
            values = trial.values(self.metric)
            if values and not trial.leaving and self.search.observe(trial.number, values) and status is None:
                self.say(
                    f"trial {trial.number}: stopped early, {self.metric} {values[-1]:.4g} after {len(values)} values"
                )
                trial.stopping = True
                trial.ask_to_leave()
            if status is not None:
                self._ended(trial, status)

    def _ended(self, trial: TrialProcess, status: int) -> None:
        if status == RESTART and not (self.asked or trial.stopping) and trial.starts < MOST_STARTS:
            trial.start()
            return
        self._running.remove(trial)
        self._free.append(trial.devices)
        if not (self.asked and status):  # else it has saved, and goes on next time
            self._settle(trial, status)

    def _settle(self, trial: TrialProcess, status: int) -> None:
        values = values_in(trial.folder, self.metric)
        value = values[-1] if values else None
        outcome = Outcome.failed if status else Outcome.finished
        if status and trial.stopping:
            outcome = Outcome.stopped
        if outcome is Outcome.finished and value is None:
            outcome = Outcome.failed
        self.search.tell(trial.number, value, outcome)
        told = self.search.outcome_of(trial.number) or outcome
        self._told[told] += 1
        if told is Outcome.failed:
            self.say(f"trial {trial.number}: failed: {why_failed(trial.folder, self.metric)} Log: {trial.folder / LOG}")
            self._give_up(trial)
        elif told is Outcome.finished:
            self.say(f"trial {trial.number}: {self.metric} {value:.5g}")
        self.on_change()

    def _give_up(self, trial: TrialProcess) -> None:
        if self._told[Outcome.failed] == FAILURES and not self._told[Outcome.finished] + self._told[Outcome.stopped]:
            self.on_change()
            finished = is_finished(trial.folder)
            said = why_failed(trial.folder, self.metric) if finished else last_lines(trial.folder, ERROR_LINES)
            raise UserError(
                f"The first {FAILURES} trials failed. The last one's log, {trial.folder / LOG}, ends with:\n{said}\n"
                "When that is mended, the same command goes on with the trials that are left."
            )

    def _reached(self) -> bool:
        """The file's target was reached, and nothing more is begun."""
        metric = self.search.sweep.metric
        if metric is None or metric.target is None:
            return False
        better = (
            (lambda value: value <= metric.target)
            if metric.goal is Goal.minimize
            else (lambda value: value >= metric.target)
        )
        return any(trial.outcome is Outcome.finished and better(trial.value) for trial in self.search.trials())

    @contextmanager
    def _listening(self) -> Iterator[None]:
        before = {number: signal.signal(number, self._handle) for number in ASKS}
        try:
            yield
        finally:
            if self.asked and (signals := current()) is not None:
                signals.leaving = True  # the job that it is to requeue is not yet
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """The trials are asked to save and leave; after a second Ctrl-C they are ended."""
        now, ask = time.monotonic(), ASKS[signal.Signals(number)]
        if ask is Ask.interrupt and Ask.interrupt in self.asked and now - self._asked_at > TOGETHER_SECONDS:
            for trial in self._running:
                trial.kill()
        self._asked_at = now
        self.asked.append(ask)


def records_of(search: Search, folder: Path, metric: str) -> list[TrialRecord]:
    """All trials so far."""
    return [_record(trial, folder / str(trial.number), metric) for trial in search.trials()]


def _record(trial: Trial, folder: Path, metric: str) -> TrialRecord:
    figures = find_manifest(folder).get("figures") or {}
    value = trial.value
    if trial.outcome is None and (values := values_in(folder, metric)):
        value = values[-1]
    return TrialRecord(
        number=trial.number,
        parameters=trial.parameters,
        value=value,
        state=trial.outcome.value if trial.outcome else "running",
        folder=folder,
        seconds=figures.get("seconds", trial.seconds),
        note=why_failed(folder, metric) if trial.outcome is Outcome.failed else "",
    )


def why_failed(folder: Path, metric: str) -> str:
    """In a line."""
    if not is_finished(folder):
        return last_lines(folder)
    logged = read_metrics(folder / "metrics.csv")
    if metric in logged:
        return f"{metric} is {logged[metric][-1][1]}."
    found = did_you_mean(nearest(metric, list(logged)))
    return f"it never logged {metric}; it logged {', '.join(sorted(logged)) or 'nothing'}.{found}"


def shown(parameters: dict[str, Any], search: Search) -> str:
    """The values that are tried, in a line."""
    return ", ".join(f"{key}={value}" for key, value in parameters.items() if key in search.sweep.swept)
