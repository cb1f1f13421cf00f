"""Overrides of task=sweep, divided into those of the sweep and those of every trial; validation of the sweep settings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any, cast

from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lit_vlm.config.choices import Task
from lit_vlm.config.compose import compose_config, list_choices
from lit_vlm.config.overrides import ConfigError, get_override_key, parse_override, split_sweep_values
from lit_vlm.config.schema import RunConfig
from lit_vlm.redaction import find_secret_errors
from lit_vlm.types import find_nearest, format_suggestion

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


def validate_multirun(overrides: list[str]) -> None:
    """Reject -m with several local devices.

    Lightning starts one process per device by running the command line again, including -m. Each process would run the whole
    list by itself, out of step with the others. A launcher that starts every job as its own program has no such problem.

    Raises:
        ConfigError: a job of the list uses several devices, or contains a secret.
    """
    if any(value.endswith("task=submit") for text in overrides for value in split_sweep_values(text)):
        raise ConfigError(
            [
                "-m with task=submit: a job of a job. Submit a grid with hydra/launcher=submitit_slurm and without task=submit,"
                " or submit the runs one by one."
            ]
        )
    is_local = not (get_launcher(overrides) or "").startswith("submitit")
    for job in list_covering_jobs(overrides):
        ensure_no_secrets(job)
        devices = compose_config(job).trainer.devices if is_local else 1
        if devices > 1:
            raise ConfigError(
                [
                    f"-m with trainer.devices={devices}: every device's process would run the whole list by itself."
                    " Use one device, start the jobs one by one, or send them to a cluster with"
                    " hydra/launcher=submitit_slurm."
                ]
            )


def ensure_no_secrets(overrides: list[str]) -> None:
    """Raise ConfigError if a setting contains a secret, because Hydra prints and writes the composed config.

    The user's own files, and environment variables that the settings refer to, are included.
    """
    run_overrides = [
        text for text in overrides if not get_override_key(text).startswith(("hydra.launcher", "hydra/launcher"))
    ]
    with suppress(HydraException, OmegaConfBaseException):  # another error, which is reported elsewhere
        config = compose_config(run_overrides)
        plain = cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))
        if errors := find_secret_errors(plain):
            raise ConfigError(errors)


def get_launcher(overrides: list[str]) -> str | None:
    """Return the selected launcher, the last one if there are several; None without one."""
    return next(
        (text.partition("=")[2] for text in reversed(overrides) if get_override_key(text) == "hydra/launcher"), None
    )


def ensure_no_launcher(overrides: list[str]) -> None:
    """Raise ConfigError if a launcher is selected without -m: Hydra would not use it, and the run would start here."""
    if launcher := get_launcher(overrides):
        raise ConfigError(
            [
                f"hydra/launcher={launcher}: starts the jobs of -m, and without -m the run would start right here. Add -m,"
                " or submit the one run with task=submit."
            ]
        )


def list_covering_jobs(overrides: list[str]) -> list[list[str]]:
    """List jobs in which each value of each comma list occurs once. The full product could have thousands of jobs."""
    values_by_override = [split_sweep_values(text) for text in overrides]
    first_job = [values[0] for values in values_by_override if not parse_override(values[0]).is_sweep_override()]
    other_jobs = [
        [value if text == values[0] else text for text in first_job]
        for values in values_by_override
        for value in values[1:]
    ]
    return [first_job, *other_jobs]
