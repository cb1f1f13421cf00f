"""Chains of SIGKILLs at random moments, saves included: `python tests/tasks/kill_chain.py [kills] [seed]`.

Each chain is a run that is started, killed and started again until it ends; a chain that ends before it had its kills
begins again under another name. Its last state must be that of a run that was never killed, bit for bit, what it logged
the same, and its folder must at no moment have lost a checkpoint and in the end hold no file more.
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

from resume_cases import Start, last_state, rows, run_dir, same_state, start, strays, whole_run, words_of
from run_helpers import TWO
from waiting import PATIENCE

from lit_vlm.engine.checkpoint import CheckpointFolder, read_index
from lit_vlm.engine.checkpoint.read import check_files

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
    in_a_save: int = 0  # kills that left a draft, or a checkpoint that was being removed
    before_a_step: int = 0  # kills before training began
    faults: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.stage}_{self.workers}_{self.ranks}"

    def row(self) -> str:
        counts = f"{self.stage:8} {self.workers:7} {self.ranks:5} {self.runs:5} {self.kills:5}"
        said = f"{self.runs} of {self.runs}" if not self.faults else f"NO: {self.faults}"
        return f"{counts} {self.in_a_save:10} {self.before_a_step:14}  {said}"


def run_chains(
    folder: Path, kills: int = 100, seed: int = 0, chains: list[tuple[str, int, int]] = CHAINS
) -> list[Chain]:
    """So many kills, spread evenly over the chains."""
    dice, followed = Random(seed), [Chain(*one) for one in chains]
    print(HEADING, flush=True)
    for number, chain in enumerate(followed):
        follow(chain, folder, kills * (number + 1) // len(chains) - kills * number // len(chains), dice)
        print(chain.row(), flush=True)
    total = f"{len(followed)} chains, {sum(c.kills for c in followed)} kills, {sum(c.in_a_save for c in followed)} in a save"
    print(f"{total}; identical: {sum(not c.faults for c in followed)} of {len(followed)}", flush=True)
    return followed


def follow(chain: Chain, folder: Path, kills: int, dice: Random) -> None:
    words = words_of(folder, chain.stage, *(TWO if chain.ranks > 1 else []), f"trainer.max_steps={STEPS}")
    words += [f"data.num_workers={chain.workers}", "checkpoint.keep_last=2"]
    saves = [f"checkpoint.every_steps={dice.choice((1, 1, 2, 3))}"]
    saves.append(f"checkpoint.asynchronous={str(dice.random() < 0.7).lower()}")
    seconds = undisturbed(chain, folder, [*words, *saves])
    while chain.kills < kills and not chain.faults:
        chain.runs += 1
        name = f"{chain.name}_{chain.runs}"
        attempt(chain, folder, [*words, *saves, f"run_name={name}"], name, kills, seconds, dice)


def undisturbed(chain: Chain, folder: Path, words: list[str]) -> float:
    """The run that is never killed; seconds that its training takes."""
    name = f"{chain.name}_whole"
    if chain.ranks == 1:  # once in this process, so that its children have what it imports
        whole_run([*words, f"run_name={name}_imports"], folder)
    begun = start([*words, f"run_name={name}"], folder, chain.ranks)
    wait_for_training(begun)
    began = time.monotonic()
    assert set(begun.wait(PATIENCE)) == {0}, begun.said()
    return time.monotonic() - began


def attempt(chain: Chain, folder: Path, words: list[str], name: str, kills: int, seconds: float, dice: Random) -> None:
    """One run to its end, killed on the way."""
    checkpoints = CheckpointFolder(folder / "runs" / name / "checkpoints")
    newest = 0
    while True:
        begun = start(words, folder, chain.ranks)
        spare = chain.kills >= kills
        codes = begun.wait(PATIENCE) if spare else kill(begun, checkpoints, seconds, dice)
        went_on = re.search(r"goes on at step (\d+)", begun.said())
        if went_on and int(went_on[1]) != newest:
            chain.faults.append(f"{name}: went on at {went_on[1]} and not at {newest}")
        if set(codes) == {0}:
            break
        if spare or -9 not in codes:
            chain.faults.append(f"{name}: ended with {codes}: {begun.said()[-2000:]}")
            return
        chain.kills += 1
        chain.before_a_step += "samples," not in begun.said()
        chain.in_a_save += bool(strays_in(checkpoints))
        newest = whole_ones(chain, checkpoints, newest)
    compare(chain, folder, name)


def kill(begun: Start, checkpoints: CheckpointFolder, seconds: float, dice: Random) -> list[int]:
    """At a moment of its training, mostly; of these, a third once a save has begun; and now and then at any moment since its
    start. Of two ranks one, or both."""
    aim = dice.random()
    if aim < 0.85:
        wait_for_training(begun)
    time.sleep(dice.uniform(0, 2 * seconds / KILLS_A_RUN))
    end = time.monotonic() + seconds
    while aim < 0.3 and not strays_in(checkpoints) and time.monotonic() < end:
        time.sleep(0.001)
    everybody = range(len(begun.pids))
    begun.kill(*dice.choice([*([rank] for rank in everybody), [*everybody]]))
    return begun.wait(PATIENCE)


def wait_for_training(begun: Start) -> None:
    """Until what will be trained was said, which is the last thing before the first step."""
    end = time.monotonic() + PATIENCE
    while "samples," not in begun.said() and time.monotonic() < end:
        if os.waitid(os.P_PID, begun.pids[0], os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return
        time.sleep(0.01)


def strays_in(checkpoints: CheckpointFolder) -> list[str]:
    entries = checkpoints.path.iterdir() if checkpoints.path.is_dir() else ()
    return [entry.name for entry in entries if entry.name.startswith(".")]


def whole_ones(chain: Chain, checkpoints: CheckpointFolder, before: int) -> int:
    """The newest one; every one that has its name is whole, and none is lost."""
    steps = checkpoints.list_steps()
    for step in steps:
        check_files(checkpoints.get_step_path(step), read_index(checkpoints.get_step_path(step)))
    newest = steps[0] if steps else 0
    if newest < before:
        chain.faults.append(f"step {before} is lost; there are {steps}")
    return newest


def compare(chain: Chain, folder: Path, name: str) -> None:
    whole = f"{chain.name}_whole"
    if not same_state(last_state(folder, whole), last_state(folder, name)):
        chain.faults.append(f"{name}: another last state")
    if rows(folder, whole) != rows(folder, name):
        chain.faults.append(f"{name}: other metrics")
    if strays(folder, name) or files_of(folder, whole) != files_of(folder, name):
        chain.faults.append(
            f"{name}: other files: {strays(folder, name)} {files_of(folder, name) ^ files_of(folder, whole)}"
        )


def files_of(folder: Path, name: str) -> set[str]:
    place = run_dir(folder, name).dir
    return {str(path.relative_to(place)) for path in place.rglob("*")}


if __name__ == "__main__":
    number, seed = (int(word) for word in (*sys.argv[1:], *("100", "0")[len(sys.argv) - 1 :]))
    with tempfile.TemporaryDirectory() as place:
        sys.exit(any(chain.faults for chain in run_chains(Path(place), number, seed)))
