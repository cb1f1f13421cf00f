"""Validation of -m: several jobs one after the other in this process, each on one device."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, cast

from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lit_vlm.config.compose import composed
from lit_vlm.config.overrides import ConfigError, key_of, parsed
from lit_vlm.secrets import mistakes_of_secrets


def values_of(override: str) -> list[str]:
    """Split an override with a comma list into one override per value; return any other override unchanged."""
    parsed_sweep = parsed(override)
    if not parsed_sweep.is_choice_sweep():
        return [override]
    return [f"{override.partition('=')[0]}={value}" for value in parsed_sweep.sweep_string_iterator()]


def check_multirun(overrides: list[str]) -> None:
    """Reject -m with several local devices.

    Lightning starts one process per device by running the command line again, including -m. Each process would run the whole
    list by itself, out of step with the others. A launcher that starts every job as its own program has no such problem.

    Raises:
        ConfigError: a job of the list uses several devices, or contains a secret.
    """
    if any(value.endswith("task=submit") for text in overrides for value in values_of(text)):
        raise ConfigError(
            [
                "-m with task=submit: a job of a job. Submit a grid with hydra/launcher=submitit_slurm and without task=submit,"
                " or submit the runs one by one."
            ]
        )
    is_local = not (launcher_in(overrides) or "").startswith("submitit")
    for job in samples(overrides):
        refuse_secrets(job)
        devices = composed(job).trainer.devices if is_local else 1
        if devices > 1:
            raise ConfigError(
                [
                    f"-m with trainer.devices={devices}: every device's process would run the whole list by itself."
                    " Use one device, start the jobs one by one, or send them to a cluster with"
                    " hydra/launcher=submitit_slurm."
                ]
            )


def refuse_secrets(overrides: list[str]) -> None:
    """Raise ConfigError if a setting contains a secret, because Hydra prints and writes the composed config.

    The user's own files, and environment variables that the settings refer to, are included.
    """
    run_overrides = [text for text in overrides if not key_of(text).startswith(("hydra.launcher", "hydra/launcher"))]
    with suppress(HydraException, OmegaConfBaseException):  # another error, which is reported elsewhere
        config = composed(run_overrides)
        plain = cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))
        if errors := mistakes_of_secrets(plain):
            raise ConfigError(errors)


def launcher_in(overrides: list[str]) -> str | None:
    """Return the selected launcher, the last one if there are several; None without one."""
    return next((text.partition("=")[2] for text in reversed(overrides) if key_of(text) == "hydra/launcher"), None)


def refuse_launcher(overrides: list[str]) -> None:
    """Raise ConfigError if a launcher is selected without -m: Hydra would not use it, and the run would start here."""
    if launcher := launcher_in(overrides):
        raise ConfigError(
            [
                f"hydra/launcher={launcher}: starts the jobs of -m, and without -m the run would start right here. Add -m,"
                " or submit the one run with task=submit."
            ]
        )


def samples(overrides: list[str]) -> list[list[str]]:
    """List jobs in which each value of each comma list occurs once. The full product could have thousands of jobs."""
    values_by_override = [values_of(text) for text in overrides]
    first_job = [values[0] for values in values_by_override if not parsed(values[0]).is_sweep_override()]
    other_jobs = [
        [value if text == values[0] else text for text in first_job]
        for values in values_by_override
        for value in values[1:]
    ]
    return [first_job, *other_jobs]
