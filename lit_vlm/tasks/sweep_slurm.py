"""Sweep workers as a Slurm job array: each worker takes trials from the shared journal until none is left."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path

from lit_vlm.config import ConfigError, Run, parse
from lit_vlm.config.overrides import key_of
from lit_vlm.engine.signals import postponing
from lit_vlm.engine.slurm import require_slurm, sbatch, sbatch_words, state_of
from lit_vlm.engine.slurm_script import Job, script_of
from lit_vlm.files import write_atomically, write_json
from lit_vlm.tasks.submit import files_to_stage
from lit_vlm.tasks.terminal import console, say

KEPT = "slurm.json"


def submit_workers(run: Run, trial: list[str], settle: Callable[[], None]) -> None:
    """Write the script of the job array and submit it; in a dry run, show it.

    Args:
        trial_overrides: overrides of one trial; a worker requests the devices and nodes of this trial.
        prepare_folder: prepares the sweep's folder.

    Raises:
        UserError: there is no Slurm here, the workers are in the queue already, or sbatch refused (with its message).
    """
    trials = run.config.trials
    job = worker_job(run, trial)
    if trials.dry_run:
        console.rule(str(job.script), align="left")
        print(script_of(job))
        say(shlex.join(sbatch_words(job.script, None)))
        return
    require_slurm("trials.slurm", "leave trials.slurm out to run the trials here", "sbatch")
    settle()
    write_atomically(job.script, script_of(job))
    with postponing():
        number = sbatch(job.script)
        write_json(run.dir / KEPT, {"job": number})
    say(f"{run.name}: {trials.slurm} workers, job {number}. Script: {job.script}")
    say(f"Follow:  squeue --me;  tail -F {shlex.quote(str(run.dir))}/slurm-*.log")
    say(f"Stop:    scancel --batch --signal=TERM {number}  (trials save first). The same command goes on where it was.")


def worker_job(run: Run, trial: list[str]) -> Job:
    """Make the Slurm job of the workers.

    Raises:
        ConfigError: the `submit` settings do not fit such a trial.
    """
    submit_overrides = [text for text in run.overrides if key_of(text).startswith("submit.")]
    config = parse(["task=submit", *(word for word in trial if key_of(word) != "task"), *submit_overrides]).config
    if config.submit.container is not None:
        raise ConfigError(["submit.container: workers of a sweep start their trials on the node itself; leave it out."])
    dropped_keys = ("trials.dry_run", "trials.worker", "overwrite")
    overrides = [text for text in run.overrides if key_of(text) not in dropped_keys and text not in submit_overrides]
    staged_files = files_to_stage(config.data) if config.submit.stage_to else []
    return Job(run.name, run.dir, config, overrides, Path.cwd(), staged_files, workers=run.config.trials.slurm)


def queued_workers(folder: Path) -> str | None:
    """Find the job array that was submitted for this folder and has not ended; None if there is none."""
    try:
        number = str(json.loads((folder / KEPT).read_text(encoding="utf-8"))["job"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return number if state_of(number) else None
