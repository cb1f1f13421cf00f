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
from dataclasses import replace
from pathlib import Path

import yaml

from lit_vlm.sweep.report import SweepReport, make_trial_table, write_sweep_report
from lit_vlm.sweep.results import TrialRecord
from lit_vlm.sweep.sweep_file import SweepFile, format_trial_command, read_sweep
from lit_vlm.tasks.terminal import console, say
from sweeps.wandb_server import LoopbackServer, RunState
from sweeps.wandb_server.state import ENDED

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "runs" / "sweep-demo"
BESIDE = Path(sys.executable).parent  # wandb, and the python that the runs are to use


def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    file = copy_sweep_file(ROOT / "sweeps" / "tiny.yaml")
    with LoopbackServer() as server:
        print(f"A server for W&B's client: {server.url}", flush=True)
        print_and_run(server, ["wandb", "sweep", str(file.relative_to(ROOT))])
        (sweep,) = server.sweeps
        command = ["wandb", "agent", server.path(sweep)]
        log = FOLDER / "agent.log"
        print(f"$ {' '.join(command)}   (what it says: {log.relative_to(ROOT)})", flush=True)
        with log.open("w", encoding="utf-8") as stream:
            agent = start(server, command, stdout=stream, stderr=subprocess.STDOUT)
            try:
                seconds = follow(server, sweep, agent)
            finally:
                if agent.poll() is None:
                    agent.terminate()
        show(read_sweep(file), server.state.list_runs(sweep), seconds)


def copy_sweep_file(file: Path) -> Path:
    """Copy the sweep file, with runs kept in the folder of the demo."""
    plain = yaml.safe_load(file.read_text(encoding="utf-8"))
    plain["parameters"]["run_dir"] = {"value": str(FOLDER / "runs")}
    copy = FOLDER / file.name
    copy.write_text(yaml.safe_dump(plain, allow_unicode=True, sort_keys=False), encoding="utf-8")
    return copy


def start(server: LoopbackServer, words: list[str], **streams) -> subprocess.Popen:
    """Start a W&B command that knows no other server than this one."""
    environment = server.environment(
        HOME=str(FOLDER),
        WANDB_DIR=str(FOLDER),
        PATH=f"{BESIDE}{os.pathsep}{os.environ['PATH']}",
        VIRTUAL_ENV=str(BESIDE.parent),
        WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL="1",
    )
    return subprocess.Popen([str(BESIDE / words[0]), *words[1:]], cwd=ROOT, env=environment, **streams)


def print_and_run(server: LoopbackServer, words: list[str]) -> None:
    print(f"$ {' '.join(words)}", flush=True)
    if start(server, words).wait():
        sys.exit(f"{' '.join(words)} failed.")


def follow(server: LoopbackServer, sweep: str, agent: subprocess.Popen) -> dict[str, float]:
    """Print a line for each run that ends while the agent works, and return the seconds of each run."""
    begun: dict[str, float] = {}
    took: dict[str, float] = {}
    while True:
        alone = agent.poll() is not None
        for run in list(server.state.list_runs(sweep)):
            begun.setdefault(run.name, time.monotonic())
            if run.name not in took and (alone or run.state in ENDED):
                took[run.name] = time.monotonic() - begun[run.name]
                print("  ".join(iter_run_columns(server.sweeps[sweep].file, run, took[run.name])), flush=True)
        if alone:
            return took
        time.sleep(0.2)


def iter_run_columns(sweep: SweepFile, run: RunState, seconds: float) -> Iterator[str]:
    yield run.name
    yield from (f"{key}={run.parameters[key]}" for key in sweep.search_space)
    values = run.values(sweep.metric.name)
    yield f"{sweep.metric.name} {values[-1]:.4f}" if values else "no value"
    yield f"{'stopped early' if run.stop else run.state}, {seconds:.0f} s"


def show(sweep: SweepFile, runs: list[RunState], seconds: dict[str, float]) -> None:
    """Print the table, the importance and the best command, and write the page."""
    records = [make_trial_record(sweep, run, seconds.get(run.name)) for run in runs]
    page = SweepReport(sweep, records, total=sweep.run_cap)
    if page.best is None:
        sys.exit(f"No run finished; {FOLDER / 'agent.log'} says why.")
    values = {key: value for key, value in page.best.parameters.items() if key != "run_dir"}
    page = replace(page, command=format_trial_command(sweep, values, []))
    write_sweep_report(FOLDER / "sweep.html", page)
    console.print(make_trial_table(page))
    say(f"Best: trial {page.best.number}, {page.metric} {page.best.value:.5g}, in {page.best.folder}")
    say(f"  {page.command}")
    say(f"Page: {FOLDER / 'sweep.html'}")


def make_trial_record(sweep: SweepFile, run: RunState, seconds: float | None) -> TrialRecord:
    values = run.values(sweep.metric.name)
    state = run.state if run.state == "finished" else "failed"
    return TrialRecord(
        number=run.number,
        parameters=run.parameters,
        value=values[-1] if values else None,
        state="stopped" if run.stop else state,
        folder=next((FOLDER / "runs").glob(f"**/*-{run.name}"), FOLDER),
        seconds=seconds,
    )


if __name__ == "__main__":
    main()
