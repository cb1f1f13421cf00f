"""Slurm batch script of one run: readable, complete, and editable for submission by hand."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lit_vlm.config.choices import ContainerRuntime
from lit_vlm.config.schema import SubmitConfig, TrainerConfig
from lit_vlm.config.slurm_options import GPU_ACCELERATORS, get_gpus_per_node, render_job_environment
from lit_vlm.data.staging import STAGING_VARIABLE

PROJECT_ROOT = Path(__file__).resolve().parents[2]
PYTHON_EXPORTS = 'export PYTHONUNBUFFERED=1 PYTHONPATH={root}"${{PYTHONPATH:+:$PYTHONPATH}}"'
NETWORK_HINTS = """\
# Networks differ. Where NCCL waits for ever at the start or is slow, tell it which cards to use, with
# submit.env.<NAME>=<value> (NCCL's own names; docs/cluster.md says how to find the values):
#   NCCL_SOCKET_IFNAME=ib0   network interface of the rendezvous; GLOO_SOCKET_IFNAME is gloo's
#   NCCL_IB_HCA=mlx5         InfiniBand cards; NCCL_IB_DISABLE=1 goes without them
#   NCCL_DEBUG=INFO          what NCCL found, in the log"""


@dataclass(frozen=True, slots=True)
class SlurmJob:
    """Slurm job of a run, or of an array of workers.

    Attributes:
        name: run name, e.g. "varco_vision_14b/2_sft".
        folder: run folder, which gets the script and the log.
        submit, trainer: settings of the job and of its processes.
        cpus_per_task: CPU cores of each process.
        run_folders: folders that the run writes: run_dir and data.index_dir.
        models: models that the run reads, as folders or hub ids.
        overrides: overrides after `python run.py`.
        working_dir: folder that relative paths in the overrides start from.
        staged_paths: files and folders to copy to the local disks of the nodes, if `submit.stage_to` is set.
        num_workers: number of workers, one element of a job array each, as those of a sweep, which start their own trials. None:
            the job is a single run.
        worker_key: setting that tells a worker its index in the array.
        written_by: task that writes the script of a job of one rank, for its first line; None: submit, or sweep for workers.
    """

    name: str
    folder: Path
    submit: SubmitConfig
    trainer: TrainerConfig
    cpus_per_task: int
    run_folders: list[str]
    models: list[str]
    overrides: list[str]
    working_dir: Path
    staged_paths: list[Path]
    num_workers: int | None = None
    worker_key: str = "trials.worker"
    written_by: str | None = None

    @property
    def script_path(self) -> Path:
        return self.folder / "submit.sh"

    @property
    def log_path(self) -> str:
        """Path of the log, with %j for the job id, or %A_%a for the ids of an array job and its task. Slurm fills them in."""
        return f"{self.folder}/slurm-{'%j' if self.num_workers is None else '%A_%a'}.log"


def render_batch_script(job: SlurmJob) -> str:
    """Render the batch script as text."""
    task = job.written_by or ("submit" if job.num_workers is None else "sweep")
    parts = [
        f"#!/bin/bash\n# {to_one_line(job.name)}: written by task={task}. Edit it and `sbatch` it by hand if you like.",
        "\n".join(f"#SBATCH {option}" for option in _iter_sbatch_options(job)),
        "set -euo pipefail",
        f"cd {shlex.quote(str(job.working_dir))}",
        "\n".join(
            [
                *render_job_environment(job.submit, job.trainer.num_threads or job.cpus_per_task),
                PYTHON_EXPORTS.format(root=shlex.quote(str(PROJECT_ROOT))),
            ]
        ),
    ]
    if job.written_by is None:  # its ranks speak to each other
        parts.append(NETWORK_HINTS)
    if job.submit.setup:
        # third-party scripts, e.g. conda or ~/.bashrc, use unset variables
        parts.append("\n".join(["# submit.setup", "set +u", *job.submit.setup, "set -u"]))
    if job.staged_paths:
        parts.append("\n".join(_render_staging(job)))
    parts.append(_render_run_command(job) if job.num_workers is None else _render_worker_command(job))
    return "\n\n".join(parts) + "\n"


def _iter_sbatch_options(job: SlurmJob) -> Iterator[str]:
    submit, trainer = job.submit, job.trainer
    yield f"--job-name={_quote(job.name)}"
    yield f"--output={_quote(job.log_path.replace(str(job.folder), str(job.folder).replace('%', '%%')))}"
    yield "--open-mode=append"  # a requeued job appends to the same log
    yield f"--nodes={trainer.num_nodes}"
    yield f"--ntasks-per-node={trainer.devices}"
    yield f"--cpus-per-task={job.cpus_per_task}"
    if num_gpus := get_gpus_per_node(submit, trainer):
        yield f"--gpus-per-node={num_gpus}"
    options = {"partition": "partition", "account": "account", "qos": "qos", "time": "time", "constraint": "constraint"}
    for setting, option in {**options, "memory": "mem"}.items():
        if getattr(submit, setting) is not None:
            yield f"--{option}={_quote(str(getattr(submit, setting)))}"
    yield "--requeue"
    if job.num_workers is None:
        yield f"--signal=USR1@{submit.signal_seconds}"  # to all ranks: save, requeue, exit
    else:
        yield f"--array=0-{job.num_workers - 1}"
        yield f"--signal=B:USR1@{submit.signal_seconds}"  # only to the worker, which stops its trial
    yield from submit.extra


