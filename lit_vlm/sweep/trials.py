"""Runner of a sweep's trials: runs them in parallel processes, stops them early, reports their outcomes to the search.

All state is in the search's journal and in the folders of the trials. So after this process ends for any reason, the next one
resumes: a trial without an outcome is started again in its folder, and its run resumes from its checkpoint.
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
FAILURES = 3  # failed trials before any success: then the values are not the cause
ERROR_LINES = 8  # last lines of a log, which hold the error of the run
MOST_STARTS = 4  # of a trial that exits to be restarted, e.g. after out of memory

Place = tuple[str, ...]  # CUDA devices of one trial


class Trials:
    """Runner of a search's trials in child processes.

    Args:
        metric: name of the metric that is compared.
        folder: of the sweep; the folder of a trial is below it, named by its number.
        make_process: makes the process of a trial from its number and its values.
        device_groups: the devices of each trial that runs at the same time.
        worker, num_workers: select the unfinished trials that this process resumes.
        say: reports a line to the user.
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
        """Run until all trials have an outcome or a stop signal arrives.

        Returns:
            The stop requests that were received.

        Raises:
            UserError: the first trials all failed.
        """
        unfinished = [trial for trial in self.search.unfinished() if trial.worker % self.num_workers == self.worker]
        try:
            with self._listening():
                while self._begin(unfinished) or self._running:
                    time.sleep(POLL_SECONDS)
                    self._look()
        finally:
            for trial in self._running:
                trial.ask_to_leave()
        return self.asked

    def _begin(self, waiting: list[Trial]) -> bool:
        """Start a trial for each free group of devices; return whether any trial was started.

        Unfinished trials of an earlier start come first, then new ones of the search.
        """
        has_started = False
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
            has_started = True
        return has_started

    def _look(self) -> None:
        """Check the running trials: forward stop signals, read new values, apply early stopping, handle exits."""
        for trial in list(self._running):
            if self.asked or trial.leaving:
                trial.ask_to_leave()
            status = trial.ended()  # before metrics.csv is read, so that the last row is included
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
        """Restart a trial that exited for a restart; otherwise free its devices and store its outcome."""
        if status == RESTART and not (self.asked or trial.stopping) and trial.starts < MOST_STARTS:
            trial.start()
            return
        self._running.remove(trial)
        self._free.append(trial.devices)
        if not (self.asked and status):  # otherwise it has saved a checkpoint, and the next start resumes it
            self._settle(trial, status)

    def _settle(self, trial: TrialProcess, status: int) -> None:
        """Tell the search the outcome of a trial, and report it."""
        values = values_in(trial.folder, self.metric)
        value = values[-1] if values else None
        outcome = Outcome.failed if status else Outcome.finished
        if status and trial.stopping:
            outcome = Outcome.stopped
        if outcome is Outcome.finished and value is None:
            outcome = Outcome.failed
        self.search.tell(trial.number, value, outcome)
        stored_outcome = self.search.outcome_of(trial.number) or outcome
        self._told[stored_outcome] += 1
        if stored_outcome is Outcome.failed:
            self.say(f"trial {trial.number}: failed: {why_failed(trial.folder, self.metric)} Log: {trial.folder / LOG}")
            self._give_up(trial)
        elif stored_outcome is Outcome.finished:
            self.say(f"trial {trial.number}: {self.metric} {value:.5g}")
        self.on_change()

    def _give_up(self, trial: TrialProcess) -> None:
        """Raise UserError if the first `MAX_INITIAL_FAILURES` trials all failed."""
        if self._told[Outcome.failed] == FAILURES and not self._told[Outcome.finished] + self._told[Outcome.stopped]:
            self.on_change()
            run_is_finished = is_finished(trial.folder)
            log = why_failed(trial.folder, self.metric) if run_is_finished else last_lines(trial.folder, ERROR_LINES)
            raise UserError(
                f"The first {FAILURES} trials failed. The last one's log, {trial.folder / LOG}, ends with:\n{log}\n"
                "When that is mended, the same command goes on with the trials that are left."
            )

    def _reached(self) -> bool:
        """Return whether a finished trial reached the objective's target; then no further trial is started."""
        objective = self.search.sweep.metric
        if objective is None or objective.target is None:
            return False
        reaches_target = (
            (lambda value: value <= objective.target)
            if objective.goal is Goal.minimize
            else (lambda value: value >= objective.target)
        )
        return any(trial.outcome is Outcome.finished and reaches_target(trial.value) for trial in self.search.trials())

    @contextmanager
    def _listening(self) -> Iterator[None]:
        """Handle stop signals inside the block, then restore the old handlers."""
        old_handlers = {number: signal.signal(number, self._handle) for number in ASKS}
        try:
            yield
        finally:
            if self.asked and (signals := current()) is not None:
                signals.leaving = True  # the Slurm job is not requeued yet
            for number, handler in old_handlers.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Note a stop signal, so that the trials save and exit; a second Ctrl-C kills them."""
        now, ask = time.monotonic(), ASKS[signal.Signals(number)]
        if ask is Ask.interrupt and Ask.interrupt in self.asked and now - self._asked_at > TOGETHER_SECONDS:
            for trial in self._running:
                trial.kill()
        self._asked_at = now
        self.asked.append(ask)


def records_of(search: Search, folder: Path, metric: str) -> list[TrialRecord]:
    """Collect the records of all trials so far."""
    return [_record(trial, folder / str(trial.number), metric) for trial in search.trials()]


def _record(trial: Trial, folder: Path, metric: str) -> TrialRecord:
    """Make the record of a trial; a running trial has its last logged value."""
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
    """Return in one line why a trial failed."""
    if not is_finished(folder):
        return last_lines(folder)
    metrics = read_metrics(folder / "metrics.csv")
    if metric in metrics:
        return f"{metric} is {metrics[metric][-1][1]}."
    hint = did_you_mean(nearest(metric, list(metrics)))
    return f"it never logged {metric}; it logged {', '.join(sorted(metrics)) or 'nothing'}.{hint}"


def shown(parameters: dict[str, Any], search: Search) -> str:
    """Format the values of the search space in one line."""
    return ", ".join(f"{key}={value}" for key, value in parameters.items() if key in search.sweep.swept)
