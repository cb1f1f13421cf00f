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

from lit_vlm.config.settings import find_nearest, format_suggestion
from lit_vlm.engine.exits import RESTART
from lit_vlm.engine.report_data import read_metrics
from lit_vlm.engine.run_folder import read_manifest_or_empty
from lit_vlm.engine.signals import DUPLICATE_SIGNAL_SECONDS, STOP_REQUESTS, StopRequest, get_signal_handler
from lit_vlm.sweep.file import Goal
from lit_vlm.sweep.process import (
    LOG_FILE,
    TrialProcess,
    is_finished,
    read_last_lines,
    read_metric_values,
    stop_orphaned_trial,
)
from lit_vlm.sweep.records import TrialRecord
from lit_vlm.sweep.search import Search, Trial, TrialOutcome
from lit_vlm.types import UserError

POLL_SECONDS = 0.5
MAX_INITIAL_FAILURES = 3  # failed trials before any success: then the values are not the cause
NUM_ERROR_LINES = 8  # last lines of a log, which hold the error of the run
MAX_STARTS = 4  # of a trial that exits to be restarted, e.g. after out of memory

DeviceGroup = tuple[str, ...]  # CUDA devices of one trial


class TrialRunner:
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
        make_process: Callable[[int, dict[str, Any]], TrialProcess],
        *,
        device_groups: list[DeviceGroup],
        worker: int = 0,
        num_workers: int = 1,
        say: Callable[[str], None] = print,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self.search, self.metric, self.folder, self.make_process = search, metric, folder, make_process
        self.worker, self.num_workers, self.say, self.on_change = worker, num_workers, say, on_change
        self.stop_requests: list[StopRequest] = []
        self._free_devices = list(device_groups)
        self._running: list[TrialProcess] = []
        self._outcome_counts = {TrialOutcome.finished: 0, TrialOutcome.stopped: 0, TrialOutcome.failed: 0}
        self._signalled_at = 0.0

    def run(self) -> list[StopRequest]:
        """Run until all trials have an outcome or a stop signal arrives.

        Returns:
            The stop requests that were received.

        Raises:
            UserError: the first trials all failed.
        """
        unfinished = [
            trial for trial in self.search.list_unfinished_trials() if trial.worker % self.num_workers == self.worker
        ]
        try:
            with self._handle_signals():
                while self._start_trials(unfinished) or self._running:
                    time.sleep(POLL_SECONDS)
                    self._check_trials()
        finally:
            for trial in self._running:
                trial.stop()
        return self.stop_requests

    def _start_trials(self, unfinished: list[Trial]) -> bool:
        """Start a trial for each free group of devices; return whether any trial was started.

        Unfinished trials of an earlier start come first, then new ones of the search.
        """
        has_started = False
        while self._free_devices and not self.stop_requests and not self._is_target_reached():
            trial = unfinished.pop(0) if unfinished else self.search.ask(self.worker)
            if trial is None:
                break
            folder = self.folder / str(trial.number)
            stop_orphaned_trial(folder)
            if is_finished(folder):
                self._store_outcome(self.make_process(trial.number, trial.parameters), 0)
                continue
            process = self.make_process(trial.number, trial.parameters)
            process.devices = self._free_devices.pop(0)
            process.start()
            self._running.append(process)
            self.say(f"trial {trial.number}: {format_parameters(trial.parameters, self.search)}")
            has_started = True
        return has_started

    def _check_trials(self) -> None:
        """Check the running trials: forward stop signals, read new values, apply early stopping, handle exits."""
        for trial in list(self._running):
            if self.stop_requests or trial.is_stopping:
                trial.stop()
            status = trial.get_exit_status()  # before metrics.csv is read, so that the last row is included
            values = trial.read_values(self.metric)
            if (
                values
                and not trial.is_stopping
                and self.search.check_early_stopping(trial.number, values)
                and status is None
            ):
                self.say(
                    f"trial {trial.number}: stopped early, {self.metric} {values[-1]:.4g} after {len(values)} values"
                )
                trial.is_early_stopped = True
                trial.stop()
            if status is not None:
                self._handle_exit(trial, status)

    def _handle_exit(self, trial: TrialProcess, status: int) -> None:
        """Restart a trial that exited for a restart; otherwise free its devices and store its outcome."""
        if status == RESTART and not (self.stop_requests or trial.is_early_stopped) and trial.num_starts < MAX_STARTS:
            trial.start()
            return
        self._running.remove(trial)
        self._free_devices.append(trial.devices)
        if not (self.stop_requests and status):  # otherwise it has saved a checkpoint, and the next start resumes it
            self._store_outcome(trial, status)

    def _store_outcome(self, trial: TrialProcess, status: int) -> None:
        """Tell the search the outcome of a trial, and report it."""
        values = read_metric_values(trial.folder, self.metric)
        value = values[-1] if values else None
        outcome = TrialOutcome.failed if status else TrialOutcome.finished
        if status and trial.is_early_stopped:
            outcome = TrialOutcome.stopped
        if outcome is TrialOutcome.finished and value is None:
            outcome = TrialOutcome.failed
        self.search.tell(trial.number, value, outcome)
        stored_outcome = self.search.get_outcome(trial.number) or outcome
        self._outcome_counts[stored_outcome] += 1
        if stored_outcome is TrialOutcome.failed:
            self.say(
                f"trial {trial.number}: failed: {get_failure_reason(trial.folder, self.metric)} Log: {trial.folder / LOG_FILE}"
            )
            self._raise_if_all_failed(trial)
        elif stored_outcome is TrialOutcome.finished:
            self.say(f"trial {trial.number}: {self.metric} {value:.5g}")
        self.on_change()

    def _raise_if_all_failed(self, trial: TrialProcess) -> None:
        """Raise UserError if the first `MAX_INITIAL_FAILURES` trials all failed."""
        if (
            self._outcome_counts[TrialOutcome.failed] == MAX_INITIAL_FAILURES
            and not self._outcome_counts[TrialOutcome.finished] + self._outcome_counts[TrialOutcome.stopped]
        ):
            self.on_change()
            run_is_finished = is_finished(trial.folder)
            log = (
                get_failure_reason(trial.folder, self.metric)
                if run_is_finished
                else read_last_lines(trial.folder, NUM_ERROR_LINES)
            )
            raise UserError(
                f"The first {MAX_INITIAL_FAILURES} trials failed. The last one's log, {trial.folder / LOG_FILE}, ends with:\n{log}\n"
                "When that is mended, the same command goes on with the trials that are left."
            )

    def _is_target_reached(self) -> bool:
        """Return whether a finished trial reached the objective's target; then no further trial is started."""
        objective = self.search.sweep.metric
        if objective is None or objective.target is None:
            return False
        reaches_target = (
            (lambda value: value <= objective.target)
            if objective.goal is Goal.minimize
            else (lambda value: value >= objective.target)
        )
        return any(
            trial.outcome is TrialOutcome.finished and reaches_target(trial.value)
            for trial in self.search.list_trials()
        )

    @contextmanager
    def _handle_signals(self) -> Iterator[None]:
        """Handle stop signals inside the block, then restore the old handlers."""
        old_handlers = {number: signal.signal(number, self._on_signal) for number in STOP_REQUESTS}
        try:
            yield
        finally:
            if self.stop_requests and (signals := get_signal_handler()) is not None:
                signals.is_exiting = True  # the Slurm job is not requeued yet
            for number, handler in old_handlers.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """Note a stop signal, so that the trials save and exit; a second Ctrl-C kills them."""
        now, ask = time.monotonic(), STOP_REQUESTS[signal.Signals(number)]
        if (
            ask is StopRequest.interrupt
            and StopRequest.interrupt in self.stop_requests
            and now - self._signalled_at > DUPLICATE_SIGNAL_SECONDS
        ):
            for trial in self._running:
                trial.kill()
        self._signalled_at = now
        self.stop_requests.append(ask)


