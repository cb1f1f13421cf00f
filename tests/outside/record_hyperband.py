"""Record which trials W&B's public `sweeps` stops, and after which value: python record_hyperband.py OUT

It runs in a separate environment (`pip install sweeps==0.2.0`) and imports nothing from this project. Synthetic curves are
logged value by value, one trial after the other or interleaved; after each value every running trial is checked.
"""

import json
import math
import random
import sys

from sweeps.hyperband_stopping import hyperband_stop_runs
from sweeps.run import RunState, SweepRun

SETTINGS = [
    {"min_iter": 1},
    {"min_iter": 2, "eta": 3},
    {"min_iter": 3, "eta": 2},
    {"min_iter": 2, "eta": 2.5},
    {"min_iter": 2, "eta": 1.3},
    {"max_iter": 27, "s": 2, "eta": 3},
    {"max_iter": 16, "s": 3, "eta": 2},
    {"max_iter": 20, "s": 9, "eta": 3},
    {"max_iter": 11, "s": 2, "eta": 2.2},
]
TRIALS, VALUES = 14, 24


def make_curves(seed: int, goal: str) -> list[list[float]]:
    """Make one curve for each trial; some rise again, and one contains NaN."""
    rng = random.Random(seed)
    curves = []
    for number in range(TRIALS):
        floor, slope, again = rng.uniform(0.2, 2.0), rng.uniform(1, 9), rng.choice([0.0, 0.0, 0.03])
        curve = [floor + 3 * math.exp(-place / slope) + again * place + rng.gauss(0, 0.1) for place in range(VALUES)]
        if number == 5:
            curve[1] = curve[4] = math.nan
        curves.append([round(-value if goal == "maximize" else value, 4) for value in curve])
    return curves


def record(settings: dict, goal: str, in_turns: bool, seed: int) -> dict:
    """Log the curves; record after how many values each trial was stopped, None if it was not."""
    config = {
        "method": "random",
        "metric": {"name": "m", "goal": goal},
        "early_terminate": {"type": "hyperband", **settings},
        "parameters": {"a": {"min": 0.0, "max": 1.0}},
    }
    curves = make_curves(seed, goal)
    runs = [SweepRun(name=str(number), state=RunState.pending, history=[]) for number in range(TRIALS)]
    stopped: list[int | None] = [None] * TRIALS
    events = [number for number in range(TRIALS) for _ in range(VALUES)]
    if in_turns:
        random.Random(seed + 1).shuffle(events)
    done = []
    for number in events:
        run = runs[number]
        if stopped[number] is not None:
            continue
        run.state = RunState.running
        run.history.append({"m": curves[number][len(run.history)]})
        done.append(number)
        for behind in hyperband_stop_runs(runs, config):
            behind.state = RunState.killed
            stopped[int(behind.name)] = len(behind.history)
        if run.state == RunState.running and len(run.history) == VALUES:
            run.state = RunState.finished
    return {"early_terminate": settings, "goal": goal, "curves": curves, "events": done, "stopped": stopped}


def main() -> None:
    cases = [
        record(settings, "maximize" if place % 3 == 2 else "minimize", in_turns, seed=10 * place + in_turns)
        for place, settings in enumerate(SETTINGS)
        for in_turns in (False, True)
    ]
    with open(sys.argv[1], "w", encoding="utf-8") as file:
        file.write("[\n" + ",\n".join(json.dumps(case) for case in cases) + "\n]\n")


if __name__ == "__main__":
    main()
