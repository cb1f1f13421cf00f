"""task=sweep: which words of its command line are its own, and which go to every trial; what its own settings cannot be."""

from __future__ import annotations

from collections.abc import Iterator

from lit_vlm.config.compose import choices
from lit_vlm.config.overrides import key_of, parsed
from lit_vlm.config.schema import RunConfig, Task
from lit_vlm.config.settings import did_you_mean, nearest

OWN = ("task", "sweep", "trials", "submit", "run_name", "overwrite")
SHARED = ("run_dir", "seed", "hydra.searchpath")  # the sweep's and its trials'


def is_sweep(overrides: list[str]) -> bool:
    """Whether these overrides mean a sweep."""
    return [str(parsed(text).value()) for text in overrides if key_of(text) == "task"][-1:] == [Task.sweep.value]


def own_words(overrides: list[str]) -> list[str]:
    """What the sweep itself is told. The rest means a trial, and only with the sweep file's choices is it right or wrong."""
    return [text for text in overrides if key_of(text).partition(".")[0] in OWN or key_of(text) in SHARED]


def trial_overrides(overrides: list[str]) -> list[str]:
    """What every trial is told."""
    return [text for text in overrides if key_of(text).partition(".")[0] not in OWN]


def mistakes_in_trials(config: RunConfig) -> Iterator[str]:
    """Mistakes in `sweep` and `trials`."""
    trials = config.trials
    if config.sweep is None:
        yield "sweep is not set: task=sweep runs the trials of a sweep file, sweep=sweeps/<name>.yaml."
    if trials.slurm and trials.parallel:
        yield "trials.parallel: with trials.slurm every worker runs one trial at a time; take one of the two away."
    if trials.carry_to is not None and trials.carry_to not in choices("experiment"):
        found = did_you_mean(nearest(trials.carry_to, choices("experiment")))
        yield f"trials.carry_to: there is no experiment {trials.carry_to}; name one of {', '.join(choices('experiment'))}.{found}"
