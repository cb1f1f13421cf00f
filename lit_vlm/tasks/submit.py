"""task=submit: submits a run, or all stages of a recipe, as Slurm jobs. Read top to bottom.

The script starts the same command that would run here. So run name and run folder are the same, and a requeued job resumes its
own run.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from lit_vlm.config import Run, is_ladder, parse, pipeline_overrides, stages_of
from lit_vlm.config.overrides import key_of
from lit_vlm.config.schema import DataConfig, Format
from lit_vlm.engine.run_folder import find_manifest, require_writable
from lit_vlm.engine.signals import postponing
from lit_vlm.engine.slurm import require_slurm, sbatch, sbatch_words, state_of
from lit_vlm.engine.slurm_script import Job, one_line, script_of
from lit_vlm.files import writable, write_atomically, write_json
from lit_vlm.tasks.terminal import console, say
from lit_vlm.types import UserError

OWN_PICTURES = (".parquet", ".arrow", ".tar")  # they contain their images, so no other file of the folder is read


def submit(run: Run) -> None:
    """Write the scripts into the run folders and submit them. Each stage of a recipe waits for the previous one.

    Finished stages are skipped. Jobs that are in the queue already stay there.

    Raises:
        UserError: there is no Slurm here, a folder cannot be written, or sbatch refused (with its message).
    """
    if not run.config.submit.dry_run:
        require_slurm("task=submit", "write and print the script alone with submit.dry_run=true", "sbatch")
    stages = _stages(run)
    waiting = [stage for stage in stages if not _is_finished(stage)]
    if not waiting:
        say(f"{run.name}: finished already, in {stages[-1].dir}. Nothing is submitted; overwrite=true starts it anew.")
        return
    for stage in waiting:
        require_writable(stage.dir)
        # a container can mount only a folder that exists
        if stage.config.submit.container and stage.config.data.index_dir:
            index = Path(stage.config.data.index_dir)
            with writable(index):
                index.mkdir(parents=True, exist_ok=True)
    jobs: list[str] = []
    for stage in waiting:
        jobs.append(_submit_one(stage, jobs[-1] if jobs else None))
    if not run.config.submit.dry_run:
        _say_how_to_follow(waiting, jobs)


def _stages(run: Run) -> list[Run]:
    """List the run itself, or one run for each stage of the recipe."""
    if not is_ladder(run.overrides):
        return [run]
    stages = stages_of(run.config.recipe, run.overrides)
    return [
        parse(["task=submit", f"experiment={experiment}", *pipeline_overrides(run.overrides, experiment)])
        for experiment in stages
    ]


def _is_finished(stage: Run) -> bool:
    finished = find_manifest(stage.dir).get("status") == "finished" and not stage.config.overwrite
    if finished:
        say(f"{stage.name}: finished already, in {stage.dir}")
    return finished


def _submit_one(stage: Run, after: str | None) -> str:
    """Submit one stage; return the id of its job, or in a dry run a placeholder for it."""
    job = job_of(stage)
    queued = None if stage.config.submit.dry_run else _queued(job)
    if queued:
        say(
            f"{stage.name}: is in the queue already, as job {queued}. End it with `scancel {queued}`, or with"
            f" `scancel --signal=TERM {queued}` so that it saves first, to submit it anew."
        )
        return queued
    text = script_of(job)
    try:
        job.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(job.script, text)
    except OSError as error:
        raise UserError(f"{job.script} cannot be written: {error.strerror}. Choose another run_dir.") from error
    if stage.config.submit.dry_run:
        console.rule(str(job.script), align="left")
        print(text)
        say(shlex.join(sbatch_words(job.script, after)))
        return f"<job of {stage.name}>"
    with postponing():
        number = sbatch(job.script, after)
        write_json(job.folder / "slurm.json", {"job": number})
    say(f"{stage.name}: job {number}{f', after {after}' if after else ''}. Script: {job.script}")
    return number


def job_of(stage: Run) -> Job:
    """Make the Slurm job of a stage: its task=train command, and the files to copy to the node."""
    config = stage.config
    overrides = [text for text in stage.overrides if key_of(text) != "task" and not key_of(text).startswith("submit.")]
    staged_files = files_to_stage(config.data) if config.submit.stage_to else []
    return Job(stage.name, stage.dir, config, ["task=train", *overrides], Path.cwd(), staged_files)


def files_to_stage(data: DataConfig) -> list[Path]:
    """List what the sources read: their files, and the folders of their images."""
    paths: list[Path] = []
    for source in [*data.sources.values(), *data.validation.sources.values()]:
        if source.path is None or source.format in (Format.builtin, Format.digits):
            continue
        path = Path(source.path)
        has_images_beside = path.is_file() and source.image_root is None and path.suffix.lower() not in OWN_PICTURES
        paths += [path.parent if has_images_beside else path, *([Path(source.image_root)] if source.image_root else [])]
    paths = list(dict.fromkeys(paths))
    return [path for path in paths if not any(path != other and path.is_relative_to(other) for other in paths)]


def _queued(job: Job) -> str | None:
    """Find the job that was submitted for this folder and has not ended; None if there is none."""
    try:
        number = str(json.loads((job.folder / "slurm.json").read_text(encoding="utf-8"))["job"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return number if state_of(number) else None


def _say_how_to_follow(stages: list[Run], jobs: list[str]) -> None:
    first, config = stages[0], stages[0].config
    say(f"Follow:  squeue --me;  tail -F {shlex.quote(str(first.dir))}/slurm-*.log")
    say(
        f"Stop:    scancel --signal=TERM {' '.join(jobs)}  (the job that runs saves first; plain scancel leaves it few"
        " seconds). The same task=submit goes on where it was."
    )
    if config.logger.wandb and config.submit.env.get("WANDB_MODE", "offline") == "offline":
        for stage in stages:
            say(
                f"W&B:     python run.py task=sync sync={shlex.quote(one_line(str(stage.dir)))}  (here, once the run has ended)"
            )
