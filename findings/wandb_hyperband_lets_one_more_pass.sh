#!/usr/bin/env bash
# W&B's documentation of sweeps says of hyperband: "At every eta^n steps, hyperband continues running the top 1/eta runs and
# stops all other runs", and that min_iter is the first iteration at which runs are stopped. The public package `sweeps` lets
# one run more than 1/eta of them go on (with two runs and eta 2 the worse one is never stopped), and looks first after
# min_iter + 1 values.
# Exits 0 when it is as described and 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check sweeps==0.2.0 numpy==2.4.6 2>/dev/null
"$folder/env/bin/python" -W ignore - <<'END'
import sys
from importlib.metadata import version

from sweeps.hyperband_stopping import hyperband_stop_runs
from sweeps.run import RunState, SweepRun

print("sweeps", version("sweeps"))


def stopped(num_runs: int, eta: int, num_values: int, min_iter: int) -> int:
    """Log flat curves, 0 the best, and count the runs that are to be stopped."""
    runs = [SweepRun(name=str(n), state=RunState.running, sampledHistory=[{"loss": float(n)}] * num_values) for n in range(num_runs)]
    config = {
        "method": "random",
        "metric": {"name": "loss", "goal": "minimize"},
        "early_terminate": {"type": "hyperband", "min_iter": min_iter, "eta": eta},
        "parameters": {"a": {"min": 0.0, "max": 1.0}},
    }
    return len(hyperband_stop_runs(runs, config))


as_described = True
for num_runs, eta in ((2, 2), (3, 3), (9, 3)):
    go_on = num_runs - stopped(num_runs, eta, num_values=4, min_iter=3)
    print(f"{num_runs} runs, eta {eta}: {go_on} go on; the top 1/{eta} are {num_runs // eta}")
    as_described &= go_on == num_runs // eta + 1
early = [stopped(9, 3, num_values, min_iter=3) for num_values in (3, 4)]
print(f"min_iter 3, nine runs: {early[0]} stopped after 3 values, {early[1]} after 4")
as_described &= early[0] == 0 and early[1] > 0
sys.exit(0 if as_described else 1)
END
