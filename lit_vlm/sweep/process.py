"""Process of one trial: start it in its folder, stop it after it saved a checkpoint, read its metric while it runs."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from lit_vlm.engine.report_data import read_metrics
from lit_vlm.engine.run_folder import read_manifest_or_empty
from lit_vlm.engine.slurm import get_own_job, send_signal
from lit_vlm.files import write_text_atomically

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
