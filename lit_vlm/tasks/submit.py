"""task=submit: submits a run, or all stages of a recipe, as Slurm jobs. Read top to bottom.

The script starts the same command that would run here. So run name and run folder are the same, and a requeued job resumes its
own run.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from lit_vlm.cluster.batch_script import SlurmJob, render_batch_script, to_one_line
from lit_vlm.cluster.slurm import build_sbatch_command, get_job_state, require_slurm, submit_job
from lit_vlm.config import ConfigError, Run, build_stage_overrides, is_pipeline, list_stages, parse
from lit_vlm.config.choices import Format
from lit_vlm.config.overrides import get_override_key, quote_value
from lit_vlm.config.schema import DataConfig, ModelConfig, StageConfig, SubmitConfig, TrainerConfig
from lit_vlm.config.slurm_options import get_cpus_per_task
from lit_vlm.config.task_settings import TrialsConfig
from lit_vlm.data.readers.record_files import find_pattern_folder, is_pattern
from lit_vlm.fault_tolerance.signals import postpone_signals
from lit_vlm.files import handle_write_errors, read_json_or_none, write_json, write_text_atomically
from lit_vlm.runs.run_folder import read_manifest_or_empty, require_finished_parent, require_writable
from lit_vlm.tasks.terminal import console, say
from lit_vlm.types import UserError

EMBEDDED_IMAGE_SUFFIXES = (
    ".parquet",
    ".arrow",
    ".tar",
)  # they contain their images, so no other file of the folder is read


def submit(run: Run) -> None:
    """Write the scripts into the run folders and submit them. Each stage of a recipe waits for the previous one.

    Finished stages are skipped. Jobs that are in the queue already stay there.

    Raises:
        UserError: there is no Slurm here, a job would end at its start, a folder cannot be written, or sbatch refused
            (with its message). A dry run shows the scripts first.
    """
    if not run.config.submit.dry_run:
        require_slurm("task=submit", "write and print the script alone with submit.dry_run=true", "sbatch")
    stages = (
        [run]
        if not is_pipeline(run.overrides)
        else list(map(parse, _list_stage_overrides(run.config.recipe, run.overrides)))
    )
    waiting = [stage for stage in stages if not _is_finished(stage.name, stage.dir, overwrite=stage.config.overwrite)]
    if not waiting:
        say(f"{run.name}: finished already, in {stages[-1].dir}. Nothing is submitted; overwrite=true starts it anew.")
        return
    errors = find_missing_parent_errors(run.config.init_from)
    for stage in waiting:
        errors += find_source_errors(stage.config.data, stage.config.run_dir, stage.config.seed)
    errors = list(dict.fromkeys(errors))
    if errors and not run.config.submit.dry_run:
        raise ConfigError(errors)
    for stage in waiting:
        require_writable(stage.dir)
        # a container can mount only a folder that exists
        if stage.config.submit.container and stage.config.data.index_dir:
            index = Path(stage.config.data.index_dir)
            with handle_write_errors(index):
                index.mkdir(parents=True, exist_ok=True)
    jobs: list[str] = []
    for stage in waiting:
        job = make_job(stage)
        jobs.append(_submit_job(job, jobs[-1] if jobs else None))
        if stage.config.submit.exam:
            _submit_job(make_exam_job(job), jobs[-1])
    if errors:
        raise ConfigError([f"{error} So it would not be submitted." for error in errors])
    if not run.config.submit.dry_run:
        first = waiting[0].config
        wants_sync = first.logger.wandb and first.submit.env.get("WANDB_MODE", "offline") == "offline"
        _print_follow_commands([stage.dir for stage in waiting], jobs, wants_sync=wants_sync)


def find_missing_parent_errors(init_from: str | None) -> list[str]:
    """Find the error of a model that is not there. One that an earlier stage leaves is not expected yet."""
    if init_from in (None, "previous"):
        return []
    try:
        require_finished_parent(init_from)
    except UserError as error:
        return [str(error)]
    return []


def find_source_errors(data: DataConfig, run_dir: str, seed: int) -> list[str]:
    """Find the errors of sources that a job could not open at its start.

    They are opened as the job opens them: files, format, first record. Datasets of the hub are not looked up.
    """
    from lit_vlm.data.selection import require_contamination_search
    from lit_vlm.data.sources import open_source

    try:
        require_contamination_search(data)
    except UserError as error:
        return [str(error)]
    errors = list[str]()
    cache = Path(data.index_dir) if data.index_dir else Path(run_dir) / "index"
    options: dict[str, Any] = {"max_image_pixels": data.max_image_pixels, "seed": seed, "cache": cache}
    for table, held_out in ((data.sources, False), (data.validation.sources, True)):
        for name, source in table.items():
            if source.hub is None:
                try:
                    open_source(name, source, held_out=held_out, **options)
                except UserError as error:
                    errors.append(str(error))
    return errors


def _list_stage_overrides(recipe: str, overrides: list[str]) -> list[list[str]]:
    """List the overrides of each stage of the recipe."""
    return [
        ["task=submit", f"experiment={experiment}", *build_stage_overrides(overrides, experiment)]
        for experiment in list_stages(recipe, overrides)
    ]


def _is_finished(name: str, folder: Path, *, overwrite: bool) -> bool:
    finished = read_manifest_or_empty(folder).get("status") == "finished" and not overwrite
    if finished:
        say(f"{name}: finished already, in {folder}")
    return finished


def _submit_job(job: SlurmJob, previous_job: str | None) -> str:
    """Submit the job of one stage; return its id, or in a dry run a placeholder for it."""
    queued = None if job.submit.dry_run else _find_queued_job(job)
    if queued:
        say(
            f"{job.name}: is in the queue already, as job {queued}. End it with `scancel {queued}`, or with"
            f" `scancel --signal=TERM {queued}` so that it saves first, to submit it anew."
        )
        return queued
    text = render_batch_script(job)
    try:
        job.folder.mkdir(parents=True, exist_ok=True)
        write_text_atomically(job.script_path, text)
    except OSError as error:
        raise UserError(f"{job.script_path} cannot be written: {error.strerror}. Choose another run_dir.") from error
    if job.submit.dry_run:
        console.rule(str(job.script_path), align="left")
        print(text)
        say(shlex.join(build_sbatch_command(job.script_path, previous_job)))
        return f"<job of {job.name}>"
    with postpone_signals():
        number = submit_job(job.script_path, previous_job)
        write_json(job.folder / "slurm.json", {"job": number})
    say(f"{job.name}: job {number}{f', after {previous_job}' if previous_job else ''}. Script: {job.script_path}")
    return number


def make_job(stage: Run) -> SlurmJob:
    """Make the Slurm job of a stage: its task=train command, and the files to copy to the node."""
    config = stage.config
    overrides = [
        text
        for text in stage.overrides
        if get_override_key(text) != "task" and not get_override_key(text).startswith("submit.")
    ]
    return SlurmJob(
        stage.name,
        stage.dir,
        config.submit,
        config.trainer,
        get_cpus_per_task(config.submit, config.data.num_workers),
        list_run_folders(config.run_dir, config.data.index_dir),
        list_models(config.init_from, config.model, config.stage),
        ["task=train", *overrides],
        Path.cwd(),
        list_files_to_stage(config.data) if config.submit.stage_to else [],
    )


def make_exam_job(job: SlurmJob) -> SlurmJob:
    """Make the job that takes the exam with the model of a stage's job: one process on one device."""
    dropped = ("task", "init_from", "overwrite", "resume_from", "run_name")
    kept = [text for text in job.overrides if get_override_key(text) not in dropped]
    model, gpus = (job.folder / "hf").as_posix(), job.submit.gpus_per_node
    return replace(
        job,
        name=f"{job.name}/exam",
        folder=job.folder / "exam",
        submit=replace(job.submit, gpus_per_node=gpus and 1),
        trainer=replace(job.trainer, devices=1, num_nodes=1),
        models=[model],
        overrides=["task=exam", *kept, f"init_from={quote_value(model)}"],
        staged_paths=[],
    )