def _render_staging(job: SlurmJob) -> Iterator[str]:
    trainer, submit, folder = job.trainer, job.submit, shlex.quote(job.submit.stage_to or "")
    yield "# One task per node copies the data to the node's own disk; what is there already stays. Names, index and digests"
    yield "# remain those of the originals."
    task_flags = f"--ntasks={trainer.num_nodes} --ntasks-per-node=1"
    srun = _join_lines(["srun --kill-on-bad-exit=1", task_flags, *_build_container_flags(job)])
    files = [shlex.quote(str(path)) for path in job.staged_paths]
    # variables in the path expand on the nodes, so they are not quoted here
    command = _join_lines([*_build_container_command(job), f"{_get_python(submit)} -m lit_vlm.data.staging"])
    yield f"{srun} \\\n  {command} {_join_lines([folder, *files])}"
    yield f"export {STAGING_VARIABLE}={folder}"


def _render_run_command(job: SlurmJob) -> str:
    """Render the srun command. It replaces the shell: its exit status is that of the job, and one failing rank ends all.

    A signal before Python has installed its handlers would end the run, so the ranks start with USR1 and USR2 ignored.
    """
    srun = [
        "exec srun --kill-on-bad-exit=1",
        f"--cpus-per-task={job.cpus_per_task}",
        *_build_container_flags(job),
    ]
    shell = """bash -c 'trap "" USR1 USR2; exec "$0" "$@"'"""
    command = [
        shell,
        *_build_container_command(job),
        f"{_get_python(job.submit)} {shlex.quote(str(PROJECT_ROOT / 'run.py'))}",
        *map(shlex.quote, job.overrides),
    ]
    return _join_lines([*srun, *command])


def build_step_command(cpus_per_task: int, overrides: list[str]) -> list[str]:
    """Build the srun command of a run as a step of the current job, on all its nodes.

    USR1 and USR2 are ignored until Python has installed its handlers.
    """
    srun = ["srun", "--kill-on-bad-exit=1", f"--cpus-per-task={cpus_per_task}"]
    shell = ["bash", "-c", 'trap "" USR1 USR2; exec "$0" "$@"']
    return [*srun, *shell, sys.executable, str(PROJECT_ROOT / "run.py"), *overrides]


def _render_worker_command(job: SlurmJob) -> str:
    """Render the command of a worker. It replaces the shell and gets its signals. Slurm sets its array index."""
    program = f"exec {_get_python(job.submit)} {shlex.quote(str(PROJECT_ROOT / 'run.py'))}"
    overrides = [*map(shlex.quote, job.overrides), f'{job.worker_key}="$SLURM_ARRAY_TASK_ID"']
    return 'trap "" USR1 USR2  # until Python listens\n' + _join_lines([program, *overrides])


def _get_python(submit: SubmitConfig) -> str:
    """Return the Python executable: of this process, or of the container."""
    return "python" if submit.container else shlex.quote(sys.executable)


def _build_container_flags(job: SlurmJob) -> list[str]:
    """Build the container flags of pyxis. Folders of the run are mounted here; the user mounts the data."""
    submit = job.submit
    if submit.container is None or submit.container_runtime is not ContainerRuntime.pyxis:
        return []
    return [
        f"--container-image={shlex.quote(submit.container)}",
        f"--container-mounts={shlex.quote(_join_mounts(job))}",
        f"--container-workdir={shlex.quote(str(job.working_dir))}",
    ]


def _build_container_command(job: SlurmJob) -> list[str]:
    """Build the command of Apptainer or Singularity that runs the command behind it in the container. Empty with pyxis."""
    submit = job.submit
    if submit.container is None or submit.container_runtime is ContainerRuntime.pyxis:
        return []
    gpus = " --nv" if job.trainer.accelerator in GPU_ACCELERATORS else ""
    return [
        f"{submit.container_runtime.value} exec{gpus}",
        f"--bind={shlex.quote(_join_mounts(job))}",
        f"--pwd={shlex.quote(str(job.working_dir))}",
        shlex.quote(submit.container),
    ]


def _join_mounts(job: SlurmJob) -> str:
    mounts = [*(f"{path}:{path}" for path in _find_own_folders(job)), *job.submit.container_mounts]
    return ",".join(mounts)


def _find_own_folders(job: SlurmJob) -> list[Path]:
    """Find the folders that the run reads or writes besides its data, without nested folders and user mounts."""
    submit = job.submit
    cache = submit.env.get("HF_HOME", os.environ.get("HF_HOME"))
    candidates = [
        str(PROJECT_ROOT),
        str(job.working_dir),
        *job.run_folders,
        # variables in it expand on the nodes, so the folder is unknown here
        submit.stage_to if "$" not in (submit.stage_to or "") else None,
        *(path for path in [*job.models, cache] if path and os.path.isabs(path) and os.path.exists(path)),
    ]
    paths = list(dict.fromkeys(job.working_dir / name for name in candidates if name))
    mounted = [Path(mount.split(":")[0]) for mount in submit.container_mounts if len(set(mount.split(":")[:2])) == 1]
    return [
        path
        for path in paths
        if not any(path.is_relative_to(other) for other in mounted)
        and not any(path != other and path.is_relative_to(other) for other in paths)
    ]


def _join_lines(parts: list[str]) -> str:
    return " \\\n  ".join(parts)


def _quote(value: str) -> str:
    """Quote a value for a #SBATCH line, which supports double quotes and backslashes, and ends at a #."""
    if value and all(letter.isalnum() or letter in "%+,-./:=@_" for letter in value):
        return value
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def to_one_line(text: str) -> str:
    """Collapse all whitespace of a text to single spaces."""
    return " ".join(text.split())
