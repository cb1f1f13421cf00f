"""Validation of the Slurm settings, before anything is written or submitted."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

from lit_vlm.config.choices import ContainerRuntime
from lit_vlm.config.schema import RunConfig, SubmitConfig, TrainerConfig
from lit_vlm.formatting import format_count

_TIME_LIMIT = re.compile(
    r"(?:(?P<days>\d+)-(?P<dhours>\d+)(?::(?P<dminutes>\d+)(?::(?P<dseconds>\d+))?)?|\d+(?::\d+){0,2})\Z"
)
_UNLIMITED = ("UNLIMITED", "INFINITE")
_VARIABLE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
_OPTION = re.compile(r"(?:(?P<long>--[A-Za-z][\w-]*)|-(?P<short>[A-Za-z]))[= ]*(?P<value>.*)\Z")
_SHORT_OPTIONS = """A=account a=array b=begin C=constraint c=cpus-per-task D=chdir d=dependency e=error G=gpus H=hold I=immediate
    J=job-name k=no-kill L=licenses M=clusters m=distribution N=nodes n=ntasks O=overcommit o=output p=partition Q=quiet
    q=qos S=core-spec s=oversubscribe t=time v=verbose W=wait w=nodelist x=exclude"""
_LONG_OPTIONS = dict(pair.split("=") for pair in _SHORT_OPTIONS.split())
# Options of sbatch -> settings from which the program derives them.
MANAGED_SBATCH_OPTIONS = {
    "--nodes": "trainer.num_nodes",
    "--ntasks": "trainer.devices and trainer.num_nodes",
    "--ntasks-per-node": "trainer.devices",
    "--cpus-per-task": "submit.cpus_per_task",
    "--partition": "submit.partition",
    "--account": "submit.account",
    "--qos": "submit.qos",
    "--time": "submit.time",
    "--constraint": "submit.constraint",
    "--mem": "submit.memory",
    "--signal": "submit.signal_seconds",
    "--output": "run_dir; the log is in the run's folder",
    "--dependency": "the order of the recipe's stages",
}


def find_submit_errors(config: RunConfig) -> Iterator[str]:
    """Yield an error message for each unusable setting of `submit`, alone and with the trainer's settings."""
    submit = config.submit
    if submit.exam and not config.export:
        yield "submit.exam: asks the model's folder, which export=false leaves out."
    yield from _find_gpu_errors(config)
    yield from _find_time_errors(submit)
    for name in ("partition", "account", "qos", "constraint", "memory", "container", "stage_to"):
        value = getattr(submit, name)
        if value is not None and (not value.strip() or "\n" in value):
            yield f"submit.{name}: must be one word of Slurm's, found {value!r}."
    if submit.stage_to is not None and submit.stage_to[:1] not in ("/", "$"):
        yield f"submit.stage_to: is a folder on each node and must begin with / or a variable of it, found {submit.stage_to}."
    if submit.container_mounts and submit.container is None:
        yield "submit.container_mounts: there is no submit.container that something could be mounted into."
    is_pyxis = submit.container_runtime is ContainerRuntime.pyxis
    if submit.container is None and not is_pyxis:
        yield f"submit.container_runtime={submit.container_runtime.value}: there is no submit.container to run with it."
    if (
        submit.container
        and submit.container.endswith((".sif", ".sqsh"))
        and is_pyxis is submit.container.endswith(".sif")
    ):
        remedy = "apptainer (or singularity)" if is_pyxis else "pyxis"
        yield (
            f"submit.container: {submit.container} is no image for {submit.container_runtime.value}; write"
            f" submit.container_runtime={remedy}, or give another image."
        )
    yield from _find_env_errors(submit)
    yield from _find_sbatch_option_errors(config)


def _find_sbatch_option_errors(config: RunConfig) -> Iterator[str]:
    for line in config.submit.extra:
        option, _ = parse_sbatch_option(line)
        if not option:
            yield f"submit.extra: each is an option of sbatch, as --exclusive; found {line!r}."
        elif option == "--array":
            yield (
                "submit.extra: --array would start the run several times in one folder. Several runs are a grid:"
                " python run.py -m hydra/launcher=submitit_slurm ..."
            )
        elif option in MANAGED_SBATCH_OPTIONS:
            yield f"submit.extra: {option} is not given here; it follows from {MANAGED_SBATCH_OPTIONS[option]}."
        elif _is_gpu_option(line) and get_gpus_per_node(config.submit, config.trainer):
            yield f"submit.extra: {line} and submit.gpus_per_node both ask for GPUs; add submit.gpus_per_node=0."