def list_run_folders(run_dir: str, index_dir: str | None) -> list[str]:
    """List the folders that a run writes."""
    return [run_dir, *([index_dir] if index_dir else [])]


def list_models(init_from: str | None, model: ModelConfig, stage: StageConfig) -> list[str]:
    """List the models that a run reads: folders and hub ids."""
    models = [init_from, model.vision_tower, model.language_model, model.chat_template, *stage.model_folders]
    return [name for name in models if name]


def list_files_to_stage(data: DataConfig) -> list[Path]:
    """List what the sources read: their files, and the folders of their images."""
    paths: list[Path] = []
    for source in [*data.sources.values(), *data.validation.sources.values()]:
        if source.path is None or source.format in (Format.builtin, Format.digits):
            continue
        path = Path(source.path)
        has_images_beside = (
            path.is_file() and source.image_root is None and path.suffix.lower() not in EMBEDDED_IMAGE_SUFFIXES
        )
        if is_pattern(source.path):
            path = find_pattern_folder(source.path)
        roots = source.image_root if isinstance(source.image_root, list) else [source.image_root]
        paths += [path.parent if has_images_beside else path, *(Path(root) for root in roots if root)]
    paths = list(dict.fromkeys(paths))
    return [path for path in paths if not any(path != other and path.is_relative_to(other) for other in paths)]


def _find_queued_job(job: SlurmJob) -> str | None:
    """Find the job that was submitted for this folder and has not ended; None if there is none."""
    try:
        number = str(read_json_or_none(job.folder / "slurm.json")["job"])
    except (KeyError, TypeError):
        return None
    return number if get_job_state(number) else None


def _print_follow_commands(folders: list[Path], jobs: list[str], *, wants_sync: bool) -> None:
    say(f"Follow:  squeue --me;  tail -F {shlex.quote(str(folders[0]))}/slurm-*.log")
    say(
        f"Stop:    scancel --signal=TERM {' '.join(jobs)}  (the job that runs saves first; plain scancel leaves it few"
        " seconds). The same task=submit resumes it."
    )
    if wants_sync:
        for folder in folders:
            say(
                f"W&B:     python run.py task=sync sync={shlex.quote(to_one_line(str(folder)))}  (here, once the run has ended)"
            )


