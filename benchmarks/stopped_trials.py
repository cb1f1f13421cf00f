"""Benchmark of early stopping: compares values to report for a stopped trial, on synthetic preference-training curves.

    python -m benchmarks.stopped_trials [--seeds 20]

It runs `sweeps/dpo.yaml` unchanged: 30 trials, four in parallel, each with up to 12 validations of a synthetic model. The
accuracy of the model rises faster with a larger learning rate, and drops with one that is too large. The value reported to
the search for a stopped trial is one of: none (Optuna's handling of pruned trials), its last value, its best value, or its
value at the rung of the comparison. A search without early stopping is the baseline. Results go to
benchmarks/results/stopped_trials.json.
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

from lit_vlm.sweep.search import Search
from lit_vlm.sweep.sweep_file import SweepFile, read_sweep

ROOT = Path(__file__).resolve().parents[1]
OUT = Path(__file__).parent / "results" / "stopped_trials.json"
NUM_VALUES = 12  # number of values that a complete trial logs
LOSS_OFFSETS = {"sigmoid": 0.0, "ipo": -0.02, "hinge": -0.01}
WEIGHT_OFFSETS = {(1.0, 0.0, 0.0): -0.015, (1.0, 0.0, 0.5): -0.005, (0.8, 0.2, 0.0): -0.01, (0.8, 0.2, 1.0): 0.0}
BEST_ACCURACY = 0.78  # best final accuracy over all settings


def compute_accuracies(parameters: dict[str, Any]) -> list[float]:
    """Compute the accuracies that a trial would log without noise."""
    rate, beta = math.log10(parameters["stage.learning_rate"]), math.log10(parameters["stage.beta"])
    loss, weights = (
        LOSS_OFFSETS[parameters["stage.loss_type"][0]],
        WEIGHT_OFFSETS[tuple(parameters["stage.loss_weights"])],
    )
    final = max(0.5, BEST_ACCURACY - 0.10 * (rate + 5.9) ** 2 - 0.06 * (beta + 1) ** 2 + loss + weights)
    slowness = 2.5 * 10 ** (-0.6 * (rate + 5.9))
    final_rise = 1 - math.exp(-NUM_VALUES / slowness)
    rise = [0.5 + (final - 0.5) * (1 - math.exp(-(i + 1) / slowness)) / final_rise for i in range(NUM_VALUES)]
    drop = 0.25 * max(0.0, rate + 5.55)  # a rate that is too large: good at first, then worse
    return [max(0.45, value - drop * i / NUM_VALUES) for i, value in enumerate(rise)]


def sample_accuracies(parameters: dict[str, Any], number: int, seed: int) -> list[float]:
    """Sample the accuracies that a trial logs, with the noise of some hundred held-out pairs."""
    noise = np.random.default_rng([seed, number]).normal(0, 0.006, NUM_VALUES)
    return [value + float(error) for value, error in zip(compute_accuracies(parameters), noise, strict=True)]


def choose_last(values: list[float], rungs: tuple[int, ...]) -> float:
    return values[-1]


def choose_best(values: list[float], rungs: tuple[int, ...]) -> float:
    return max(values)


def choose_at_rung(values: list[float], rungs: tuple[int, ...]) -> float:
    return values[max(rung for rung in rungs if rung < len(values))]


def choose_nothing(values: list[float], rungs: tuple[int, ...]) -> None:
    return None


StoppedValue = Callable[[list[float], tuple[int, ...]], float | None]
STOPPED_VALUES: dict[str, StoppedValue] = {
    "nothing": choose_nothing,
    "last": choose_last,
    "best": choose_best,
    "at its rung": choose_at_rung,
}


def run_search(sweep: SweepFile, stopped_value: StoppedValue, seed: int, num_parallel: int = 4) -> dict[str, float]:
    """Run a whole search on synthetic curves.

    Returns:
        `regret`: of the best finished trial, without noise; `by_model`: number of trials whose parameters the model chose;
        `finished`: number of trials that were not stopped; `values`: number of logged values.
    """
    search = Search(sweep, seed=seed)
    logged: dict[int, list[float]] = {}
    running: dict[int, list[float]] = {}
    best, regret, finished = -math.inf, math.inf, 0
    with ModelCallCounter() as model:
        while True:
            while len(running) < num_parallel and (trial := search.ask()) is not None:
                running[trial.number] = sample_accuracies(trial.parameters, trial.number, seed)
                logged[trial.number] = []
            if not running:
                break
            for number, curve in list(running.items()):
                values = logged[number]
                values.append(curve[len(values)])
                is_stopped, is_complete = search.check_early_stopping(number, values), len(values) == NUM_VALUES
                if is_complete:
                    search.tell(number, values[-1], "finished")
                    finished += 1
                    if values[-1] > best:
                        best = values[-1]
                        regret = BEST_ACCURACY - compute_accuracies(search.list_trials()[number].parameters)[-1]
                elif is_stopped:
                    rungs = sweep.early_terminate.rungs if sweep.early_terminate else ()
                    search.tell(number, stopped_value(values, rungs), "stopped")
                if is_stopped or is_complete:
                    del running[number]
    return {
        "regret": regret,
        "by_model": model.count,
        "finished": finished,
        "values": sum(map(len, logged.values())),
    }


class ModelCallCounter:
    """Counts the trials whose parameters were chosen by the Gaussian process, not at random."""

    def __enter__(self) -> ModelCallCounter:
        self.count, self._original = 0, GPSampler.sample_relative
        before = self._original

        def sample(sampler: GPSampler, *arguments: Any) -> dict[str, Any]:
            found = before(sampler, *arguments)
            self.count += bool(found)
            return found

        GPSampler.sample_relative = sample  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        GPSampler.sample_relative = self._original  # type: ignore[method-assign]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20)
    seeds = range(parser.parse_args().seeds)
    sweep = read_sweep(ROOT / "sweeps" / "dpo.yaml")
    methods = {name: (sweep, lesson) for name, lesson in STOPPED_VALUES.items()}
    methods["never stopped"] = (replace(sweep, early_terminate=None), choose_last)
    result: dict[str, Any] = {"seeds": len(seeds), "versions": {"optuna": version("optuna")}, "ways": {}}
    for name, (file, lesson) in methods.items():
        start = time.monotonic()
        results = [run_search(file, lesson, seed) for seed in seeds]
        result["ways"][name] = results
        medians = {key: statistics.median(row[key] for row in results) for key in results[0]}
        mean = statistics.mean(row["regret"] for row in results)
        print(
            f"{name:14} regret {medians['regret']:.4f} (mean {mean:.4f})  by the model {medians['by_model']:.0f} of 30"
            f"  values {medians['values']:.0f}  {time.monotonic() - start:.0f} s",
            flush=True,
        )
    OUT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
