"""Overrides of task=sweep, divided into those of the sweep and those of every trial; validation of the sweep settings."""

from __future__ import annotations

from collections.abc import Iterator

from lit_vlm.config.compose import choices
from lit_vlm.config.overrides import key_of, parsed
from lit_vlm.config.schema import RunConfig, Task
from lit_vlm.config.settings import did_you_mean, nearest

OWN = ("task", "sweep", "trials", "submit", "run_name", "overwrite")
SHARED = ("run_dir", "seed", "hydra.searchpath")  # used by the sweep and by its trials


def is_sweep(overrides: list[str]) -> bool:
    """Return True if these overrides run a sweep."""
    return [str(parsed(text).value()) for text in overrides if key_of(text) == "task"][-1:] == [Task.sweep.value]


def own_words(overrides: list[str]) -> list[str]:
    """Return the overrides of the sweep itself.

    The others belong to the trials and can be validated only together with the choices of the sweep file.
    """
    return [text for text in overrides if key_of(text).partition(".")[0] in OWN or key_of(text) in SHARED]


def trial_overrides(overrides: list[str]) -> list[str]:
    """Return the overrides of every trial."""
    return [text for text in overrides if key_of(text).partition(".")[0] not in OWN]


def mistakes_in_trials(config: RunConfig) -> Iterator[str]:
    """Yield the errors in `sweep` and `trials`."""
    trials = config.trials
    if config.sweep is None:
        yield "sweep is not set: task=sweep runs the trials of a sweep file, sweep=sweeps/<name>.yaml."
    if trials.slurm and trials.parallel:
        yield "trials.parallel: with trials.slurm every worker runs one trial at a time; take one of the two away."
    if trials.carry_to is not None and trials.carry_to not in choices("experiment"):
        suggestion = did_you_mean(nearest(trials.carry_to, choices("experiment")))
        yield f"trials.carry_to: there is no experiment {trials.carry_to}; name one of {', '.join(choices('experiment'))}.{suggestion}"
