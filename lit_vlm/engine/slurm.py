"""Slurm's commands: submitting a job, asking after one, putting one's own back into the queue."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

from lit_vlm.types import UserError

ANSWER_SECONDS = 60.0  # a controller under load is slow; one that is gone should not hold the run
_FROM_A_JOB = re.compile(r"SLURM_(?!CONF$|CLUSTERS$)|(MASTER_(ADDR|PORT)|(LOCAL_|NODE_|GROUP_)?RANK|WORLD_SIZE)$")


def require_slurm(what: str, way_out: str, *commands: str) -> None:
    """UserError where there is no Slurm to submit to.

    Args:
        what: is to be submitted, e.g. "task=submit".
        way_out: what can be done here instead.
        commands: of Slurm, that are needed.
    """
    if missing := [name for name in commands if shutil.which(name) is None]:
        raise UserError(
            f"{what}: there is no {' and no '.join(missing)} on this machine's PATH, so nothing can be submitted from here."
            f" Run it on the cluster's login node, or {way_out}."
        )


def sbatch_words(script: Path, after: str | None) -> list[str]:
    """The command that submits a script.

    Args:
        after: id of the job that must have succeeded before this one starts; if it fails, this one leaves the queue.
    """
    chain = [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"] if after else []
    return ["sbatch", "--parsable", *chain, str(script)]


def sbatch(script: Path, after: str | None = None) -> str:
    """Submit the script; returns the job's id.

    Raises:
        UserError: with what sbatch said.
    """
    try:
        done = _call(sbatch_words(script, after), outside_of_job())
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"sbatch did not answer: {error}. The script is written: {script}") from error
    if done.returncode:
        said = (done.stderr or done.stdout).strip() or f"exit status {done.returncode}"
        raise UserError(
            f"Slurm refuses the job of {script}:\n{said}\nChange submit.* (partition, account, qos, time, constraint,"
            " gpus_per_node, memory); `sinfo` lists the partitions."
        )
    return done.stdout.strip().partition(";")[0]  # id;cluster where there are several


def outside_of_job() -> dict[str, str]:
    """The environment without the words of the job that this process is in: they are not another job's, nor those of a
    program that should not take itself for one of the job's tasks."""
    return {name: value for name, value in os.environ.items() if not _FROM_A_JOB.match(name)}


def signal_steps(job: str, name: str) -> None:
    """Send a signal to the tasks of the job's steps, and not to its script. srun itself would end them at once."""
    _call(["scancel", f"--signal={name}", job])


def state_of(job: str) -> str | None:
    """PENDING, RUNNING, ... of a job that is in the queue; None of any other, and where nobody answers."""
    try:
        done = _call(["squeue", "--noheader", f"--jobs={job}", "--format=%T"])
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.split()[0] if done.returncode == 0 and done.stdout.strip() else None


def own_job() -> str | None:
    """The id of the job that this process is a part of, in the form that scontrol takes; None outside of a job."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


def requeue(job: str) -> str | None:
    """Put the job back into the queue; it ends soon after. Returns what Slurm said if it would not, else None."""
    try:
        done = _call(["scontrol", "requeue", job])
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return None if done.returncode == 0 else (done.stderr or done.stdout).strip() or f"exit status {done.returncode}"


def is_preempted(job: str) -> bool:
    """Whether Slurm is taking the job's nodes for another job; SIGTERM alone does not tell this from scancel."""
    try:
        done = _call(["scontrol", "--oneliner", "show", "job", job])
    except (OSError, subprocess.TimeoutExpired):
        return False
    words = dict(word.split("=", 1) for word in done.stdout.split() if "=" in word)
    taken = words.get("PreemptTime", "None") not in ("None", "Unknown", "N/A", "(null)")
    return taken and words.get("JobState") in ("RUNNING", "SIGNALING")  # not one that is cancelled meanwhile


def _call(words: list[str], environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words,
        env=environment,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=ANSWER_SECONDS,
        check=False,
        start_new_session=True,  # a Ctrl-C in the terminal would leave unknown whether Slurm was told
    )
