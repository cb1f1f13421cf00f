#!/usr/bin/env bash
# Optuna's TPESampler learns from pruned trials by their intermediate values. Its GPSampler looks at complete trials alone and says
# nothing: with a pruner that stops most trials most values are drawn at random, behind 30 pruned trials still all of them.
# Exits 0 when it is as described and 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check optuna==5.0.0 torch==2.13.0 scipy numpy 2>/dev/null
"$folder/env/bin/python" -W ignore - <<'END'
import sys

import optuna
from optuna.distributions import FloatDistribution
from optuna.samplers import GPSampler, TPESampler
from optuna.trial import TrialState, create_trial

optuna.logging.set_verbosity(optuna.logging.ERROR)
print("optuna", optuna.__version__)
SPACE = {"x": FloatDistribution(0, 1), "y": FloatDistribution(0, 1)}


def by_model(kind, state: TrialState) -> bool:
    """Ask for a trial behind 30 of this state, and see whether the model or chance chose its values."""
    study = optuna.create_study(sampler=kind(seed=0, n_startup_trials=5, **({"multivariate": True} if kind is TPESampler else {})))
    for n in range(30):
        x, y = n / 30, (7 * n % 30) / 30
        value = (x - 0.3) ** 2 + (y - 0.4) ** 2
        study.add_trial(
            create_trial(
                state=state,
                value=value if state == TrialState.COMPLETE else None,
                params={"x": x, "y": y},
                distributions=SPACE,
                intermediate_values={1: value + 1, 2: value},
            )
        )
    found, sample = [], study.sampler.sample_relative

    def watched(*arguments):
        found.append(sample(*arguments))
        return found[-1]

    study.sampler.sample_relative = watched
    study.ask(SPACE)
    return bool(found[0])


seen = {(kind.__name__, state.name): by_model(kind, state) for kind in (TPESampler, GPSampler) for state in (TrialState.COMPLETE, TrialState.PRUNED)}
for (kind, state), chosen in seen.items():
    print(f"{kind} behind 30 {state} trials: values chosen by {'the model' if chosen else 'chance'}")
sys.exit(0 if list(seen.values()) == [True, True, True, False] else 1)
END
