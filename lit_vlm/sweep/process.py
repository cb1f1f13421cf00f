"""One trial as a process: started in its folder, asked to save and leave, its metric read as it grows."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from lit_vlm.engine.report_data import read_metrics
from lit_vlm.engine.run_folder import find_manifest
from lit_vlm.engine.slurm import own_job, signal_steps
from lit_vlm.files import write_atomically

LOG, NUMBER = "trial.log", "trial.pid"
SAVING_SECONDS = 300.0  # that a trial of an earlier start is given to save and leave
AGAIN_SECONDS = 20.0
_SWEEPS_OWN = ("WANDB_RUN_ID", "WANDB_SWEEP_ID", "WANDB_SWEEP_PARAM_PATH")  # a trial of ours is nobody else's


@dataclass(slots=True)
class TrialProcess:
    """A trial that runs.

    Attributes:
        devices: CUDA devices that it sees; empty: it is not told.
        in_step: it was started by srun, through which it is asked to leave.
        stopping: others are better, so it was asked to leave.
        leaving: it was asked to leave, for whatever reason.
        starts: how often it was started here.
    """

    number: int
    parameters: dict[str, Any]
    folder: Path
    command: list[str]
    environment: dict[str, str]
    devices: tuple[str, ...] = ()
    in_step: bool = False
    stopping: bool = False
    leaving: bool = False
    starts: int = 0
    _asked: float = 0.0
    _process: subprocess.Popen[bytes] | None = None
    _read: tuple[int, int] = (0, 0)  # time and size of the table when it was read
    _values: list[float] = field(default_factory=list)

    def start(self) -> None:
        """Start it, its output behind what is in its log already. It gets no Ctrl-C from the terminal: that is passed on."""
        self.folder.mkdir(parents=True, exist_ok=True)
        environment = {name: value for name, value in self.environment.items() if name not in _SWEEPS_OWN}
        if self.devices:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(self.devices)
        with (self.folder / LOG).open("ab") as log:
            self._process = _started(self.command, {**environment, "PYTHONUNBUFFERED": "1"}, log)
        self.starts += 1
        write_atomically(self.folder / NUMBER, f"{self._process.pid}\n", durable=False)

    def ended(self) -> int | None:
        """Its exit status; None while it runs."""
        assert self._process is not None
        return self._process.poll()

    def ask_to_leave(self) -> None:
        """It saves and leaves: docs/resume.md. A step is asked again after a while: it may not have begun."""
        if self.leaving and not (self.in_step and time.monotonic() - self._asked > AGAIN_SECONDS):
            return
        self.leaving, self._asked = True, time.monotonic()
        job = own_job()
        if self.in_step and job:
            signal_steps(job, "TERM")
        elif self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it and all that it started, at once."""
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)

    def values(self, metric: str) -> list[float] | None:
        """All values of the metric so far; None while nothing was written since the last call."""
        try:
            found = (self.folder / "metrics.csv").stat()
        except FileNotFoundError:
            return None
        if (found.st_mtime_ns, found.st_size) == self._read:
            return None
        self._read = (found.st_mtime_ns, found.st_size)
        self._values = values_in(self.folder, metric)
        return self._values


def values_in(folder: Path, metric: str) -> list[float]:
    """All values of a metric that the run in this folder has logged."""
    return [value for _, value in read_metrics(folder / "metrics.csv").get(metric, [])]


def is_finished(folder: Path) -> bool:
    return find_manifest(folder).get("status") == "finished"


def last_lines(folder: Path, count: int = 1) -> str:
    """The last words of a trial's log, where an error stands."""
    try:
        text = (folder / LOG).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "it left no log"
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    return "\n".join(lines[-count:]) or "its log is empty"


def end_left_behind(folder: Path) -> None:
    """Where an earlier sweep was killed its trials live on: the one of this folder saves and leaves before it is begun anew."""
    try:
        number = int((folder / NUMBER).read_text())
    except (OSError, ValueError):
        return
    until = time.monotonic() + SAVING_SECONDS
    if not _is_trial(number, folder):
        return
    os.kill(number, signal.SIGTERM)
    while _is_trial(number, folder) and time.monotonic() < until:
        time.sleep(0.1)


def _is_trial(number: int, folder: Path) -> bool:
    """Whether this process, of this machine, runs the trial of this folder; numbers are used again."""
    try:
        words = Path(f"/proc/{number}/cmdline").read_bytes().split(b"\0")
    except OSError:  # gone, or a system without /proc
        return False
    name = f"/{folder.parent.name}/{folder.name}".encode()
    return any(word.startswith(b"run_name=") and word.rstrip(b"'").endswith(name) for word in words)


def _started(command: list[str], environment: dict[str, str], log: IO[bytes]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