def parse_sbatch_option(line: str) -> tuple[str, str]:
    """Parse an option of sbatch to its long name and its value: --nodes=3, `--nodes 3`, -N3 and `-N 3` give (--nodes, 3).

    Both are empty if the line is not an option.
    """
    match = _OPTION.match(line)
    if match is None or (match["short"] and match["short"] not in _LONG_OPTIONS):
        return "", ""
    return match["long"] or f"--{_LONG_OPTIONS[match['short']]}", match["value"]


def _is_gpu_option(line: str) -> bool:
    option, value = parse_sbatch_option(line)
    return option.startswith("--gpus") or (option == "--gres" and "gpu" in value)


def _find_gpu_errors(config: RunConfig) -> Iterator[str]:
    gpus, trainer = config.submit.gpus_per_node, config.trainer
    if gpus is None:
        return
    if gpus and trainer.accelerator == "cpu":
        yield f"submit.gpus_per_node: {format_count(gpus, 'GPU')}, which trainer.accelerator=cpu would leave idle; choose trainer=ddp, ... or 0."
    elif trainer.accelerator in GPU_ACCELERATORS and gpus < trainer.devices:
        if gpus == 0 and any(map(_is_gpu_option, config.submit.extra)):
            return  # some clusters need a GPU type or another option for GPUs
        yield (
            f"submit.gpus_per_node: {format_count(gpus, 'GPU')} for trainer.devices={trainer.devices} processes of a node; each needs one."
        )


def _find_time_errors(submit: SubmitConfig) -> Iterator[str]:
    if submit.time is None or submit.time.upper() in _UNLIMITED:
        return
    seconds = parse_time_limit(submit.time)
    if seconds is None:
        yield f"submit.time: expected minutes, hours:minutes:seconds or days-hours:minutes:seconds, found {submit.time!r}."
    elif 0 < seconds <= submit.signal_seconds:  # Slurm reads 0 as no limit
        yield (
            f"submit.time: {submit.time} is {seconds} s, and the run would be told to save and leave"
            f" submit.signal_seconds={submit.signal_seconds} s before its end, so at once."
        )


def parse_time_limit(time: str) -> int | None:
    """Parse a time limit of sbatch to seconds: minutes, m:s, h:m:s, d-h, d-h:m, d-h:m:s. Return None if it is invalid."""
    match = _TIME_LIMIT.match(time)
    if match is None:
        return None
    if match["days"]:
        days, hours, minutes, seconds = (int(match[name] or 0) for name in ("days", "dhours", "dminutes", "dseconds"))
    else:
        parts = [int(part) for part in time.split(":")]
        days = 0
        hours, minutes, seconds = parts if len(parts) == 3 else (0, *parts) if len(parts) == 2 else (0, parts[0], 0)
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def _find_env_errors(submit: SubmitConfig) -> Iterator[str]:
    for name in submit.env:
        if not _VARIABLE_NAME.match(name):
            yield f"submit.env.{name}: is no name of an environment variable."


GPU_ACCELERATORS = ("gpu", "cuda")
# Nodes may have no internet access: models and data are in the caches of the login node, and logs are synced from there.
OFFLINE_VARIABLES = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}


def get_gpus_per_node(submit: SubmitConfig, trainer: TrainerConfig) -> int:
    """Return the number of GPUs that the job requests for each node."""
    if submit.gpus_per_node is not None:
        return submit.gpus_per_node
    return trainer.devices if trainer.accelerator in GPU_ACCELERATORS else 0


def get_cpus_per_task(submit: SubmitConfig, num_workers: int) -> int:
    """Return the number of CPU cores for each process. `num_workers` is data.num_workers."""
    return submit.cpus_per_task or 1 + num_workers


def render_job_environment(submit: SubmitConfig, num_threads: int) -> Iterator[str]:
    """Render the lines of the job script that set up the environment of all ranks."""
    yield "# Ranks find each other by Slurm's words: the first node's name, and a port made of the job's id."
    yield "unset MASTER_ADDR MASTER_PORT RANK LOCAL_RANK NODE_RANK WORLD_SIZE"
    for name, value in {"OMP_NUM_THREADS": str(num_threads), **OFFLINE_VARIABLES, **submit.env}.items():
        yield f"export {name}={shlex.quote(str(value))}"
