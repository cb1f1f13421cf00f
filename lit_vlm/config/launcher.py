"""Slurm launcher for `-m hydra/launcher=submitit_slurm`, with defaults under which a run survives its time limit.

The resources of a job follow from trainer.* and submit.*, as with task=submit; each is also a setting of `hydra.launcher`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any, cast

from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from hydra_plugins.hydra_submitit_launcher.config import SlurmQueueConf
from omegaconf.errors import OmegaConfBaseException
from submitit.core.utils import FailedSubmissionError, UncompletedJobError

from lit_vlm.config.compose import compose_config
from lit_vlm.config.overrides import ConfigError, get_override_key
from lit_vlm.config.schema import RunConfig, SubmitConfig
from lit_vlm.config.slurm_options import (
    find_submit_errors,
    get_cpus_per_task,
    get_gpus_per_node,
    parse_sbatch_option,
    parse_time_limit,
    render_job_environment,
)
from lit_vlm.config.sweep_overrides import list_covering_jobs
from lit_vlm.types import UserError

UNSUPPORTED_SUBMIT_SETTINGS = (
    "container",
    "stage_to",
    "dry_run",
    "exam",
)  # submitit writes and starts the script and does not support them
DAY_MINUTES = 24 * 60  # minutes


@dataclass
class SlurmLauncherConfig(SlurmQueueConf):
    submitit_folder: str = "${hydra.sweep.dir}/.submitit/%j"
    name: str = "lit_vlm"
    timeout_min: int = DAY_MINUTES  # of one job; a requeued job gets it again
    stderr_to_stdout: bool = True
    srun_args: list[str] = field(default_factory=list)


def register_launcher(overrides: list[str]) -> None:
    """Register the launcher in place of the plugin's choice of the same name.

    Args:
        overrides: overrides of the grid, including comma lists.

    Raises:
        ConfigError: a job has invalid Slurm settings, or the jobs need different ones.
    """
    run_overrides = [
        text for text in overrides if not get_override_key(text).startswith(("hydra.launcher", "hydra/launcher"))
    ]
    try:
        jobs = [cast(RunConfig, compose_config(job)) for job in list_covering_jobs(run_overrides)]
        if grid_errors := [grid_error for job in jobs for grid_error in find_grid_errors(job)]:
            raise ConfigError(grid_errors)
        node = _require_equal_configs([make_launcher_config(job) for job in jobs])
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError([str(error)]) from error
    ConfigStore.instance().store(group="hydra/launcher", name="submitit_slurm", node=node)


def _require_equal_configs(launchers: list[SlurmLauncherConfig]) -> SlurmLauncherConfig:
    first = launchers[0]
    differing = [
        setting.name
        for setting in fields(first)
        if any(getattr(launcher, setting.name) != getattr(first, setting.name) for launcher in launchers)
    ]
    if differing:
        raise ConfigError(
            [
                "A grid is one array of jobs, which all ask Slurm for the same, and these would differ in what follows from"
                f" trainer.*, submit.* and data.num_workers: {', '.join(differing)}. Submit a grid for each."
            ]
        )
    return first


def find_grid_errors(config: RunConfig) -> Iterator[str]:
    """Yield the errors in `submit` of a job that this launcher would start."""
    yield from find_submit_errors(config)
    for name in UNSUPPORTED_SUBMIT_SETTINGS:
        if getattr(config.submit, name):
            yield f"submit.{name}: a grid cannot do that; submit the runs one by one with task=submit."
    for name, lines in {"setup": config.submit.setup, "env": config.submit.env.values()}.items():
        for line in lines:
            if "${" in line:  # Hydra would interpolate it, more than once
                yield f"submit.{name}: {line}: in a grid ${{...}} would be Hydra's and not the shell's; write $NAME."


def make_launcher_config(config: RunConfig) -> SlurmLauncherConfig:
    """Make the launcher config of one job."""
    submit, trainer = config.submit, config.trainer
    cpus_per_task = get_cpus_per_task(submit, config.data.num_workers)
    environment = render_job_environment(submit, trainer.num_threads or cpus_per_task)
    return SlurmLauncherConfig(
        nodes=trainer.num_nodes,
        tasks_per_node=trainer.devices,
        gpus_per_node=get_gpus_per_node(submit, trainer) or None,
        cpus_per_task=cpus_per_task,
        timeout_min=_convert_to_minutes(submit.time),
        partition=submit.partition,
        account=submit.account,
        qos=submit.qos,
        constraint=submit.constraint,
        setup=["set -eo pipefail", *environment, *submit.setup],
        additional_parameters=_make_sbatch_options(submit),
        # a failed rank ends all ranks; srun does not inherit --cpus-per-task from sbatch
        srun_args=["--kill-on-bad-exit=1", f"--cpus-per-task={cpus_per_task}"],
    )


def _convert_to_minutes(time: str | None) -> int:
    """Convert a time limit to minutes. Slurm reads 0 as no limit."""
    if time is None:
        return DAY_MINUTES
    return -(-(parse_time_limit(time) or 0) // 60)


def _make_sbatch_options(submit: SubmitConfig) -> dict[str, Any]:
    """Make the further options of sbatch.

    They replace submitit's own signal, which ends the first process of the job without a checkpoint.
    """
    options: dict[str, Any] = {"signal": f"USR1@{submit.signal_seconds}", "requeue": True}
    if submit.memory is not None:
        options["mem"] = submit.memory
    for name, value in map(parse_sbatch_option, submit.extra):
        options[name.lstrip("-")] = value.strip("\"'") or True
    return options


@contextmanager
def handle_launcher_errors() -> Iterator[None]:
    """Convert errors of Slurm, of a job or of Hydra in the block to a UserError."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # otherwise Hydra prints a traceback and exits instead of raising
    try:
        yield
    except (UncompletedJobError, FailedSubmissionError) as error:
        hint = "Submitted jobs continue; `squeue --me` lists them."
        raise UserError(f"hydra/launcher=submitit_slurm: {error}\n{hint}") from error
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(str(error)) from error
