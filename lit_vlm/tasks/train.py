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

from callbacks import make_callbacks
from lit_vlm.config import Run
from lit_vlm.config.callbacks import choose_callbacks
from lit_vlm.config.schema import ActivationCheckpointing, Debug, RunConfig
from lit_vlm.engine.budget import NAME as BUDGET
from lit_vlm.engine.budget import Budget
from lit_vlm.engine.checkpoint import Belongs, Folder
from lit_vlm.engine.exits import LeftTogether
from lit_vlm.engine.hold import Hold
from lit_vlm.engine.ranks import started_again
from lit_vlm.engine.report import write_report
from lit_vlm.engine.run_folder import (
    RunFolder,
    digest_of_parts,
    digest_of_sources,
    identity_of,
    is_rank_zero,
    open_run_folder,
    parent_of,
    read_manifest,
    require_parent,
    to_plain,
)
from lit_vlm.engine.skipped import NAME as SKIPPED
from lit_vlm.engine.tracking import Tracking
from lit_vlm.engine.trainer import FEW_STEPS, leave_process_group, make_trainer
from lit_vlm.files import writable, write_atomically
from lit_vlm.model.build import Blueprint
from lit_vlm.model.skeleton import weights_later
from lit_vlm.model.tensor_files import digest_of_weights
from lit_vlm.secrets import redacted
from lit_vlm.stages import STAGES, Stage
from lit_vlm.tasks.attempts import fit_or_again, until_done
from lit_vlm.tasks.run_lock import hold_to_lock, name_template_day
from lit_vlm.tasks.stage_data import StageData, open_sources, require_records_of, settle, stage_data, unread_keys
from lit_vlm.tasks.strategy import settle_strategy
from lit_vlm.tasks.terminal import console, say
from lit_vlm.types import UserError, counted


def train(run: Run) -> None:
    """Train one stage. An interrupted run resumes from its last checkpoint; a finished run is reported and stays unchanged."""
    is_requeued = started_again()  # its overrides may hold resume_from=none, which was meant for the first start
    tracking = Tracking(run.config.logger, run.dir, run.experiment, say=lambda text: say(f"{run.name}: {text}"))
    with Hold(run.dir) as run_lock, tracking:
        # each start needs its own copy: it writes the paths of the tiny parts into the config
        until_done(lambda again: train_once(copy.deepcopy(run), run_lock, tracking, again or is_requeued))


