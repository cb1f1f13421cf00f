"""Benchmark of the loggers: time that a tracker adds to an optimizer step of the tiny sft stage, logging each step.

    python -m benchmarks.tracking [--steps 120]

Each run of `run.py` has a separate process and another tracker besides the CSV table: W&B online (a server on the loopback
interface), W&B offline, and W&B with a server that fails after training has begun: its port refuses connections, or accepts
them and hangs. In each run the tracker logs only every second turn of five steps, so steps with and without it are measured
in the same process. The runs take turns, so that load of the machine affects all of them. Each step is compared with the same
step of a run with the CSV table alone, which has the same samples. The medians, also of the time inside the logger, go to
benchmarks/results/tracking.json with versions.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L

from lit_vlm.runs.run_folder import get_package_versions
from sweeps.wandb_server import LoopbackServer

ROOT = Path(__file__).resolve().parents[1]
OUT = Path(__file__).parent / "results" / "tracking.json"
TURN_STEPS, WARM_UP = 5, 10  # steps
OVERRIDES = ["experiment=tiny/2_sft", "init_from=null", "trainer.log_every_n_steps=1", "trainer.num_threads=1"]
OVERRIDES += ["data.num_workers=0", "data.validation.fraction=0", "checkpoint.every_minutes=null"]
OVERRIDES += ["callbacks=[throughput,guard,benchmarks.tracking.Paced]"]
READ_FD, WRITE_FD, TIMES_FILE = "LIT_VLM_PACE_READ", "LIT_VLM_PACE_WRITE", "LIT_VLM_PACE_TIMES"


class Paced(L.Callback):
    """Callback of a measured run: waits for its turn of steps, and records the seconds of each step."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.logging: list[float] = []
        self._start: float | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._trainer = trainer
        for logger in trainer.loggers[1:]:
            logger.log_metrics = self._wrap_log(logger.log_metrics)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx % trainer.accumulate_grad_batches:
            return
        if self._start is not None:
            self.steps.append(time.perf_counter() - self._start)
        if trainer.global_step % TURN_STEPS == 0:
            os.write(int(os.environ[WRITE_FD]), b".")
            os.read(int(os.environ[READ_FD]), 1)
        self._start = time.perf_counter()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        times = {"steps": self.steps, "logging": self.logging}
        Path(os.environ[TIMES_FILE]).write_text(json.dumps(times), encoding="utf-8")
        os.write(int(os.environ[WRITE_FD]), b"!")

    def _wrap_log(self, log: Any) -> Any:
        def log_and_measure(*arguments: Any, **named: Any) -> None:
            if not is_tracked(self._trainer.global_step - 1):  # Lightning logs after it has counted the step
                return
            start = time.perf_counter()
            log(*arguments, **named)
            self.logging.append(time.perf_counter() - start)

        return log_and_measure


def is_tracked(step: int) -> bool:
    """Return whether the tracker logs this step: in every second turn."""
    return step // TURN_STEPS % 2 == 1


@dataclass
class Runner:
    """Run in a subprocess, controlled by pipes."""

    name: str
    overrides: list[str]
    environment: dict[str, str]
    folder: Path
    running: bool = True
    _pipe_ends: list[int] = field(default_factory=list)

    def start(self, steps: int) -> None:
        """Start the run in a subprocess."""
        (own_read, run_write), (run_read, own_write) = os.pipe(), os.pipe()
        self._pipe_ends = [own_read, own_write]
        variables = {
            READ_FD: str(run_read),
            WRITE_FD: str(run_write),
            TIMES_FILE: str(self.folder / f"{self.name}.json"),
        }
        command = [sys.executable, "run.py", *OVERRIDES, *self.overrides, f"trainer.max_steps={steps}"]
        command += [f"run_dir={self.folder / 'runs'}", f"run_name={self.name}"]
        log = (self.folder / f"{self.name}.log").open("w")
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=self.environment | variables,
            pass_fds=(run_read, run_write),
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        os.close(run_read)
        os.close(run_write)

    def wait(self) -> None:
        """Wait until the run asks for a turn or has ended."""
        self.running = os.read(self._pipe_ends[0], 1) == b"."

    def start_turn(self) -> None:
        """Start a turn of steps."""
        os.write(self._pipe_ends[1], b".")

    def read_times(self) -> dict[str, list[float]]:
        """Read the recorded seconds."""
        return json.loads((self.folder / f"{self.name}.json").read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=120)
    steps = parser.parse_args().steps + WARM_UP
    with (
        tempfile.TemporaryDirectory() as folder,
        LoopbackServer() as server,
        LoopbackServer() as refusing,
        LoopbackServer() as hanging,
    ):
        runners = [
            Runner("alone", [], make_environment(server, folder), Path(folder)),
            Runner("online", ["logger=wandb"], make_environment(server, folder), Path(folder)),
            Runner("offline", ["logger=wandb", "logger.offline=true"], make_environment(server, folder), Path(folder)),
            Runner("refuses", ["logger=wandb"], make_environment(refusing, folder), Path(folder)),
            Runner("hangs", ["logger=wandb"], make_environment(hanging, folder), Path(folder)),
        ]
        for runner in runners:
            runner.start(steps)
            runner.wait()
        refusing.__exit__()
        hanging.answer = lambda *request: threading.Event().wait()  # type: ignore[method-assign]
        while any(runner.running for runner in runners):
            for runner in runners:
                if runner.running:
                    runner.start_turn()
                    runner.wait()
        for runner in runners:
            runner.process.wait()
        alone, *others = [runner.read_times() for runner in runners]
        rows = {runner.name: compute_figures(times, alone) for runner, times in zip(runners[1:], others, strict=True)}
    result = {"steps": steps - WARM_UP, "rows": rows, "versions": get_package_versions()}
    OUT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(rows, indent=2))


def make_environment(server: LoopbackServer, place: str) -> dict[str, str]:
    """Make the environment of a run with a W&B server on the loopback interface."""
    variables = {"HOME": place, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "HF_HUB_OFFLINE": "1"}
    return server.environment(**variables, WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL="1")


def compute_figures(times: dict[str, list[float]], alone: dict[str, list[float]]) -> dict[str, float]:
    """Compute milliseconds: a step with the table alone, the time that the tracker adds, and the time in the logger."""
    differences = [mine - other for mine, other in zip(times["steps"], alone["steps"], strict=True)]
    tracked = [seconds for step, seconds in enumerate(differences) if step >= WARM_UP and is_tracked(step)]
    untracked = [seconds for step, seconds in enumerate(differences) if step >= WARM_UP and not is_tracked(step)]
    added = statistics.median(tracked) - statistics.median(untracked)
    step = statistics.median(alone["steps"][WARM_UP:])
    logger_seconds = times["logging"][TURN_STEPS:]
    return {
        "step_ms": 1e3 * step,
        "added_ms": 1e3 * added,
        "added_share": added / step,
        "error_ms": 1e3 * math.hypot(compute_median_error(tracked), compute_median_error(untracked)),
        "in_logger_ms": 1e3 * statistics.median(logger_seconds),
        "in_logger_slowest_ms": 1e3 * max(logger_seconds),
    }


def compute_median_error(values: list[float]) -> float:
    """Compute the standard error of the median from the interquartile range (1.349 standard deviations of a normal)."""
    low, _, high = statistics.quantiles(values, n=4)
    return 1.2533 * (high - low) / 1.349 / math.sqrt(len(values))


if __name__ == "__main__":
    main()
