"""Chains of SIGKILLs at random moments, saves included: `python tests/tasks/kill_chain.py [kills] [seed]`.

Each chain is a run that is started, killed and started again until it ends. A chain that ends before all its kills
starts again under another name. Its last state and its metrics must equal those of an undisturbed run, bit by bit. Its
folder must never lose a checkpoint, and must hold no additional file at the end.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from resume_cases import (
    StartedRun,
    build_overrides,
    is_same_state,
    list_leftovers,
    open_run,
    read_last_state,
    read_metrics,
    run_undisturbed,
    start,
)
from run_helpers import TWO
from waiting import PATIENCE

from lit_vlm.checkpoint.folder import CheckpointFolder
from lit_vlm.checkpoint.resume import check_files, read_index

# stage, loader workers, ranks
CHAINS = [
    ("align", 0, 1),
    ("align", 2, 1),
    ("align", 0, 2),
    ("sft", 0, 1),
    ("sft", 2, 1),
    ("sft", 2, 2),
    ("highres", 0, 1),
    ("highres", 2, 1),
    ("highres", 0, 2),
    ("dpo", 0, 1),
    ("dpo", 2, 1),
    ("dpo", 0, 2),
]
STEPS, KILLS_A_RUN = 18, 6
HEADING = "stage    workers ranks  runs kills  in a save  before a step  identical"


@dataclass
class Chain:
    stage: str
    workers: int
    ranks: int
    runs: int = 0
    kills: int = 0
    in_a_save: int = 0  # kills that left a draft or a half-removed checkpoint
    before_a_step: int = 0  # kills before training began
    faults: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.stage}_{self.workers}_{self.ranks}"

    def format_row(self) -> str:
        counts = f"{self.stage:8} {self.workers:7} {self.ranks:5} {self.runs:5} {self.kills:5}"
        identical = f"{self.runs} of {self.runs}" if not self.faults else f"NO: {self.faults}"
        return f"{counts} {self.in_a_save:10} {self.before_a_step:14}  {identical}"


def run_chains(
    folder: Path, kills: int = 100, seed: int = 0, chains: list[tuple[str, int, int]] = CHAINS
) -> list[Chain]:
    """Run all chains with `kills` kills, spread evenly over them."""
    rng, finished_chains = Random(seed), [Chain(*one) for one in chains]
    print(HEADING, flush=True)
    for number, chain in enumerate(finished_chains):
        run_chain(chain, folder, kills * (number + 1) // len(chains) - kills * number // len(chains), rng)
        print(chain.format_row(), flush=True)
    total = f"{len(finished_chains)} chains, {sum(c.kills for c in finished_chains)} kills, {sum(c.in_a_save for c in finished_chains)} in a save"
    print(f"{total}; identical: {sum(not c.faults for c in finished_chains)} of {len(finished_chains)}", flush=True)
    return finished_chains


def run_chain(chain: Chain, folder: Path, kills: int, rng: Random) -> None:
    overrides = build_overrides(folder, chain.stage, *(TWO if chain.ranks > 1 else []), f"trainer.max_steps={STEPS}")
    overrides += [f"data.num_workers={chain.workers}", "checkpoint.keep_last=2"]
    saves = [f"checkpoint.every_steps={rng.choice((1, 1, 2, 3))}"]
    saves.append(f"checkpoint.asynchronous={str(rng.random() < 0.7).lower()}")
    seconds = run_undisturbed_chain(chain, folder, [*overrides, *saves])
    while chain.kills < kills and not chain.faults:
        chain.runs += 1
        name = f"{chain.name}_{chain.runs}"
        run_attempt(chain, folder, [*overrides, *saves, f"run_name={name}"], name, kills, seconds, rng)


def run_undisturbed_chain(chain: Chain, folder: Path, overrides: list[str]) -> float:
    """Run the chain without a kill. Return the seconds of its training."""
    name = f"{chain.name}_whole"
    if chain.ranks == 1:  # once in this process, so that the forked children need no imports
        run_undisturbed([*overrides, f"run_name={name}_imports"], folder)
    started = start([*overrides, f"run_name={name}"], folder, chain.ranks)
    wait_for_training(started)
    start_time = time.monotonic()
    assert set(started.wait(PATIENCE)) == {0}, started.read_output()
    return time.monotonic() - start_time


def run_attempt(
    chain: Chain, folder: Path, overrides: list[str], name: str, kills: int, seconds: float, rng: Random
) -> None:
    """Run one run to its end, with kills on the way."""
    checkpoints = CheckpointFolder(folder / "runs" / name / "checkpoints")
    newest = 0
    while True:
        started = start(overrides, folder, chain.ranks)
        is_last_start = chain.kills >= kills
        codes = started.wait(PATIENCE) if is_last_start else kill(started, checkpoints, seconds, rng)
        resumed = re.search(r"resumes at step (\d+)", started.read_output())
        if resumed and int(resumed[1]) != newest:
            chain.faults.append(f"{name}: went on at {resumed[1]} and not at {newest}")
        if set(codes) == {0}:
            break
        if is_last_start or -9 not in codes:
            chain.faults.append(f"{name}: ended with {codes}: {started.read_output()[-2000:]}")
            return
        chain.kills += 1
        chain.before_a_step += "samples," not in started.read_output()
        chain.in_a_save += bool(list_drafts(checkpoints))
        newest = check_checkpoints(chain, checkpoints, newest)
    compare(chain, folder, name)


def kill(started: StartedRun, checkpoints: CheckpointFolder, seconds: float, rng: Random) -> list[int]:
    """Kill the run at a random moment, and return the exit codes.

    Mostly the moment lies in training, of these a third of the time in a save. Sometimes it is any moment since the start.
    Of two ranks, one or both are killed.
    """
    aim = rng.random()
    if aim < 0.85:
        wait_for_training(started)
    time.sleep(rng.uniform(0, 2 * seconds / KILLS_A_RUN))
    end = time.monotonic() + seconds
    while aim < 0.3 and not list_drafts(checkpoints) and time.monotonic() < end:
        time.sleep(0.001)
    all_ranks = range(len(started.pids))
    started.kill(*rng.choice([*([rank] for rank in all_ranks), [*all_ranks]]))
    return started.wait(PATIENCE)


def wait_for_training(started: StartedRun) -> None:
    """Wait until the run has printed what it trains, which is its last line before the first step."""
    end = time.monotonic() + PATIENCE
    while "samples," not in started.read_output() and time.monotonic() < end:
        if os.waitid(os.P_PID, started.pids[0], os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return
        time.sleep(0.01)


def list_drafts(checkpoints: CheckpointFolder) -> list[str]:
    entries = checkpoints.path.iterdir() if checkpoints.path.is_dir() else ()
    return [entry.name for entry in entries if entry.name.startswith(".")]


def check_checkpoints(chain: Chain, checkpoints: CheckpointFolder, before: int) -> int:
    """Check that every checkpoint is whole and none is lost. Return the newest step."""
    steps = checkpoints.list_steps()
    for step in steps:
        check_files(checkpoints.get_step_path(step), read_index(checkpoints.get_step_path(step)))
    newest = steps[0] if steps else 0
    if newest < before:
        chain.faults.append(f"step {before} is lost; there are {steps}")
    return newest


def compare(chain: Chain, folder: Path, name: str) -> None:
    undisturbed = f"{chain.name}_whole"
    if not is_same_state(read_last_state(folder, undisturbed), read_last_state(folder, name)):
        chain.faults.append(f"{name}: another last state")
    if read_metrics(folder, undisturbed) != read_metrics(folder, name):
        chain.faults.append(f"{name}: other metrics")
    if list_leftovers(folder, name) or list_files(folder, undisturbed) != list_files(folder, name):
        chain.faults.append(
            f"{name}: other files: {list_leftovers(folder, name)} {list_files(folder, name) ^ list_files(folder, undisturbed)}"
        )


def list_files(folder: Path, name: str) -> set[str]:
    run_folder = open_run(folder, name).dir
    return {str(path.relative_to(run_folder)) for path in run_folder.rglob("*")}


if __name__ == "__main__":
    number, seed = (int(word) for word in (*sys.argv[1:], *("100", "0")[len(sys.argv) - 1 :]))
    with tempfile.TemporaryDirectory() as place:
        sys.exit(any(chain.faults for chain in run_chains(Path(place), number, seed)))
