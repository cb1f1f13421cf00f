"""Slurm commands: submit a job, query its state, requeue the own job."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

from lit_vlm.types import UserError

ANSWER_SECONDS = 60.0  # a controller under load is slow; a dead one must not block the run
_JOB_VARIABLES = re.compile(r"SLURM_(?!CONF$|CLUSTERS$)|(MASTER_(ADDR|PORT)|(LOCAL_|NODE_|GROUP_)?RANK|WORLD_SIZE)$")


def require_slurm(purpose: str, alternative: str, *commands: str) -> None:
    """Require that Slurm commands are available on this machine.

    Args:
        purpose: what needs them, e.g. "task=submit", for the message.
        alternative: what the user can do here instead, for the message.
        commands: required Slurm commands.

    Raises:
        UserError: a command is not on PATH.
    """
    if missing := [name for name in commands if shutil.which(name) is None]:
        raise UserError(
            f"{purpose}: there is no {' and no '.join(missing)} on this machine's PATH, so nothing can be submitted from here."
            f" Run it on the cluster's login node, or {alternative}."
        )


def build_sbatch_command(script: Path, dependency: str | None) -> list[str]:
    """Build the sbatch command that submits a script.

    Args:
        script: path of the batch script.
        dependency: id of a job that must succeed before this one starts. If it fails, this job leaves the queue.
    """
    options = [f"--dependency=afterok:{dependency}", "--kill-on-invalid-dep=yes"] if dependency else []
    return ["sbatch", "--parsable", *options, str(script)]


def submit_job(script: Path, dependency: str | None = None) -> str:
    """Submit a batch script with sbatch and return the job id.

    Raises:
        UserError: sbatch failed or did not answer. The message holds its output.
    """
    try:
        done = _call_slurm(build_sbatch_command(script, dependency), get_environment_outside_job())
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"sbatch did not answer: {error}. The script is written: {script}") from error
    if done.returncode:
        message = (done.stderr or done.stdout).strip() or f"exit status {done.returncode}"
        raise UserError(
            f"Slurm refuses the job of {script}:\n{message}\nChange submit.* (partition, account, qos, time, constraint,"
            " gpus_per_node, memory); `sinfo` lists the partitions."
        )
    return done.stdout.strip().partition(";")[0]  # "id;cluster" on a multi-cluster system


def get_environment_outside_job() -> dict[str, str]:
    """Return the environment without the variables of the current Slurm job.

    Another job must not inherit them. Nor must a program that would take itself for a task of this job.
    """
    return {name: value for name, value in os.environ.items() if not _JOB_VARIABLES.match(name)}


def send_signal(job: str, name: str) -> None:
    """Send a signal to the tasks of a job's steps, but not to its script. A signal to srun would end the tasks at once."""
    _call_slurm(["scancel", f"--signal={name}", job])


def get_job_state(job: str) -> str | None:
    """Return the state of a queued job (PENDING, RUNNING, ...); None if it is not in the queue or Slurm does not answer."""
    try:
        done = _call_slurm(["squeue", "--noheader", f"--jobs={job}", "--format=%T"])
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.split()[0] if done.returncode == 0 and done.stdout.strip() else None


def get_own_job() -> str | None:
    """Return the id of the job that this process belongs to, in the form that scontrol accepts; None outside of a job."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


def requeue(job: str) -> str | None:
    """Requeue the own job, which Slurm ends soon after. Return None on success, else the error message of Slurm.

    A controller under load may requeue it without an answer in time, and a preempted job is requeued by Slurm itself. So after
    an error the number of restarts decides.
    """
    try:
        done = _call_slurm(["scontrol", "requeue", job])
    except (OSError, subprocess.TimeoutExpired) as error:
        refusal = str(error)
    else:
        if done.returncode == 0:
            return None
        refusal = (done.stderr or done.stdout).strip() or f"exit status {done.returncode}"
    restarts = _read_job(job).get("Restarts", "0")
    return None if int(restarts) > int(os.environ.get("SLURM_RESTART_COUNT", "0")) else refusal


def is_preempted(job: str) -> bool:
    """Return whether Slurm is preempting the job. SIGTERM alone does not distinguish this from scancel."""
    fields = _read_job(job)
    preempted = fields.get("PreemptTime", "None") not in ("None", "Unknown", "N/A", "(null)")
    # excludes a job that is being cancelled
    return preempted and fields.get("JobState") in ("RUNNING", "SIGNALING")


def _read_job(job: str) -> dict[str, str]:
    """Read what Slurm knows of a job, by field; {} if it does not answer."""
    try:
        done = _call_slurm(["scontrol", "--oneliner", "show", "job", job])
    except (OSError, subprocess.TimeoutExpired):
        return {}
    return dict(field.split("=", 1) for field in done.stdout.split() if "=" in field)


def _call_slurm(command: list[str], environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        env=environment,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=ANSWER_SECONDS,
        check=False,
        start_new_session=True,  # else a Ctrl-C in the terminal could interrupt the command halfway
    )
