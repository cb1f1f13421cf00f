"""`make sweep-demo`: a W&B sweep without an account. The server runs on this machine; `wandb sweep` and `wandb agent` are the real ones.

Twelve runs of the tiny model (sweeps/tiny.yaml), some minutes on a CPU. Everything lies in runs/sweep-demo/ afterwards: the runs,
what the agent said, and the page with the picture of the sweep.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import yaml
from lit_vlm.sweep.record import TrialRecord
from lit_vlm.sweep.report import print_report, write_report

from lit_vlm.sweep.file import SweepFile, read_sweep
from lit_vlm.sweep.loopback import Loopback, RunState

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "runs" / "sweep-demo"
BESIDE = Path(sys.executable).parent  # wandb, and the python that the runs are to use


def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    file = own_copy(ROOT / "sweeps" / "tiny.yaml")
    with Loopback() as server:
        print(f"A server for W&B's client: {server.url}", flush=True)
        say_and_run(server, ["wandb", "sweep", str(file.relative_to(ROOT))])
        (sweep,) = server.sweeps
        command = ["wandb", "agent", server.path(sweep)]
        log = FOLDER / "agent.log"
        print(f"$ {' '.join(command)}   (what it says: {log.relative_to(ROOT)})", flush=True)
        with log.open("w", encoding="utf-8") as stream:
            agent = start(server, command, stdout=stream, stderr=subprocess.STDOUT)
            try:
                follow(server, sweep, agent)
            finally:
                agent.terminate() if agent.poll() is None else None
        runs = server.state.runs_of(sweep)
        show(read_sweep(file), runs)
    if not any(run.state == "finished" for run in runs):
        sys.exit(f"No run finished; {log} says why.")


def own_copy(file: Path) -> Path:
    """The sweep file with runs kept in the demo's folder."""
    plain = yaml.safe_load(file.read_text(encoding="utf-8"))
    plain["parameters"]["run_dir"] = {"value": str(FOLDER / "runs")}
    copy = FOLDER / file.name
    copy.write_text(yaml.safe_dump(plain, allow_unicode=True, sort_keys=False), encoding="utf-8")
    return copy


def start(server: Loopback, words: list[str], **streams) -> subprocess.Popen:
    """A command of W&B's that knows this server alone."""
    environment = server.environment(
        HOME=str(FOLDER),
        WANDB_DIR=str(FOLDER),
        PATH=f"{BESIDE}{os.pathsep}{os.environ['PATH']}",
        VIRTUAL_ENV=str(BESIDE.parent),
        WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL="1",
    )
    return subprocess.Popen([str(BESIDE / words[0]), *words[1:]], cwd=ROOT, env=environment, **streams)


def say_and_run(server: Loopback, words: list[str]) -> None:
    print(f"$ {' '.join(words)}", flush=True)
    if start(server, words).wait():
        sys.exit(f"{' '.join(words)} failed.")


def follow(server: Loopback, sweep: str, agent: subprocess.Popen) -> None:
    """A line for each run that ends, while the agent works."""
    told: set[str] = set()
    begun: dict[str, float] = {}
    while agent.poll() is None or told < {run.name for run in server.state.runs_of(sweep)}:
        for run in list(server.state.runs_of(sweep)):
            begun.setdefault(run.name, time.monotonic())
            if run.name not in told and (run.state in ("finished", "failed", "crashed") or agent.poll() is not None):
                told.add(run.name)
                print(
                    "  ".join(words_about(server.sweeps[sweep].file, run, time.monotonic() - begun[run.name])),
                    flush=True,
                )
        time.sleep(0.2)


def words_about(sweep: SweepFile, run: RunState, seconds: float) -> Iterator[str]:
    yield run.name
    yield from (f"{key}={run.parameters[key]}" for key in sweep.swept)
    values = run.values(sweep.metric.name)
    yield f"{sweep.metric.name} {values[-1]:.4f}" if values else "no value"
    yield f"{'stopped early' if run.stop else run.state}, {seconds:.0f} s"


def show(sweep: SweepFile, runs: list[RunState]) -> None:
    """Table, importance, best command; and the page."""
    records = [record_of(sweep, run) for run in runs]
    print_report(sweep, records)
    page = FOLDER / "sweep.html"
    write_report(page, sweep, records)
    print(f"Picture of the sweep: {page.relative_to(ROOT)}", flush=True)


def record_of(sweep: SweepFile, run: RunState) -> TrialRecord:
    values = run.values(sweep.metric.name)
    return TrialRecord(
        number=run.number,
        parameters=run.parameters,
        value=values[-1] if values else None,
        state="stopped" if run.stop else run.state,
        folder=next((FOLDER / "runs").glob(f"**/*-{run.name}"), None),
        seconds=None,
    )


if __name__ == "__main__":
    main()
