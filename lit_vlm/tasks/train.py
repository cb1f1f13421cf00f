"""Training of one stage: from the settings to a model folder that plain transformers loads. Read top to bottom."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import yaml
from rich.table import Table

from callbacks import check_user_callbacks, make_callbacks
from lit_vlm.checkpoint import CheckpointFolder, RunFingerprint
from lit_vlm.config import Run
from lit_vlm.config.callbacks import choose_callbacks
from lit_vlm.config.schema import DebugMode, RunConfig
from lit_vlm.distributed.ranks import is_restarted
from lit_vlm.distributed.trainer import DEBUG_FAST_STEPS, close_process_group, make_trainer
from lit_vlm.fault_tolerance.exit_status import CoordinatedExit
from lit_vlm.fault_tolerance.oom import BUDGET_FILE as BUDGET
from lit_vlm.fault_tolerance.oom import MicroBatchBudget
from lit_vlm.fault_tolerance.run_lock import RunLock
from lit_vlm.fault_tolerance.skipped_steps import SKIPPED_STEPS_FILE as SKIPPED
from lit_vlm.files import handle_write_errors, write_text_atomically
from lit_vlm.formatting import format_count
from lit_vlm.loggers import RunTracker
from lit_vlm.model.skeleton import defer_weights
from lit_vlm.model.spec import ModelSpec
from lit_vlm.model.tensor_files import compute_weights_digest
from lit_vlm.redaction import redact
from lit_vlm.reports.report import write_report
from lit_vlm.runs.run_folder import (
    RunFolder,
    compute_parts_digest,
    compute_sources_digest,
    describe_parent,
    extract_identity,
    is_rank_zero,
    open_run_folder,
    read_manifest,
    require_finished_parent,
    to_plain,
)
from lit_vlm.stages import STAGES, Stage
from lit_vlm.tasks.mixture_lock import check_mixture_lock, get_template_date
from lit_vlm.tasks.prepare_data import (
    StageData,
    apply_quarantine,
    build_stage_data,
    count_unread_keys,
    format_held_out_hint,
    open_sources,
    require_record_type,
)
from lit_vlm.tasks.restarts import run_fit, run_with_restarts
from lit_vlm.tasks.strategy import resolve_auto_strategy
from lit_vlm.tasks.terminal import console, say
from lit_vlm.types import UserError


def train(run: Run) -> None:
    """Train one stage. An interrupted run resumes from its last checkpoint; a finished run is reported and stays unchanged."""
    is_requeued = is_restarted()  # its overrides may hold resume_from=none, which was meant for the first start
    tracking = RunTracker(run.config.logger, run.dir, run.experiment, say=lambda text: say(f"{run.name}: {text}"))
    with RunLock(run.dir) as run_lock, tracking:
        # each start needs its own copy: it writes the paths of the tiny parts into the config
        run_with_restarts(lambda again: train_once(copy.deepcopy(run), run_lock, tracking, again or is_requeued))


def train_once(run: Run, run_lock: RunLock, tracking: RunTracker, is_restart: bool = False) -> None:
    """Run one start of the stage: read the data, build model and trainer, lock the run folder, fit, write the results.

    Args:
        run_lock: lock of the run folder.
        tracking: the run's loggers.
        is_restart: the same command started this run before, so it resumes from the last checkpoint.
    """
    config = run.config
    require_finished_parent(run.init_from)
    sources, held_out = open_sources(run)
    open_folder = partial(
        open_run_folder,
        run.dir,
        config,
        name=run.name,
        overwrite=config.overwrite,
        data_digest=compute_sources_digest([*sources, *held_out]),
        parent=describe_parent(run.init_from),
    )
    folder = open_folder()
    if not folder.is_finished and run.dir.is_dir() and run_lock.acquire():
        folder = open_folder()  # another process may have trained this run until it released the lock
    checkpoints = CheckpointFolder(run.dir / "checkpoints")
    if folder.rebuild_note:
        say(f"{run.name}: {folder.rebuild_note}")
    if folder.is_finished:
        if folder.rebuild_note:
            folder.update()
        if is_rank_zero() and folder.hf_path.is_dir():
            checkpoints.remove_all(keep_best=True)  # an earlier start was interrupted while it finished
        say(
            f"{run.name}: finished already, in {folder.path}. {format_export_hint(folder)}Start it anew with overwrite=true."
        )
        tracking.send_missing(folder)
        return

    tracking.check(folder)
    if folder.replaces_other_run and Path(config.resume_from).resolve().is_relative_to(checkpoints.path.resolve()):
        raise UserError(
            f"resume_from={config.resume_from} is a checkpoint of the run that overwrite=true replaces. Give this run a name "
            "of its own (run_name=...), or leave overwrite=true out."
        )

    chosen_callbacks = choose_callbacks(config.callbacks, export=config.export, profile=should_profile(config))
    check_user_callbacks(chosen_callbacks)
    data = build_stage_data(run, sources, held_out, run.init_from)
    datamodule = data.datamodule
    make_stage(data.spec, config)  # an error in its settings must come before the data are read
    datamodule.build_indexes()
    quarantined = apply_quarantine(data)
    require_record_type(config.stage, datamodule)

    is_fresh_start = folder.replaces_other_run or (config.resume_from == "none" and not is_restart)
    if not is_fresh_start:
        MicroBatchBudget.read(run.dir, datamodule).apply(datamodule)
    callbacks = make_callbacks(
        chosen_callbacks,
        run.dir,
        max_samples=get_max_scored_samples(config),
        **asdict(config.checkpoint),
        **asdict(config.guard),
        resume_from="auto" if is_restart and checkpoints.list_steps() else config.resume_from,
        belongs=make_run_fingerprint(folder, data),
        timeout_minutes=config.trainer.timeout_minutes,
        metric=config.logger.metric,
        say=lambda text: say(f"{run.name}: {text}"),
    )
    resolved_config = resolve_auto_strategy(data, lambda: make_stage(data.spec, config))
    stage = make_stage(data.spec, resolved_config)
    stage.say = lambda text: say(f"{run.name}: {text}")
    trainer = make_trainer(resolved_config, tracking.make_loggers(), callbacks)
    plan = datamodule.make_plan(trainer.world_size)
    if config.data.validation.every_steps:
        trainer.val_check_interval = (
            config.data.validation.every_steps * plan.accumulate_grad_batches
        )  # Lightning counts micro-batches
    trainer.log_every_n_steps = min(trainer.log_every_n_steps, plan.num_steps)  # a short run writes a row, too
    with defer_weights() if getattr(trainer.strategy, "loads_in_shards", False) else nullcontext():
        stage.configure_model()
    show_training_summary(data, stage)
    check_mixture_lock(data)
    # not earlier: an error in the data, the model or the trainer's settings must leave an older run unchanged
    if run_lock.acquire() and read_manifest(run.dir):
        raise UserError(
            f"{run.dir}: another process began this run meanwhile. Start it again to go on where that came to."
        )
    if folder.replaces_other_run and is_rank_zero():
        checkpoints.remove_all()
    if is_fresh_start and is_rank_zero():
        for name in (SKIPPED, BUDGET):  # of the previous run in this folder
            (run.dir / name).unlink(missing_ok=True)
    folder.update(
        trained=[row.to_dict() for row in stage.part_summary],
        data=folder.manifest["data"]
        | {
            "index_digest": datamodule.index.compute_digest(),
            "num_samples": len(datamodule.index),
            "num_held_out": len(datamodule.held_out),
            "mixture": datamodule.mixture.summarize(plan.get_sample_sequence()),
            "quarantined": quarantined,
            "processor": datamodule.processor.digest,
            "pictures": datamodule.index.compute_image_digest(),
            "unread": count_unread_keys(data.datamodule),
        },
        **get_template_date(data),
        plan={
            "steps": plan.num_steps,
            "k": plan.accumulate_grad_batches,
            "global_batch_size": plan.global_batch_size,
            "global_batch_tokens": plan.global_batch_tokens,
            "world_size": plan.world_size,
        },
        tracking=tracking.get_tracking_record(folder),
    )
    if is_rank_zero():
        text = yaml.safe_dump(redact(to_plain(asdict(config))), allow_unicode=True, sort_keys=False)
        with handle_write_errors(run.dir, "config.yaml", "run_dir"):
            write_text_atomically(run.dir / "config.yaml", text, remove_secrets=False)
    tracking.open(folder)

    try:
        run_fit(trainer, stage, datamodule, run)
    except CoordinatedExit as left:
        tracking.close_after_error(left)
        close_process_group()
        raise
    close_process_group()  # the rest is done by rank 0 alone; the other ranks do not wait

    if is_rank_zero():
        figures = {
            key: value
            for callback in callbacks
            if hasattr(callback, "figures")
            for key, value in callback.figures().items()
        }
        figures |= {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        tracking.require_metric(figures)
        weights = compute_weights_digest(folder.hf_path) if folder.hf_path.is_dir() else ""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        folder.update(finished=now, figures=figures, weights_digest=weights)
        write_report(run.dir / "report.html", [run.dir], run.name)
        folder.update(status="finished")  # if it ends before this line, the next start resumes from the last checkpoint
        if folder.hf_path.is_dir():  # the model is exported; without it (export=false) the last checkpoint stays
            checkpoints.remove_all(keep_best=True)
        tracking.finish(folder)
        model = f"Model: {folder.hf_path}   " if folder.hf_path.is_dir() else format_export_hint(folder)
        say(f"{run.name}: done. {model}Report: {run.dir / 'report.html'}")
        if not datamodule.held_out:
            say(format_held_out_hint(len(datamodule.index)))


def format_export_hint(folder: RunFolder) -> str:
    """Return the command that exports the model of a finished run; "" if the model is there already."""
    if folder.hf_path.is_dir():
        return ""
    return f"It left no model (export=false); python run.py task=export init_from={folder.path} makes it.   "


def should_profile(config: RunConfig) -> bool:
    """Return whether the run profiles its steps."""
    return config.trainer.profile or config.debug is DebugMode.profile


def get_max_scored_samples(config: RunConfig) -> int:
    """Return the maximum number of held-out samples that are scored with generated answers."""
    return DEBUG_FAST_STEPS if config.debug is DebugMode.fast else config.data.validation.max_samples


def make_run_fingerprint(folder: RunFolder, data: StageData) -> RunFingerprint:
    """Make the fingerprint that ties a checkpoint to this run: stage, settings, data, parent weights, processor, images."""
    manifest, spec, index = folder.manifest, data.spec, data.datamodule.index
    assert index is not None
    parent = (manifest["parent"] or {}).get("digest") or compute_parts_digest(
        spec.whole, spec.vision_tower, spec.language_model
    )
    return RunFingerprint(
        stage=manifest["stage"],
        settings=extract_identity(manifest["config"]),
        data=manifest["data"]["digest"],
        parent=parent,
        processor=data.datamodule.processor.digest,
        pictures=index.compute_image_digest(),
    )


def make_stage(spec: ModelSpec, config: RunConfig) -> Stage:
    """Make the stage of these settings: its class, options, precision of trainable and frozen weights. Reads no weights."""
    precision = config.trainer.precision
    dtype = "bfloat16" if precision == "bf16-true" else "float32"
    frozen_dtype = "bfloat16" if precision == "bf16-mixed" else None
    return STAGES[config.stage.name.value](
        spec, config.stage, tiling=config.data.tiling.value, dtype=dtype, frozen_dtype=frozen_dtype, seed=config.seed
    )


def show_training_summary(data: StageData, stage: Stage) -> None:
    """Show what will be trained before training starts: parameters of each part, samples, optimizer steps, micro-batches, ranks."""
    if not is_rank_zero():
        return
    run, datamodule = data.run, data.datamodule
    table = Table(title=f"{run.name}: what trains", title_justify="left")
    for heading in ("part", "parameters", "trainable", "how"):
        table.add_column(heading, justify="right" if heading in ("parameters", "trainable") else "left")
    for row in stage.part_summary:
        table.add_row(row.part, f"{row.parameters:,}", f"{row.trainable:,}", row.how)
    console.print(table)
    plan, index = datamodule.plan, datamodule.index
    if run.init_from:
        say(f"starts from {run.init_from}")
    for remark in data.spec.remarks:
        say(remark)
    say(
        f"{format_count(len(index), 'sample')}, {len(datamodule.held_out):,} held out; {format_count(plan.num_steps, 'step')} of "
        f"{plan.batch_description} in {format_count(plan.accumulate_grad_batches, 'micro-batch', 'micro-batches')} on "
        f"{format_count(plan.world_size, 'rank')}"
    )