def train_once(run: Run, hold: Hold, tracking: Tracking, again: bool = False) -> None:
    """Run one start of the stage: read the data, build model and trainer, lock the run folder, fit, write the results.

    Args:
        run_lock: lock of the run folder.
        tracking: the run's loggers.
        is_restart: the same command started this run before, so it resumes from the last checkpoint.
    """
    config = run.config
    require_parent(run.init_from)
    sources, held_out = open_sources(run)
    open_folder = partial(
        open_run_folder,
        run.dir,
        config,
        name=run.name,
        overwrite=config.overwrite,
        data_digest=digest_of_sources([*sources, *held_out]),
        parent=parent_of(run.init_from),
    )
    folder = open_folder()
    if not folder.finished and run.dir.is_dir() and hold.take():
        folder = open_folder()  # another process may have trained this run until it released the lock
    checkpoints = Folder(run.dir / "checkpoints")
    if folder.rebuilt:
        say(f"{run.name}: {folder.rebuilt}")
    if folder.finished:
        if folder.rebuilt:
            folder.update()
        if is_rank_zero() and folder.hf.is_dir():
            checkpoints.remove(but_best=True)  # an earlier start was interrupted while it finished
        say(
            f"{run.name}: finished already, in {folder.path}. {tell_how_to_export(folder)}Start it anew with overwrite=true."
        )
        tracking.catch_up(folder)
        return

    tracking.check(folder)
    if folder.replaces and Path(config.resume_from).resolve().is_relative_to(checkpoints.path.resolve()):
        raise UserError(
            f"resume_from={config.resume_from} is a checkpoint of the run that overwrite=true replaces. Give this run a name "
            "of its own (run_name=...), or leave overwrite=true out."
        )

    data = stage_data(run, sources, held_out, run.init_from)
    datamodule = data.datamodule
    make_stage(data.blueprint, config)  # an error in its settings must come before the data are read
    datamodule.build()
    quarantined = settle(data)
    require_records_of(config.stage, datamodule)

    is_fresh_start = folder.replaces or (config.resume_from == "none" and not again)
    if not is_fresh_start:
        Budget.read(run.dir, datamodule).apply(datamodule)
    callbacks = make_callbacks(
        choose_callbacks(config.callbacks, export=config.export, profile=profiles(config)),
        run.dir,
        max_samples=most_scored(config),
        **asdict(config.checkpoint),
        **asdict(config.guard),
        resume_from="auto" if again and checkpoints.steps() else config.resume_from,
        belongs=belongs_of(folder, data),
        timeout_minutes=config.trainer.timeout_minutes,
        metric=config.logger.metric,
        say=lambda text: say(f"{run.name}: {text}"),
    )
    resolved_config = settle_strategy(data, lambda: make_stage(data.blueprint, config))
    stage = make_stage(data.blueprint, resolved_config)
    stage.say = lambda text: say(f"{run.name}: {text}")
    trainer = make_trainer(resolved_config, tracking.loggers(), callbacks)
    plan = datamodule.make_plan(trainer.world_size)
    if config.data.validation.every_steps:
        trainer.val_check_interval = config.data.validation.every_steps * plan.k  # Lightning counts micro-batches
    trainer.log_every_n_steps = min(trainer.log_every_n_steps, plan.num_steps)  # a short run writes a row, too
    with weights_later() if getattr(trainer.strategy, "loads_in_shards", False) else nullcontext():
        stage.configure_model()
    show_start(data, stage)
    hold_to_lock(data)
    # not earlier: an error in the data, the model or the trainer's settings must leave an older run unchanged
    if hold.take() and read_manifest(run.dir):
        raise UserError(
            f"{run.dir}: another process began this run meanwhile. Start it again to go on where that came to."
        )
    if folder.replaces and is_rank_zero():
        checkpoints.remove()
    if is_fresh_start and is_rank_zero():
        for name in (SKIPPED, BUDGET):  # of the previous run in this folder
            (run.dir / name).unlink(missing_ok=True)
    folder.update(
        trained=[row.as_dict() for row in stage.part_summary],
        data=folder.manifest["data"]
        | {
            "index_digest": datamodule.index.digest(),
            "num_samples": len(datamodule.index),
            "num_held_out": len(datamodule.held_out),
            "mixture": datamodule.mixture.rows(plan.draws()),
            "quarantined": quarantined,
            "processor": datamodule.processor.digest,
            "pictures": datamodule.index.digest_of_pictures(),
            "unread": unread_keys(data.datamodule),
        },
        **name_template_day(data),
        plan={
            "steps": plan.num_steps,
            "k": plan.k,
            "global_batch_size": plan.global_batch_size,
            "global_batch_tokens": plan.global_batch_tokens,
            "world_size": plan.world_size,
        },
        tracking=tracking.known(folder),
    )
    if is_rank_zero():
        text = yaml.safe_dump(redacted(to_plain(asdict(config))), allow_unicode=True, sort_keys=False)
        with writable(run.dir, "config.yaml", "run_dir"):
            write_atomically(run.dir / "config.yaml", text, redact=False)
    tracking.open(folder)

    try:
        fit_or_again(trainer, stage, datamodule, run)
    except LeftTogether as left:
        tracking.leave(left)
        leave_process_group()
        raise
    leave_process_group()  # the rest is done by rank 0 alone; the other ranks do not wait

    if is_rank_zero():
        figures = {
            key: value
            for callback in callbacks
            if hasattr(callback, "figures")
            for key, value in callback.figures().items()
        }
        figures |= {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        tracking.require_metric(figures)
        weights = digest_of_weights(folder.hf) if folder.hf.is_dir() else ""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        folder.update(finished=now, figures=figures, weights_digest=weights)
        write_report(run.dir / "report.html", [run.dir], run.name)
        folder.update(status="finished")  # if it ends before this line, the next start resumes from the last checkpoint
        if folder.hf.is_dir():  # the model is exported; without it (export=false) the last checkpoint stays
            checkpoints.remove(but_best=True)
        tracking.finish(folder)
        model = f"Model: {folder.hf}   " if folder.hf.is_dir() else tell_how_to_export(folder)
        say(f"{run.name}: done. {model}Report: {run.dir / 'report.html'}")


def tell_how_to_export(folder: RunFolder) -> str:
    """Return the command that exports the model of a finished run; "" if the model is there already."""
    if folder.hf.is_dir():
        return ""
    return f"It left no model (export=false); python run.py task=export init_from={folder.path} makes it.   "


def profiles(config: RunConfig) -> bool:
    """Return whether the run profiles its steps."""
    return config.trainer.profile or config.debug is Debug.profile


def most_scored(config: RunConfig) -> int:
    """Return the maximum number of held-out samples that are scored with generated answers."""
    return FEW_STEPS if config.debug is Debug.fast else config.data.validation.max_samples


def belongs_of(folder: RunFolder, data: StageData) -> Belongs:
    """Make the fingerprint that ties a checkpoint to this run: stage, settings, data, parent weights, processor, images."""
    manifest, spec, index = folder.manifest, data.blueprint, data.datamodule.index
    assert index is not None
    parent = (manifest["parent"] or {}).get("digest") or digest_of_parts(
        spec.whole, spec.vision_tower, spec.language_model
    )
    return Belongs(
        stage=manifest["stage"],
        settings=identity_of(manifest["config"]),
        data=manifest["data"]["digest"],
        parent=parent,
        processor=data.datamodule.processor.digest,
        pictures=index.digest_of_pictures(),
    )


def make_stage(blueprint: Blueprint, config: RunConfig) -> Stage:
    """Make the stage of these settings: its class, options, precision of trainable and frozen weights. Reads no weights."""
    options = to_plain(asdict(config.stage))
    # `auto` is not resolved yet: such a stage is used for its sizes only
    if options["activation_checkpointing"] == ActivationCheckpointing.auto.value:
        options["activation_checkpointing"] = ActivationCheckpointing.none.value
    precision = config.trainer.precision
    dtype = "bfloat16" if precision == "bf16-true" else "float32"
    frozen_dtype = "bfloat16" if precision == "bf16-mixed" else None
    return STAGES[options.pop("name")](
        blueprint, **options, tiling=config.data.tiling.value, dtype=dtype, frozen_dtype=frozen_dtype, seed=config.seed
    )


def show_start(data: StageData, stage: Stage) -> None:
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
    for remark in data.blueprint.remarks:
        say(remark)
    say(
        f"{counted(len(index), 'sample')}, {len(datamodule.held_out):,} held out; {counted(plan.num_steps, 'step')} of "
        f"{plan.batch} in {counted(plan.k, 'micro-batch', 'micro-batches')} on "
        f"{counted(plan.world_size, 'rank')}"
    )
