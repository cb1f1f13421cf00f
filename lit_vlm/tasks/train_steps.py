"""Steps of task=train between opening the run and its end, in their order. `train.py` calls them."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any

import lightning as L
import torch
import yaml
from rich.table import Table

from callbacks import check_user_callbacks, make_callbacks
from lit_vlm.checkpoint.index import RunFingerprint
from lit_vlm.config.callbacks import choose_callbacks
from lit_vlm.config.choices import DEBUG_FAST_STEPS, DebugMode, OnBadRecord
from lit_vlm.config.schema import (
    CheckpointConfig,
    DataConfig,
    GuardConfig,
    ModelConfig,
    StageConfig,
    TrainerConfig,
    ValidationConfig,
)
from lit_vlm.config.task_settings import EvaluateConfig, PreflightConfig
from lit_vlm.data.datamodule import DataModule
from lit_vlm.data.packing.plan import Plan
from lit_vlm.data.processor import Processor
from lit_vlm.distributed.trainer import close_process_group, make_trainer
from lit_vlm.fault_tolerance.exit_status import CoordinatedExit
from lit_vlm.fault_tolerance.oom import BUDGET_FILE, MicroBatchBudget
from lit_vlm.fault_tolerance.run_lock import RunLock
from lit_vlm.fault_tolerance.skipped_steps import SKIPPED_STEPS_FILE
from lit_vlm.files import compute_weights_digest, handle_write_errors, write_text_atomically
from lit_vlm.formatting import format_count
from lit_vlm.loggers.tracker import RunTracker
from lit_vlm.model.adapters import list_adapter_remarks
from lit_vlm.model.skeleton import defer_weights
from lit_vlm.model.spec import ModelSpec, load_model_spec
from lit_vlm.redaction import redact
from lit_vlm.reports.report import write_report
from lit_vlm.runs.run_folder import RunFolder, compute_parts_digest, extract_identity, is_rank_zero, read_manifest
from lit_vlm.stages import Stage
from lit_vlm.tasks.build_stage import make_stage, resolve_auto_strategy
from lit_vlm.tasks.fit import run_fit
from lit_vlm.tasks.measure_model import measure_model
from lit_vlm.tasks.measure_new_tokens import format_new_tokens, measure_new_tokens
from lit_vlm.tasks.mixture_lock import build_mixture_lock, check_mixture_lock, get_template_date
from lit_vlm.tasks.open_run import RunPlace, Sources, StartPoint, format_export_hint
from lit_vlm.tasks.prepare_data import (
    Indexes,
    StageData,
    apply_quarantine,
    build_indexes,
    build_stage_data,
    count_unread_keys,
    format_held_out_hint,
    make_planning_options,
    require_record_type,
    resolve_tiny_parts,
)
from lit_vlm.tasks.terminal import console, say
from lit_vlm.types import SPECIAL_TOKENS, UserError

DIVERGENCE_FACTOR = 1.25  # a first batch that happens to be easy has a loss some percent below the others


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """Settings of the model with the folders of its parts, and its spec, without weights."""

    settings: ModelConfig
    spec: ModelSpec


@dataclass(frozen=True, slots=True)
class PreparedData:
    """Data of the stage, read and checked.

    Attributes:
        quarantined: number of unusable records of each source.
        image_digest: digest of the content of the training images.
    """

    stage_data: StageData[DataModule]
    indexes: Indexes
    quarantined: dict[str, int]
    image_digest: str


@dataclass(frozen=True, slots=True)
class BuiltStage:
    """Stage without weights, and the trainer settings with a strategy in place of `auto`."""

    stage: Stage
    trainer: TrainerConfig


@dataclass(frozen=True, slots=True)
class BuiltTrainer:
    """Trainer with its callbacks, the plan of its steps, and the stage with its weights."""

    trainer: L.Trainer
    stage: Stage
    plan: Plan
    callbacks: list[L.Callback]


def resolve_model(place: RunPlace, model: ModelConfig, tiling: Any, init_from: str | None, seed: int) -> ResolvedModel:
    """Make the tiny parts if the settings name them, and load the spec of the model.

    Args:
        tiling: data.tiling.
        init_from: folder or hub id of a whole model; None: the parts that the settings name.
    """
    settings = resolve_tiny_parts(model, place.parts_dir, seed)
    return ResolvedModel(settings, load_model_spec(settings, init_from, tiling))


def prepare_data(
    place: RunPlace,
    sources: Sources,
    model: ResolvedModel,
    start: StartPoint,
    data: DataConfig,
    stage: StageConfig,
    trainer: TrainerConfig,
    *,
    seed: int,
    debug: DebugMode | None,
) -> PreparedData:
    """Index the records, put unusable ones into quarantine, and lower the micro-batch limits after out of memory.

    Raises:
        UserError: an error in the settings of data or stage, or in the data.
    """
    options: dict[str, Any] = {"data": data, "stage": stage, "trainer": trainer, "seed": seed, "debug": debug}
    stage_data = build_stage_data(
        place, sources, model.spec, template_date=model.settings.template_date, make=make_datamodule, **options
    )
    # an error in the stage's settings must come before the data are read
    make_stage(model.spec, stage, precision=trainer.precision, tiling=data.tiling.value, seed=seed)
    indexes = build_indexes(stage_data.training_data)
    quarantined = apply_quarantine(stage_data.training_data, indexes, data, place.dir)
    require_record_type(stage.name, indexes)
    if not start.is_fresh:
        MicroBatchBudget.read(place.dir, stage_data.training_data).apply(stage_data.training_data)
    return PreparedData(stage_data, indexes, quarantined, indexes.training.compute_image_digest())


def make_datamodule(
    place: RunPlace,
    sources: Sources,
    spec: ModelSpec,
    processor: Processor,
    *,
    data: DataConfig,
    trainer: TrainerConfig,
    **options: Any,
) -> DataModule:
    """Make the training data of a stage with their loaders; the arguments are those of `make_training_data`."""
    return DataModule(
        processor,
        sources.training,
        sources.validation or data.validation.fraction,
        num_workers=data.num_workers,
        prefetch_factor=data.prefetch_factor,
        pin_memory=trainer.accelerator != "cpu" and torch.cuda.is_available(),
        look_ahead=data.on_bad_record is OnBadRecord.quarantine,
        **make_planning_options(place, spec, data=data, trainer=trainer, **options),
    )


def build_stage(
    place: RunPlace,
    prepared: PreparedData,
    stage: StageConfig,
    trainer: TrainerConfig,
    preflight: PreflightConfig,
    *,
    tiling: str,
    seed: int,
) -> BuiltStage:
    """Choose the strategy and the activation checkpointing where they are `auto`, and make the stage. Reads no weights."""
    spec = prepared.stage_data.spec
    make = partial(make_stage, spec, precision=trainer.precision, tiling=tiling, seed=seed)
    resolved_stage, resolved_trainer = resolve_auto_strategy(
        prepared.stage_data.training_data,
        lambda: measure_model(spec, stage, seed=seed),
        stage=stage,
        trainer=trainer,
        preflight=preflight,
    )
    built = make(resolved_stage)
    built.say = place.say
    return BuiltStage(built, resolved_trainer)


def select_callbacks(
    items: list[Any],
    trainer: TrainerConfig,
    debug: DebugMode | None,
    evaluate: EvaluateConfig,
    benchmarks: list[str],
    *,
    export: bool,
) -> dict[str, dict[str, Any]]:
    """Select the callbacks of the run, with their arguments, and check those of the user's own classes.

    Args:
        items: the setting `callbacks`.
        benchmarks: benchmarks that are asked while it trains, with `evaluate.every_steps`.
        export: the run exports its model.

    Raises:
        UserError: a class does not exist, is no callback, or does not have an argument.
    """
    profile = trainer.profile or debug is DebugMode.profile
    exam = evaluate.every_steps is not None and evaluate.training_items > 0
    chosen = choose_callbacks(items, export=export, profile=profile, exam=exam, benchmarks=bool(benchmarks))
    check_user_callbacks(chosen)
    return chosen


def build_callbacks(
    place: RunPlace,
    prepared: PreparedData,
    fingerprint: RunFingerprint,
    start: StartPoint,
    chosen: dict[str, dict[str, Any]],
    *,
    checkpoint: CheckpointConfig,
    guard: GuardConfig,
    trainer: TrainerConfig,
    validation: ValidationConfig,
    evaluate: EvaluateConfig,
    benchmarks: list[str],
    max_image_pixels: int,
    debug: DebugMode | None,
    metric: str | None,
    special_boxes: bool,
) -> list[L.Callback]:
    """Build the callbacks of the run, in their calling order.

    Args:
        chosen: name or import path -> arguments.
        benchmarks: benchmarks that are asked while the stage trains.
        metric: logger.metric.
        special_boxes: the setting of this name.
    """
    slices = None
    if benchmarks:
        from lit_vlm.tasks.training_benchmarks import open_benchmark_slices  # late: packages that few runs need

        control_ids = prepared.stage_data.training_data.processor.template.control_ids
        has_markup = all(token in control_ids for token in SPECIAL_TOKENS)
        slices = open_benchmark_slices(
            benchmarks, evaluate, place.benchmark_dir, max_image_pixels, has_markup=has_markup
        )
    return make_callbacks(
        chosen,
        place.dir,
        benchmark_slices=slices,
        max_samples=DEBUG_FAST_STEPS if debug is DebugMode.fast else validation.max_samples,
        **asdict(checkpoint),
        **asdict(guard),
        exam_every_steps=evaluate.every_steps,
        training_items=evaluate.training_items,
        resume_from=start.resume_from,
        belongs=fingerprint,
        timeout_minutes=trainer.timeout_minutes,
        metric=metric,
        special_boxes=special_boxes,
        say=place.say,
    )


def make_fingerprint(folder: RunFolder, prepared: PreparedData) -> RunFingerprint:
    """Make the fingerprint that ties a checkpoint to this run: stage, settings, data, parent weights, processor, images."""
    manifest, spec = folder.manifest, prepared.stage_data.spec
    parent = (manifest["parent"] or {}).get("digest") or compute_parts_digest(
        spec.whole, spec.vision_tower, spec.language_model
    )
    return RunFingerprint(
        stage=manifest["stage"],
        settings=extract_identity(manifest["config"]),
        data=manifest["data"]["digest"],
        parent=parent,
        processor=prepared.stage_data.training_data.processor.digest,
        pictures=prepared.image_digest,
    )


def build_trainer(
    built: BuiltStage,
    prepared: PreparedData,
    tracker: RunTracker,
    callbacks: list[L.Callback],
    validate_every_steps: int | None,
) -> BuiltTrainer:
    """Build the trainer and the plan of its steps, and read the weights as its strategy wants them.

    Raises:
        UserError: Lightning refuses the settings, or the weights cannot be read.
    """
    trainer = make_trainer(built.trainer, tracker.make_loggers(), callbacks, validate_every_steps=validate_every_steps)
    plan = prepared.stage_data.training_data.make_plan(trainer.world_size)
    if validate_every_steps:  # Lightning counts micro-batches
        trainer.val_check_interval = validate_every_steps * plan.accumulate_grad_batches
    trainer.log_every_n_steps = min(trainer.log_every_n_steps, plan.num_steps)  # a short run writes a row, too
    with defer_weights() if getattr(trainer.strategy, "loads_in_shards", False) else nullcontext():
        built.stage.configure_model()
    return BuiltTrainer(trainer, built.stage, plan, callbacks)


def claim_run_folder(place: RunPlace, folder: RunFolder, run_lock: RunLock, start: StartPoint) -> None:
    """Lock the run folder and remove what another run left in it. Until here nothing of an older run has changed.

    Raises:
        UserError: another process began this run meanwhile.
    """
    if run_lock.acquire() and read_manifest(place.dir):
        raise UserError(
            f"{place.dir}: another process started this run meanwhile. Start it again to resume from there."
        )
    if not is_rank_zero():
        return
    if folder.replaces_other_run:
        place.checkpoints.remove_all()
    if start.is_fresh:
        for name in (SKIPPED_STEPS_FILE, BUDGET_FILE):  # of the previous run in this folder
            (place.dir / name).unlink(missing_ok=True)


def record_start(
    place: RunPlace,
    folder: RunFolder,
    prepared: PreparedData,
    built: BuiltTrainer,
    tracker: RunTracker,
    settings: dict[str, Any],
    facts: dict[str, Any],
) -> None:
    """Write manifest.json and config.yaml of a run that starts to train, and open its trackers.

    Args:
        facts: further entries of the manifest.
    """
    plan, processor = built.plan, prepared.stage_data.training_data.processor
    folder.update(
        trained=[row.to_dict() for row in built.stage.part_summary],
        data=folder.manifest["data"]
        | {
            "index_digest": plan.index.compute_digest(),
            "num_samples": len(plan.index),
            "num_held_out": len(prepared.indexes.held_out),
            "mixture": plan.mixture.summarize(plan.get_sample_sequence()),
            "quarantined": prepared.quarantined,
            "processor": processor.digest,
            "pictures": plan.index.compute_image_digest(),
            "unread": count_unread_keys(prepared.indexes),
        },
        **facts,
        plan={
            "steps": plan.num_steps,
            "k": plan.accumulate_grad_batches,
            "global_batch_size": plan.global_batch_size,
            "global_batch_tokens": plan.global_batch_tokens,
            "world_size": plan.world_size,
        },
        tracking=tracker.get_tracking_record(folder),
    )
    if is_rank_zero():
        text = yaml.safe_dump(redact(settings), allow_unicode=True, sort_keys=False)
        with handle_write_errors(place.dir, "config.yaml", "run_dir"):
            write_text_atomically(place.dir / "config.yaml", text, remove_secrets=False)
    tracker.open(folder)


def collect_text_facts(prepared: PreparedData) -> dict[str, Any]:
    """Collect the entries of the manifest about the texts: the date that the chat template writes, and what new tokens save."""
    template_date = get_template_date(prepared.stage_data.training_data.processor)
    return template_date | measure_new_tokens(prepared.stage_data, prepared.indexes)


def list_remarks(prepared: PreparedData, built: BuiltTrainer) -> list[str]:
    """List what is remarkable about model and tokens, for the summary."""
    measured = measure_new_tokens(prepared.stage_data, prepared.indexes).values()
    remarks = [*prepared.stage_data.spec.remarks, *list_adapter_remarks(built.stage.model)]
    return [*remarks, *map(format_new_tokens, measured)]


def show_training_summary(
    place: RunPlace, init_from: str | None, prepared: PreparedData, built: BuiltTrainer, remarks: list[str]
) -> None:
    """Show what will be trained before training starts: parameters of each part, samples, optimizer steps, micro-batches, ranks."""
    if not is_rank_zero():
        return
    table = Table(title=f"{place.name}: what trains", title_justify="left")
    for heading in ("part", "parameters", "trainable", "how"):
        table.add_column(heading, justify="right" if heading in ("parameters", "trainable") else "left")
    for row in built.stage.part_summary:
        table.add_row(row.part, f"{row.parameters:,}", f"{row.trainable:,}", row.how)
    console.print(table)
    plan = built.plan
    if init_from:
        say(f"starts from {init_from}")
    for remark in remarks:
        say(remark)
    say(
        f"{format_count(len(plan.index), 'sample')}, {len(prepared.indexes.held_out):,} held out; {format_count(plan.num_steps, 'step')} of "
        f"{plan.batch_description} in {format_count(plan.accumulate_grad_batches, 'micro-batch', 'micro-batches')} on "
        f"{format_count(plan.world_size, 'rank')}"
    )


def fit(
    place: RunPlace,
    prepared: PreparedData,
    built: BuiltTrainer,
    tracker: RunTracker,
    settings: dict[str, Any],
    *,
    data: DataConfig,
    max_oom_retries: int,
) -> None:
    """Train. After this, rank 0 alone has work left; the other ranks do not wait.

    Args:
        settings, max_oom_retries: see `run_fit`.

    Raises:
        Restart: a restart repairs a failure.
        CoordinatedExit: all ranks exit, after a signal or early stopping; the state is saved.
    """
    datamodule = prepared.stage_data.training_data
    options: dict[str, Any] = {"data": data, "max_oom_retries": max_oom_retries}
    try:
        run_fit(built.trainer, built.stage, datamodule, place, settings, **options)
    except CoordinatedExit as left:
        tracker.close_after_error(left)
        close_process_group()
        raise
    close_process_group()


def finish(
    place: RunPlace,
    folder: RunFolder,
    prepared: PreparedData,
    built: BuiltTrainer,
    tracker: RunTracker,
    stage: StageConfig,
) -> None:
    """Write figures, report and manifest of the finished run, remove its checkpoints, and report the result. Only on rank 0."""
    if not is_rank_zero():
        return
    figures = collect_figures(built)
    tracker.require_metric(figures)
    has_model = folder.hf_path.is_dir()
    weights = compute_weights_digest(folder.hf_path) if has_model else ""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    folder.update(finished=now, figures=figures, weights_digest=weights)
    write_report(place.dir / "report.html", [place.dir], place.name)
    folder.update(status="finished")  # if it ends before this line, the next start resumes from the last checkpoint
    if has_model:  # without the model (export=false) the last checkpoint stays
        place.checkpoints.remove_all(keep_best=True)
    tracker.finish(folder)
    model = f"Model: {folder.hf_path}   " if has_model else format_export_hint(folder)
    place.say(f"done. {model}Report: {place.dir / 'report.html'}")
    if has_diverged(figures):
        place.say(format_divergence(figures, stage))
    if not len(prepared.indexes.held_out):
        say(format_held_out_hint(len(prepared.indexes.training)))


def has_diverged(figures: dict[str, Any]) -> bool:
    """Return True if the loss of the last steps is `DIVERGENCE_FACTOR` times that of the first step, or more.

    A NaN compares as False: the guard reports it. So does a loss below zero, which some preference losses have.
    """
    first, last = figures.get("loss_first", math.nan), figures.get("loss_last", math.nan)
    return first > 0 and last >= DIVERGENCE_FACTOR * first


def format_divergence(figures: dict[str, Any], config: StageConfig) -> str:
    """Format the message about a loss that rose: both losses, and the settings to change."""
    return (
        f"the loss rose from {figures['loss_first']:.2f} to {figures['loss_last']:.2f}, so training diverged and the model is"
        f" worse than before. Lower stage.learning_rate ({config.learning_rate:g} now) or lengthen stage.warmup"
        f" ({config.warmup:g} now), and run the stage again with overwrite=true."
    )


def collect_figures(built: BuiltTrainer) -> dict[str, Any]:
    """Collect the figures of the callbacks and the last validation metrics."""
    figures = {
        key: value
        for callback in built.callbacks
        if hasattr(callback, "figures")
        for key, value in callback.figures().items()
    }
    metrics = built.trainer.callback_metrics
    return figures | {name: float(value) for name, value in metrics.items() if name.startswith("val/")}


__all__ = [
    "build_callbacks",
    "build_mixture_lock",
    "build_stage",
    "build_trainer",
    "check_mixture_lock",
    "claim_run_folder",
    "collect_text_facts",
    "finish",
    "fit",
    "list_remarks",
    "make_fingerprint",
    "prepare_data",
    "record_start",
    "resolve_model",
    "select_callbacks",
    "show_training_summary",
]
