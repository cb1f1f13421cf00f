"""Private parts of Optuna."""

from __future__ import annotations

from optuna.trial import FrozenTrial


def get_trial_id(trial: FrozenTrial) -> int:
    """Return the id of a trial in its storage, which differs from its number in the study."""
    return trial._trial_id
