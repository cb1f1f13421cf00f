"""Sweep workers as a Slurm job array: each worker takes trials from the shared journal until none is left."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path

from lit_vlm.config import ConfigError, Run, parse
from lit_vlm.config.overrides import get_override_key
from lit_vlm.engine.signals import postpone_signals
from lit_vlm.engine.slurm import build_sbatch_command, get_job_state, require_slurm, submit_job
from lit_vlm.engine.slurm_script import SlurmJob, render_batch_script
from lit_vlm.files import write_json, write_text_atomically
from lit_vlm.tasks.submit import list_files_to_stage
from lit_vlm.tasks.terminal import console, say

JOB_FILE = "slurm.json"


def submit_workers(run: Run, trial_overrides: list[str], prepare_folder: Callable[[], None]) -> None:
    """Write the script of the job array and submit it; in a dry run, show it.

    Args:
        trial_overrides: overrides of one trial; a worker requests the devices and nodes of this trial.
        prepare_folder: prepares the sweep's folder.

    Raises:
        UserError: there is no Slurm here, the workers are in the queue already, or sbatch refused (with its message).
    """
    trials = run.config.trials
    job = make_worker_job(run, trial_overrides)
    if trials.dry_run:
        console.rule(str(job.script_path), align="left")
        print(render_batch_script(job))
        say(shlex.join(build_sbatch_command(job.script_path, None)))
        return
    require_slurm("trials.slurm", "leave trials.slurm out to run the trials here", "sbatch")
    prepare_folder()
    write_text_atomically(job.script_path, render_batch_script(job))
    with postpone_signals():
        number = submit_job(job.script_path)
        write_json(run.dir / JOB_FILE, {"job": number})
    say(f"{run.name}: {trials.slurm} workers, job {number}. Script: {job.script_path}")
    say(f"Follow:  squeue --me;  tail -F {shlex.quote(str(run.dir))}/slurm-*.log")
    say(f"Stop:    scancel --batch --signal=TERM {number}  (trials save first). The same command goes on where it was.")


def make_worker_job(run: Run, trial_overrides: list[str]) -> SlurmJob:
    """Make the Slurm job of the workers.

    Raises:
        ConfigError: the `submit` settings do not fit such a trial.
    """
    submit_overrides = [text for text in run.overrides if get_override_key(text).startswith("submit.")]
    config = parse(
        ["task=submit", *(word for word in trial_overrides if get_override_key(word) != "task"), *submit_overrides]
    ).config
    if config.submit.container is not None:
        raise ConfigError(["submit.container: workers of a sweep start their trials on the node itself; leave it out."])
    dropped_keys = ("trials.dry_run", "trials.worker", "overwrite")
    overrides = [
        text for text in run.overrides if get_override_key(text) not in dropped_keys and text not in submit_overrides
    ]
    staged_files = list_files_to_stage(config.data) if config.submit.stage_to else []
    return SlurmJob(run.name, run.dir, config, overrides, Path.cwd(), staged_files, num_workers=run.config.trials.slurm)


def find_queued_workers(folder: Path) -> str | None:
    """Find the job array that was submitted for this folder and has not ended; None if there is none."""
    try:
        number = str(json.loads((folder / JOB_FILE).read_text(encoding="utf-8"))["job"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return number if get_job_state(number) else None