JOB_FILE = "slurm.json"


def submit_workers(
    name: str,
    folder: Path,
    overrides: list[str],
    trials: TrialsConfig,
    trial_overrides: list[str],
    prepare_folder: Callable[[], None],
) -> None:
    """Write the script of the job array and submit it; in a dry run, show it.

    Args:
        name, folder, overrides: of the sweep.
        trial_overrides: overrides of one trial; a worker requests the devices and nodes of this trial.
        prepare_folder: prepares the sweep's folder.

    Raises:
        UserError: there is no Slurm here, the workers are in the queue already, or sbatch refused (with its message).
    """
    job = make_worker_job(name, folder, overrides, trials.slurm, trial_overrides)
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
        write_json(folder / JOB_FILE, {"job": number})
    say(f"{name}: {trials.slurm} workers, job {number}. Script: {job.script_path}")
    say(f"Follow:  squeue --me;  tail -F {shlex.quote(str(folder))}/slurm-*.log")
    say(f"Stop:    scancel --batch --signal=TERM {number}  (trials save first). The same command resumes it.")


def make_worker_job(
    name: str, folder: Path, overrides: list[str], num_workers: int | None, trial_overrides: list[str]
) -> SlurmJob:
    """Make the Slurm job of the workers.

    Raises:
        ConfigError: the `submit` settings do not fit such a trial.
    """
    submit_overrides = [text for text in overrides if get_override_key(text).startswith("submit.")]
    config = parse(
        ["task=submit", *(word for word in trial_overrides if get_override_key(word) != "task"), *submit_overrides]
    ).config
    if config.submit.container is not None:
        raise ConfigError(["submit.container: workers of a sweep start their trials on the node itself; leave it out."])
    dropped_keys = ("trials.dry_run", "trials.worker", "overwrite")
    worker_overrides = [
        text for text in overrides if get_override_key(text) not in dropped_keys and text not in submit_overrides
    ]
    return SlurmJob(
        name,
        folder,
        config.submit,
        config.trainer,
        get_cpus_per_task(config.submit, config.data.num_workers),
        list_run_folders(config.run_dir, config.data.index_dir),
        list_models(config.init_from, config.model, config.stage),
        worker_overrides,
        Path.cwd(),
        list_files_to_stage(config.data) if config.submit.stage_to else [],
        num_workers=num_workers,
    )


def find_queued_workers(folder: Path) -> str | None:
    """Find the job array that was submitted for this folder and has not ended; None if there is none."""
    try:
        number = str(read_json_or_none(folder / JOB_FILE)["job"])
    except (KeyError, TypeError):
        return None
    return number if get_job_state(number) else None


def submit_curation(hashing: SlurmJob) -> None:
    """Submit the job array that hashes the records of a curation, and the job that searches after it; in a dry run, show both.

    Raises:
        UserError: there is no Slurm here, the folder cannot be written, or sbatch refused (with its message).
    """
    dry_run, folder = hashing.submit.dry_run, hashing.folder
    if not dry_run:
        require_slurm("curate.slurm", "leave curate.slurm out to search here", "sbatch")
    require_writable(folder)
    search = replace(
        hashing,
        name=f"{hashing.name}/search",
        folder=folder / "search",
        overrides=[text for text in hashing.overrides if get_override_key(text) != "curate.slurm"],
        num_workers=None,
    )
    first = _submit_job(hashing, None)
    second = _submit_job(search, first)
    if not dry_run:
        say(f"Follow:  squeue --me;  tail -F {shlex.quote(str(folder))}/slurm-*.log")
        say(f"Stop:    scancel {first} {second}  (what is hashed stays). The same command submits what is left.")


def make_hashing_job(
    name: str,
    folder: Path,
    overrides: list[str],
    submit: SubmitConfig,
    trainer: TrainerConfig,
    data: DataConfig,
    run_dir: str,
    num_workers: int | None,
) -> SlurmJob:
    """Make the Slurm job array whose elements hash one share of the records each.

    Args:
        name, folder: of the results; the folder gets the scripts and the logs.
        overrides: of the curation.
    """
    cpus = submit.cpus_per_task or data.index_workers or 1 + data.num_workers
    kept = [text for text in overrides if not get_override_key(text).startswith("submit.")]
    return SlurmJob(
        name,
        folder,
        submit,
        replace(trainer, accelerator="cpu", devices=1, num_nodes=1, num_threads=1),
        cpus,
        list_run_folders(run_dir, data.index_dir),
        [],
        kept if data.index_workers is not None else [*kept, f"data.index_workers={cpus}"],
        Path.cwd(),
        list_files_to_stage(data) if submit.stage_to else [],
        num_workers=num_workers,
        worker_key="curate.worker",
        written_by="curate",
    )
