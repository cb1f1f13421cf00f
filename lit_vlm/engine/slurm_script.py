"""The batch script of one run: readable, complete, and fit to be edited and submitted by hand."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lit_vlm.config.job import environment, num_cpus, num_gpus
from lit_vlm.config.schema import DPOStageConfig, RunConfig, SubmitConfig
from lit_vlm.data.staging import VARIABLE

ROOT = Path(__file__).resolve().parents[2]
PYTHON = 'export PYTHONUNBUFFERED=1 PYTHONPATH={root}"${{PYTHONPATH:+:$PYTHONPATH}}"'
NETWORK = """\
# Networks differ. Where NCCL waits for ever at the start or is slow, tell it which cards to use, with
# submit.env.<NAME>=<value> (NCCL's own names; docs/cluster.md says how to find the values):
#   NCCL_SOCKET_IFNAME=ib0   network interface of the rendezvous; GLOO_SOCKET_IFNAME is gloo's
#   NCCL_IB_HCA=mlx5         InfiniBand cards; NCCL_IB_DISABLE=1 goes without them
#   NCCL_DEBUG=INFO          what NCCL found, in the log"""


@dataclass(frozen=True, slots=True)
class Job:
    """What is to run, and where.

    Attributes:
        name: of the run, as in "varco_vision_14b/2_sft".
        folder: of the run; the script and the log go there.
        words: overrides behind `python run.py`.
        place: the folder that relative paths in them start from.
        data: files and folders to copy to the nodes' own disks, when `submit.stage_to` names one.
        workers: of a sweep, as an array of jobs; each starts its trials itself. None: the job is the run.
    """

    name: str
    folder: Path
    config: RunConfig
    words: list[str]
    place: Path
    data: list[Path]
    workers: int | None = None

    @property
    def script(self) -> Path:
        return self.folder / "submit.sh"

    @property
    def log(self) -> str:
        """With %j where Slurm puts the job's id, and %A_%a where it puts those of an array."""
        return f"{self.folder}/slurm-{'%j' if self.workers is None else '%A_%a'}.log"


def script_of(job: Job) -> str:
    """The text of the script."""
    task = "submit" if job.workers is None else "sweep"
    parts = [
        f"#!/bin/bash\n# {one_line(job.name)}: written by task={task}. Edit it and `sbatch` it by hand if you like.",
        "\n".join(f"#SBATCH {option}" for option in _options(job)),
        "set -euo pipefail",
        f"cd {shlex.quote(str(job.place))}",
        "\n".join([*environment(job.config), PYTHON.format(root=shlex.quote(str(ROOT)))]),
        NETWORK,
    ]
    if job.config.submit.setup:
        # what others wrote, as conda and ~/.bashrc, uses variables that are not set
        parts.append("\n".join(["# submit.setup", "set +u", *job.config.submit.setup, "set -u"]))
    if job.data:
        parts.append("\n".join(_staging(job)))
    parts.append(_start(job) if job.workers is None else _start_worker(job))
    return "\n\n".join(parts) + "\n"


def _options(job: Job) -> Iterator[str]:
    submit, trainer = job.config.submit, job.config.trainer
    yield f"--job-name={_quoted(job.name)}"
    yield f"--output={_quoted(job.log.replace(str(job.folder), str(job.folder).replace('%', '%%')))}"
    yield "--open-mode=append"  # a requeued job goes on in the same log
    yield f"--nodes={trainer.num_nodes}"
    yield f"--ntasks-per-node={trainer.devices}"
    yield f"--cpus-per-task={num_cpus(job.config)}"
    if num_gpus(job.config):
        yield f"--gpus-per-node={num_gpus(job.config)}"
    words = {"partition": "partition", "account": "account", "qos": "qos", "time": "time", "constraint": "constraint"}
    for setting, option in {**words, "memory": "mem"}.items():
        if getattr(submit, setting) is not None:
            yield f"--{option}={_quoted(str(getattr(submit, setting)))}"
    yield "--requeue"
    if job.workers is None:
        yield f"--signal=USR1@{submit.signal_seconds}"  # to every rank: save, requeue, leave
    else:
        yield f"--array=0-{job.workers - 1}"
        yield f"--signal=B:USR1@{submit.signal_seconds}"  # to the worker alone, which asks its trial
    yield from submit.extra


