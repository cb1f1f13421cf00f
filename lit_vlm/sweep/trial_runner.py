"""Process of one trial: start it in its folder, stop it after it saved a checkpoint, read its metric while it runs."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO, Any

from lit_vlm.cluster.slurm import get_own_job, send_signal
from lit_vlm.fault_tolerance.exit_status import RESTART
from lit_vlm.fault_tolerance.signals import DUPLICATE_SIGNAL_SECONDS, STOP_REQUESTS, StopRequest, get_signal_handler
from lit_vlm.files import write_text_atomically
from lit_vlm.reports.run_record import read_metrics
from lit_vlm.runs.run_folder import read_manifest_or_empty
from lit_vlm.sweep.results import TrialRecord
from lit_vlm.sweep.search import Search, Trial, TrialOutcome
from lit_vlm.sweep.sweep_file import Goal
from lit_vlm.types import UserError, find_nearest, format_suggestion

LOG_FILE, PID_FILE = "trial.log", "trial.pid"
SAVE_TIMEOUT_SECONDS = 300.0  # for a trial of an earlier start to save and exit
SIGNAL_RETRY_SECONDS = 20.0
_WANDB_SWEEP_VARIABLES = (
    "WANDB_RUN_ID",
    "WANDB_SWEEP_ID",
    "WANDB_SWEEP_PARAM_PATH",
)  # our trials must not belong to a W&B sweep


@dataclass(slots=True)
class TrialProcess:
    """Process of a trial.

    Attributes:
        devices: CUDA devices that it sees; empty: CUDA_VISIBLE_DEVICES is not changed.
        is_slurm_step: it was started by srun; its stop signal is sent through Slurm.
        is_early_stopped: early stopping ended it.
        is_stopping: a stop signal was sent, for any reason.
        num_starts: number of starts in this process.
    """

    number: int
    parameters: dict[str, Any]
    folder: Path
    command: list[str]
    environment: dict[str, str]
    devices: tuple[str, ...] = ()
    is_slurm_step: bool = False
    is_early_stopped: bool = False
    is_stopping: bool = False
    num_starts: int = 0
    _stop_sent_at: float = 0.0
    _process: subprocess.Popen[bytes] | None = None
    _metrics_stat: tuple[int, int] = (0, 0)  # time and size of metrics.csv when it was read
    _values: list[float] = field(default_factory=list)

    def start(self) -> None:
        """Start the process and append its output to its log. Ctrl-C of the terminal does not reach it; signals are forwarded."""
        self.folder.mkdir(parents=True, exist_ok=True)
        environment = {name: value for name, value in self.environment.items() if name not in _WANDB_SWEEP_VARIABLES}
        if self.devices:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(self.devices)
        with (self.folder / LOG_FILE).open("ab") as log:
            self._process = _start_process(self.command, {**environment, "PYTHONUNBUFFERED": "1"}, log)
        self.num_starts += 1
        write_text_atomically(self.folder / PID_FILE, f"{self._process.pid}\n", durable=False)

    def get_exit_status(self) -> int | None:
        """Return the exit status; None while the process runs."""
        assert self._process is not None
        return self._process.poll()

    def stop(self) -> None:
        """Send the stop signal: the trial saves a checkpoint and exits (docs/resume.md).

        A Slurm step gets the signal again after `SIGNAL_RETRY_SECONDS`, for it may not have started before.
        """
        if self.is_stopping and not (
            self.is_slurm_step and time.monotonic() - self._stop_sent_at > SIGNAL_RETRY_SECONDS
        ):
            return
        self.is_stopping, self._stop_sent_at = True, time.monotonic()
        job = get_own_job()
        if self.is_slurm_step and job:
            send_signal(job, "TERM")
        elif self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Kill the process and all its children at once."""
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)

    def read_values(self, metric: str) -> list[float] | None:
        """Read all values of the metric so far; None if nothing was written since the last call."""
        try:
            stat = (self.folder / "metrics.csv").stat()
        except FileNotFoundError:
            return None
        if (stat.st_mtime_ns, stat.st_size) == self._metrics_stat:
            return None
        self._metrics_stat = (stat.st_mtime_ns, stat.st_size)
        self._values = read_metric_values(self.folder, metric)
        return self._values


def read_metric_values(folder: Path, metric: str) -> list[float]:
    """Read all values of a metric that the run in this folder has logged, oldest first."""
    return [value for _, value in read_metrics(folder / "metrics.csv").get(metric, [])]


def is_finished(folder: Path) -> bool:
    """Return whether the run in this folder is finished."""
    return read_manifest_or_empty(folder).get("status") == "finished"


def read_last_lines(folder: Path, count: int = 1) -> str:
    """Read the last lines of a trial's log, where an error is printed."""
    try:
        text = (folder / LOG_FILE).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "it left no log"
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    return "\n".join(lines[-count:]) or "its log is empty"


def stop_orphaned_trial(folder: Path) -> None:
    """Stop the trial process of a killed sweep in this folder, and wait until it has saved a checkpoint and exited.

    It waits at most `SAVE_TIMEOUT_SECONDS`. Call it before the trial is started again.
    """
    try:
        pid = int((folder / PID_FILE).read_text())
    except (OSError, ValueError):
        return
    deadline = time.monotonic() + SAVE_TIMEOUT_SECONDS
    if not _is_trial_process(pid, folder):
        return
    os.kill(pid, signal.SIGTERM)
    while _is_trial_process(pid, folder) and time.monotonic() < deadline:
        time.sleep(0.1)


def _is_trial_process(pid: int, folder: Path) -> bool:
    """Return whether this process of this machine runs the trial of this folder. The system may reuse a process id."""
    try:
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:  # the process is gone, or the system has no /proc
        return False
    name = f"/{folder.parent.name}/{folder.name}".encode()
    return any(argument.startswith(b"run_name=") and argument.rstrip(b"'").endswith(name) for argument in arguments)


def _start_process(command: list[str], environment: dict[str, str], log: IO[bytes]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


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
                "When that is mended, the same command resumes with the trials that are left."
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
