"""Benchmark of the sweep: the learning rate found in 12 tiny runs, against the default and its neighbours.

    python -m benchmarks.sweep [--folder FOLDER]

It runs `task=sweep sweep=sweeps/tiny.yaml`. Then it runs the default settings of the recipe, the same with twice and half the
learning rate, and with the found learning rate but the default warm-up, for the same number of steps on the same data. Each is
repeated with other seeds (weights, order of the data), because the best of 12 is partly luck. Results go to
benchmarks/results/sweep.json. An interrupted benchmark resumes in the same folder.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", WANDB_MODE="disabled", OMP_NUM_THREADS="1")

from lit_vlm.config import parse
from lit_vlm.runs.run_folder import get_package_versions
from lit_vlm.sweep.results import compute_importance, find_best_trial
from lit_vlm.sweep.search import Search
from lit_vlm.sweep.sweep_file import build_trial_overrides, read_sweep
from lit_vlm.sweep.trial_runner import collect_records, read_metric_values

ROOT = Path(__file__).resolve().parents[1]
OUT = Path(__file__).parent / "results" / "sweep.json"
FILE = ROOT / "sweeps" / "tiny.yaml"
SEEDS = (0, 1, 2)  # the seed of the sweep, and two new ones


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "benchmark_sweep")
    folder = parser.parse_args().folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    run_py(folder, "task=sweep", f"sweep={FILE}")
    sweep, seconds = read_sweep(FILE), time.monotonic() - start
    sweep_folder = folder / "runs" / "sweeps" / FILE.stem
    records = collect_records(Search(sweep, sweep_folder / "journal.log"), sweep_folder, sweep.metric.name)
    best = find_best_trial(records, sweep.metric.goal)
    rate = parse(["experiment=tiny/1_align"]).config.stage.learning_rate
    settings: dict[str, dict[str, Any]] = {
        "best of the sweep": best.parameters,
        "its rate alone": sweep.fixed | {"stage.learning_rate": best.parameters["stage.learning_rate"]},
        "default": sweep.fixed,
        "default x 2": sweep.fixed | {"stage.learning_rate": 2 * rate},
        "default / 2": sweep.fixed | {"stage.learning_rate": rate / 2},
    }
    losses_by_setting = {
        name: measure_losses(folder, name, build_trial_overrides(sweep, values, []))
        for name, values in settings.items()
    }
    trials = [
        {"number": record.number, "state": record.state, "value": record.value, "seconds": record.seconds}
        | get_swept_parameters(sweep, record)
        for record in records
    ]
    result = {
        "trials": trials,
        "best": best.number,
        "val_loss_by_seed": losses_by_setting,
        "rates": {name: values.get("stage.learning_rate", rate) for name, values in settings.items()},
        "importance": {row.key: [row.share, row.correlation] for row in compute_importance(records, sweep)},
        "seconds_of_sweep": seconds,
        "versions": get_package_versions(),
    }
    OUT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    for name, values in losses_by_setting.items():
        print(
            f"{name:18} {result['rates'][name]:.4g}  {'  '.join(f'{v:.4f}' for v in values)}  {statistics.mean(values):.4f}"
        )


def measure_losses(folder: Path, name: str, overrides: list[str]) -> list[float]:
    """Measure the final held-out loss for each seed."""
    final_losses = []
    for seed in SEEDS:
        run_name = f"{name.replace(' ', '_').replace('/', 'by')}_{seed}"
        run_py(folder, *overrides, f"seed={seed}", f"run_name={run_name}")
        final_losses.append(read_metric_values(folder / "runs" / run_name, "val/loss")[-1])
    return final_losses


def get_swept_parameters(sweep: Any, record: Any) -> dict[str, Any]:
    """Get the swept parameters of a trial."""
    return {key: record.parameters[key] for key in sweep.search_space}


def run_py(folder: Path, *overrides: str) -> None:
    """Run `run.py` in a folder."""
    subprocess.run([sys.executable, str(ROOT / "run.py"), *overrides], cwd=folder, check=True)


if __name__ == "__main__":
    main()