def _staging(job: Job) -> Iterator[str]:
    trainer, submit, folder = job.config.trainer, job.config.submit, shlex.quote(job.config.submit.stage_to or "")
    yield "# One task per node copies the data to the node's own disk; what is there already stays. Names, index and digests"
    yield "# remain those of the originals."
    one_each = f"--ntasks={trainer.num_nodes} --ntasks-per-node=1"
    srun = _continued(["srun --kill-on-bad-exit=1", one_each, *_container(job)])
    files = [shlex.quote(str(path)) for path in job.data]
    # the variables in it are the nodes', so nothing expands them here
    yield f"{srun} \\\n  {_python(submit)} -m lit_vlm.data.staging {_continued([folder, *files])}"
    yield f"export {VARIABLE}={folder}"


def _start(job: Job) -> str:
    """srun takes the shell's place: its exit code is the job's, and one rank that fails ends them all.

    A signal that comes before Python listens would end the run, so the ranks begin deaf to those that ask to requeue.
    """
    srun = ["exec srun --kill-on-bad-exit=1", f"--cpus-per-task={num_cpus(job.config)}", *_container(job)]
    deaf = """bash -c 'trap "" USR1 USR2; exec "$0" "$@"'"""
    command = [deaf, f"{_python(job.config.submit)} {shlex.quote(str(ROOT / 'run.py'))}", *map(shlex.quote, job.words)]
    return _continued([*srun, *command])


def step_command(config: RunConfig, words: list[str]) -> list[str]:
    """A run as a step of the job that this process is in: on all its nodes, deaf to signals until Python listens."""
    srun = ["srun", "--kill-on-bad-exit=1", f"--cpus-per-task={num_cpus(config)}"]
    deaf = ["bash", "-c", 'trap "" USR1 USR2; exec "$0" "$@"']
    return [*srun, *deaf, sys.executable, str(ROOT / "run.py"), *words]


def _start_worker(job: Job) -> str:
    """The worker takes the shell's place and gets its signals; the word that says which one it is is Slurm's."""
    program = f"exec {_python(job.config.submit)} {shlex.quote(str(ROOT / 'run.py'))}"
    words = [*map(shlex.quote, job.words), 'trials.worker="$SLURM_ARRAY_TASK_ID"']
    return 'trap "" USR1 USR2  # until Python listens\n' + _continued([program, *words])


def _python(submit: SubmitConfig) -> str:
    """This one; in a container the container's."""
    return "python" if submit.container else shlex.quote(sys.executable)


def _container(job: Job) -> list[str]:
    """Flags of pyxis. What the run needs of ours is mounted; data is the user's to mount."""
    submit = job.config.submit
    if submit.container is None:
        return []
    mounts = ",".join([*(f"{path}:{path}" for path in _own_folders(job)), *submit.container_mounts])
    return [
        f"--container-image={shlex.quote(submit.container)}",
        f"--container-mounts={shlex.quote(mounts)}",
        f"--container-workdir={shlex.quote(str(job.place))}",
    ]


def _own_folders(job: Job) -> list[Path]:
    """What the run reads and writes beside its data; none that lies in another one or is mounted by the user."""
    config, submit = job.config, job.config.submit
    models = [config.init_from, config.model.vision_tower, config.model.language_model, config.model.chat_template]
    if isinstance(config.stage, DPOStageConfig):
        models.append(config.stage.reference)
    cache = submit.env.get("HF_HOME", os.environ.get("HF_HOME"))
    named = [
        str(ROOT),
        str(job.place),
        config.run_dir,
        config.data.index_dir,
        # variables in it are the nodes', so nobody here knows the folder
        submit.stage_to if "$" not in (submit.stage_to or "") else None,
        *(path for path in [*models, cache] if path and os.path.isabs(path) and os.path.exists(path)),
    ]
    paths = list(dict.fromkeys(job.place / name for name in named if name))
    hosts = [Path(mount.split(":")[0]) for mount in submit.container_mounts if len(set(mount.split(":")[:2])) == 1]
    return [
        path
        for path in paths
        if not any(path.is_relative_to(other) for other in hosts)
        and not any(path != other and path.is_relative_to(other) for other in paths)
    ]


def _continued(parts: list[str]) -> str:
    return " \\\n  ".join(parts)


def _quoted(value: str) -> str:
    """For a line of #SBATCH, which knows double quotes and backslashes and ends at a #."""
    if value and all(letter.isalnum() or letter in "%+,-./:=@_" for letter in value):
        return value
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def one_line(text: str) -> str:
    return " ".join(text.split())
