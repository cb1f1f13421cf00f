"""Which value of a stopped trial teaches the search most: a replay on curves like those of preference training.

    python -m benchmarks.stopped_trials [--seeds 20]

`sweeps/dpo.yaml` as it stands, 30 trials, four at a time, each of up to 12 validations of a made model: its accuracy rises
faster with a larger rate and falls apart with one that is too large. What a stopped trial teaches is one of: nothing
(Optuna's own way with pruned trials), its last value, its best value, its value at the rung where it was compared. Beside them
the same without stopping. Figures go to benchmarks/results/stopped_trials.json.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from optuna.samplers import GPSampler

from lit_vlm.sweep.file import SweepFile, read_sweep
from lit_vlm.sweep.search import Search

ROOT = Path(__file__).resolve().parents[1]
OUT = Path(__file__).parent / "results" / "stopped_trials.json"
VALUES = 12  # that a trial logs which is not stopped
LOSSES = {"sigmoid": 0.0, "ipo": -0.02, "hinge": -0.01}
WEIGHTS = {(1.0, 0.0, 0.0): -0.015, (1.0, 0.0, 0.5): -0.005, (0.8, 0.2, 0.0): -0.01, (0.8, 0.2, 1.0): 0.0}
BEST = 0.78  # of all settings, at the end


def compute_accuracies(parameters: dict[str, Any]) -> list[float]:
    """Compute what a trial would log, without noise."""
    rate, beta = math.log10(parameters["stage.learning_rate"]), math.log10(parameters["stage.beta"])
    loss, weights = LOSSES[parameters["stage.loss_type"][0]], WEIGHTS[tuple(parameters["stage.loss_weights"])]
    end = max(0.5, BEST - 0.10 * (rate + 5.9) ** 2 - 0.06 * (beta + 1) ** 2 + loss + weights)
    slowness = 2.5 * 10 ** (-0.6 * (rate + 5.9))
    whole = 1 - math.exp(-VALUES / slowness)
    rise = [0.5 + (end - 0.5) * (1 - math.exp(-(place + 1) / slowness)) / whole for place in range(VALUES)]
    falls = 0.25 * max(0.0, rate + 5.55)  # too large a rate: good at first, then worse
    return [max(0.45, value - falls * place / VALUES) for place, value in enumerate(rise)]


def observe_noise(parameters: dict[str, Any], number: int, seed: int) -> list[float]:
    """Draw what a trial logs: its accuracies on some hundred held-out pairs."""
    noise = np.random.default_rng([seed, number]).normal(0, 0.006, VALUES)
    return [value + float(draw) for value, draw in zip(compute_accuracies(parameters), noise, strict=True)]


def choose_last(values: list[float], rungs: tuple[int, ...]) -> float:
    return values[-1]


def choose_best(values: list[float], rungs: tuple[int, ...]) -> float:
    return max(values)


def choose_at_rung(values: list[float], rungs: tuple[int, ...]) -> float:
    return values[max(rung for rung in rungs if rung < len(values))]


def choose_nothing(values: list[float], rungs: tuple[int, ...]) -> None:
    return None


Lesson = Callable[[list[float], tuple[int, ...]], float | None]
LESSONS: dict[str, Lesson] = {
    "nothing": choose_nothing,
    "last": choose_last,
    "best": choose_best,
    "at its rung": choose_at_rung,
}


def replay(sweep: SweepFile, lesson: Lesson, seed: int, at_a_time: int = 4) -> dict[str, float]:
    """Run a whole search on made curves.

    Returns:
        `regret` of the finished trial that a user would take, without noise; `by_model`: trials whose values the model
        chose; `finished`: trials that were not stopped; `values`: what was logged in all.
    """
    search = Search(sweep, seed=seed)
    logged: dict[int, list[float]] = {}
    under_way: dict[int, list[float]] = {}
    best, regret, finished = -math.inf, math.inf, 0
    with CountedModel() as model:
        while True:
            while len(under_way) < at_a_time and (given := search.ask()) is not None:
                under_way[given.number] = observe_noise(given.parameters, given.number, seed)
                logged[given.number] = []
            if not under_way:
                break
            for number, curve in list(under_way.items()):
                values = logged[number]
                values.append(curve[len(values)])
                stops, ends = search.observe(number, values), len(values) == VALUES
                if ends:
                    search.tell(number, values[-1], "finished")
                    finished += 1
                    if values[-1] > best:
                        best = values[-1]
                        regret = BEST - compute_accuracies(search.trials()[number].parameters)[-1]
                elif stops:
                    rungs = sweep.early_terminate.rungs if sweep.early_terminate else ()
                    search.tell(number, lesson(values, rungs), "stopped")
                if stops or ends:
                    del under_way[number]
    return {
        "regret": regret,
        "by_model": model.count,
        "finished": finished,
        "values": sum(map(len, logged.values())),
    }


class CountedModel:
    """Counts the trials whose values came from the Gaussian process and not by chance."""

    def __enter__(self) -> CountedModel:
        self.count, self._before = 0, GPSampler.sample_relative
        before = self._before

        def sample(sampler: GPSampler, *arguments: Any) -> dict[str, Any]:
            found = before(sampler, *arguments)
            self.count += bool(found)
            return found

        GPSampler.sample_relative = sample  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        GPSampler.sample_relative = self._before  # type: ignore[method-assign]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20)
    seeds = range(parser.parse_args().seeds)
    sweep = read_sweep(ROOT / "sweeps" / "dpo.yaml")
    ways = {name: (sweep, lesson) for name, lesson in LESSONS.items()}
    ways["never stopped"] = (replace(sweep, early_terminate=None), choose_last)
    result: dict[str, Any] = {"seeds": len(seeds), "versions": {"optuna": version("optuna")}, "ways": {}}
    for name, (file, lesson) in ways.items():
        began = time.monotonic()
        found = [replay(file, lesson, seed) for seed in seeds]
        result["ways"][name] = found
        middle = {key: statistics.median(one[key] for one in found) for key in found[0]}
        mean = statistics.mean(one["regret"] for one in found)
        print(
            f"{name:14} regret {middle['regret']:.4f} (mean {mean:.4f})  by the model {middle['by_model']:.0f} of 30"
            f"  values {middle['values']:.0f}  {time.monotonic() - began:.0f} s",
            flush=True,
        )
    OUT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
