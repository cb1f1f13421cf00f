#!/usr/bin/env bash
# The example in the docstring of `hyperband_stop_runs` of W&B's public package `sweeps` makes runs with history=[...] and
# stops two of them. With the pydantic that pip installs beside it the word history= is dropped without an error, so
# no run has values and nothing is ever stopped; only the alias sampledHistory= arrives.
# Exits 0 when it is as described and 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check sweeps==0.2.0 pydantic==2.14.4 numpy==2.4.6 2>/dev/null
"$folder/env/bin/python" -W ignore - <<'END'
import sys
from importlib.metadata import version

from sweeps.hyperband_stopping import hyperband_stop_runs
from sweeps.run import RunState, SweepRun

print("sweeps", version("sweeps"), "pydantic", version("pydantic"))
CURVES = {"a": [10, 9], "b": [10, 10], "c": [10, 8, 8], "d": [10, 7, 7], "e": [10, 6, 6]}
CONFIG = {
    "method": "grid",
    "metric": {"name": "loss", "goal": "minimize"},
    "early_terminate": {"type": "hyperband", "max_iter": 5, "eta": 2, "s": 2},
    "parameters": {"a": {"values": [1, 2, 3]}},
}


def stopped(word: str) -> list[str]:
    """Name the runs that are to be stopped when their values are handed over by this word."""
    runs = [
        SweepRun(name=name, state=RunState.finished if name in "ae" else RunState.running, **{word: [{"loss": v} for v in curve]})
        for name, curve in CURVES.items()
    ]
    print(f"{word}=: {[len(run.history) for run in runs]} values arrive", end=", ")
    found = [run.name for run in hyperband_stop_runs(runs, CONFIG)]
    print("stopped:", found)
    return found


sys.exit(0 if (stopped("history"), stopped("sampledHistory")) == ([], ["b", "c"]) else 1)
END
