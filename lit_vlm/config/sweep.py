"""Overrides of task=sweep, divided into those of the sweep and those of every trial; validation of the sweep settings."""

from __future__ import annotations

from collections.abc import Iterator

from lit_vlm.config.compose import list_choices
from lit_vlm.config.overrides import get_override_key, parse_override
from lit_vlm.config.schema import RunConfig, Task
from lit_vlm.config.settings import find_nearest, format_suggestion

OWN_SWEEP_KEYS = ("task", "sweep", "trials", "submit", "run_name", "overwrite")
SHARED_KEYS = ("run_dir", "seed", "hydra.searchpath")  # used by the sweep and by its trials


def is_sweep(overrides: list[str]) -> bool:
    """Return True if these overrides run a sweep."""
    return [str(parse_override(text).value()) for text in overrides if get_override_key(text) == "task"][-1:] == [
        Task.sweep.value
    ]


def get_sweep_overrides(overrides: list[str]) -> list[str]:
    """Return the overrides of the sweep itself.

    The others belong to the trials and can be validated only together with the choices of the sweep file.
    """
    return [
        text
        for text in overrides
        if get_override_key(text).partition(".")[0] in OWN_SWEEP_KEYS or get_override_key(text) in SHARED_KEYS
    ]


def get_trial_overrides(overrides: list[str]) -> list[str]:
    """Return the overrides of every trial."""
    return [text for text in overrides if get_override_key(text).partition(".")[0] not in OWN_SWEEP_KEYS]


def find_trial_errors(config: RunConfig) -> Iterator[str]:
    """Yield the errors in `sweep` and `trials`."""
    trials = config.trials
    if config.sweep is None:
        yield "sweep is not set: task=sweep runs the trials of a sweep file, sweep=sweeps/<name>.yaml."
    if trials.slurm and trials.parallel:
        yield "trials.parallel: with trials.slurm every worker runs one trial at a time; take one of the two away."
    if trials.carry_to is not None and trials.carry_to not in list_choices("experiment"):
        suggestion = format_suggestion(find_nearest(trials.carry_to, list_choices("experiment")))
        yield f"trials.carry_to: there is no experiment {trials.carry_to}; name one of {', '.join(list_choices('experiment'))}.{suggestion}"