def collect_records(search: Search, folder: Path, metric: str) -> list[TrialRecord]:
    """Collect the records of all trials so far."""
    return [_make_record(trial, folder / str(trial.number), metric) for trial in search.list_trials()]


def _make_record(trial: Trial, folder: Path, metric: str) -> TrialRecord:
    """Make the record of a trial; a running trial has its last logged value."""
    figures = read_manifest_or_empty(folder).get("figures") or {}
    value = trial.value
    if trial.outcome is None and (values := read_metric_values(folder, metric)):
        value = values[-1]
    return TrialRecord(
        number=trial.number,
        parameters=trial.parameters,
        value=value,
        state=trial.outcome.value if trial.outcome else "running",
        folder=folder,
        seconds=figures.get("seconds", trial.seconds),
        note=get_failure_reason(folder, metric) if trial.outcome is TrialOutcome.failed else "",
    )


def get_failure_reason(folder: Path, metric: str) -> str:
    """Return in one line why a trial failed."""
    if not is_finished(folder):
        return read_last_lines(folder)
    metrics = read_metrics(folder / "metrics.csv")
    if metric in metrics:
        return f"{metric} is {metrics[metric][-1][1]}."
    hint = format_suggestion(find_nearest(metric, list(metrics)))
    return f"it never logged {metric}; it logged {', '.join(sorted(metrics)) or 'nothing'}.{hint}"


def format_parameters(parameters: dict[str, Any], search: Search) -> str:
    """Format the values of the search space in one line."""
    return ", ".join(f"{key}={value}" for key, value in parameters.items() if key in search.sweep.search_space)
