"""Cross-field validation of a config: settings that contradict each other or that no run can use."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path

from lit_vlm.config.callbacks import find_callback_errors
from lit_vlm.config.choices import Format, Markup, ScorerName, StageName, StrategyName, Task, WeightUnit
from lit_vlm.config.curation_validation import find_curate_errors
from lit_vlm.config.endpoint_validation import find_generate_errors
from lit_vlm.config.evaluate_validation import find_training_benchmark_errors
from lit_vlm.config.mapping import find_mapping_errors
from lit_vlm.config.pair_stages import PairStageConfig, find_pair_errors, is_pair_stage
from lit_vlm.config.schema import (
    DataConfig,
    PartConfig,
    RunConfig,
    ShareConfig,
    SourceConfig,
    TrainerConfig,
)
from lit_vlm.config.settings import get_field_types
from lit_vlm.config.stage_validation import (
    find_stage_config_errors,
    find_unused_data_settings,
    find_unused_stage_settings,
)
from lit_vlm.config.user_classes import is_class_path
from lit_vlm.model.projectors import PROJECTORS, list_exportable_projectors
from lit_vlm.types import ModelPart, SampleKind, find_nearest, format_suggestion

PRECISIONS = ("32-true", "bf16-mixed", "bf16-true", "16-mixed", "16-true", "64-true", "transformer-engine")
SHARDED_PRECISIONS = (
    "32-true",
    "bf16-mixed",
    "bf16-true",
)  # float16 needs a loss scaler, which is supported without sharding only
SHARDED_STRATEGIES = tuple(one for one in StrategyName if one.value.startswith(("deepspeed", "fsdp", "hsdp")))
PRECISION_ALIASES = {"32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed", "64": "64-true"}

# Arguments of lightning.Trainer that the program sets itself -> text that names the alternative.
MANAGED_TRAINER_ARGUMENTS = {
    "callbacks": "name them with callbacks=[...]",
    "logger": "choose logger=csv, logger=wandb or logger=tensorboard",
    "accumulate_grad_batches": "it follows from data.global_batch_size and the two memory caps, and is printed",
    "default_root_dir": "a run's folder is run_dir/run_name",
    "enable_checkpointing": "checkpoints are written by the program, one layout for all strategies",
    "use_distributed_sampler": "the plan distributes the samples over the ranks",
    "reload_dataloaders_every_n_epochs": "the plan knows every step beforehand",
    "val_check_interval": "set data.validation.every_steps",
    "check_val_every_n_epoch": "set data.validation.every_steps",
    "fast_dev_run": "set debug=fast",
    "overfit_batches": "set debug=overfit",
    "profiler": "set trainer.profile=true",
    "barebones": "it would turn the callbacks off",
}


def find_other_task_errors(config: RunConfig) -> Iterator[str]:
    """Yield an error message for each setting that only another task reads: the run would do something else."""
    benchmark_tasks = (Task.train, Task.pipeline, Task.prepare, Task.preflight, Task.submit, Task.sweep, Task.curate)
    for key, value, task in (
        ("sweep", config.sweep, Task.sweep),
        ("sync", config.sync, Task.sync),
        ("benchmarks", config.benchmarks and config.task not in benchmark_tasks, Task.evaluate),
        ("trials.dry_run", config.trials.dry_run, Task.sweep),
        ("submit.dry_run", config.submit.dry_run and not config.curate.slurm, Task.submit),
        ("demo.compare_with", config.demo.compare_with, Task.demo),
        ("view.curated", config.view.curated, Task.view),
        ("judge.answers", config.judge.answers, Task.judge),
        ("judge.dry_run", config.judge.dry_run, Task.judge),
        ("generate.dry_run", config.generate.dry_run, Task.generate),
    ):
        if value and config.task is not task:
            yield f"{key}: is read with task={task.value} only, and task is {config.task.value}. Write task={task.value}, or leave {key} out."


def _find_stage_errors(config: RunConfig) -> Iterator[str]:
    stage = config.stage
    if len(stage.adam_betas) != 2:
        yield f"stage.adam_betas: must be two numbers, found {list(stage.adam_betas)}."
    if config.model.num_new_tokens is not None and config.model.new_tokens_from is None:
        yield "model.num_new_tokens: needs a text to learn the tokens from; set model.new_tokens_from=<file>."
    if config.model.projector_weights is not None and config.init_from is not None:
        yield "model.projector_weights: has no effect here (init_from names a model with a projector). Take one of them away."
    if not stage.trainable and config.model.new_tokens_from is None:
        yield f"stage.trainable: is empty, so nothing would train; name some of {', '.join(ModelPart)}."
    if len(set(stage.trainable)) != len(stage.trainable):
        yield "stage.trainable: names a part twice."
    trainable = {part.value for part in stage.trainable}
    for field in fields(stage.parts):
        yield from _find_part_errors(field.name, getattr(stage.parts, field.name), field.name in trainable)
    yield from find_stage_config_errors(stage)


def _find_projector_errors(config: RunConfig) -> Iterator[str]:
    name = str(config.model.projector)
    if config.export and config.init_from is None and not PROJECTORS[name].is_exportable:
        yield (
            f"export: a model with model.projector={name} cannot be exported, plain transformers has no such projector. Set"
            f" export=false, or choose {list_exportable_projectors()}."
        )


def _find_part_errors(name: str, part: PartConfig, is_trainable: bool) -> Iterator[str]:
    key = f"stage.parts.{name}"
    if "lm_head" in part.lora.targets:
        yield (
            f"{key}.lora.targets: lm_head cannot have an adapter, which would never train: scores are computed from the head's"
            " weight directly. Take it out."
        )
    if part.lora.rank > 0 and not is_trainable:
        yield f"{key}.lora.rank: is {part.lora.rank}, but {name} does not train; add it to stage.trainable or set 0."


def _find_data_errors(config: RunConfig) -> Iterator[str]:
    data = config.data
    if not data.sources:
        yield "data.sources: is empty; choose data=... or 'data/source@data.sources=[...]'."
    for table, sources in (("data.sources", data.sources), ("data.validation.sources", data.validation.sources)):
        for name, source in sources.items():
            yield from _find_source_errors(f"{table}.{name}", source)
    yield from find_unused_data_settings(data)
    yield from _find_weight_errors(data)
    yield from _find_share_errors(data.share)


def _find_source_errors(key: str, source: SourceConfig) -> Iterator[str]:
    is_own_class = is_class_path(source.format)
    if source.format not in Format.__members__ and not is_own_class:
        suggestion = format_suggestion(find_nearest(source.format, list(Format)))
        reason = (
            f"found {source.format!r}; a format is one of {', '.join(Format)}, or the import path of your own class"
        )
        yield f"{key}.format: {reason} (my_package.MySource).{suggestion}"
    if source.path is None and source.hub is None and source.format != Format.digits and not is_own_class:
        yield f"{key}.path is not set: give the file or folder, {key}.path=..."
    if source.path is not None and source.hub is not None:
        yield f"{key}: both path and hub are given; one of them must go."
    if source.format == Format.mapped and source.mapping is None:
        yield f"{key}.mapping is not set: format=mapped needs it; conf/data/source/aihub_*.yaml show some."
    if source.mapping is not None and source.format != Format.mapped:
        yield f"{key}.mapping: is read with format=mapped only, and format is {source.format}."
    elif source.mapping is not None:
        yield from find_mapping_errors(f"{key}.mapping", source.mapping)
        if source.markup is Markup.on:
            yield f"{key}.markup: format=mapped takes control tokens from mapping.regions, never from text; set auto."
    yield from _find_image_root_errors(f"{key}.image_root", source)
    if source.repeat is not None and source.count is not None:
        yield f"{key}: both repeat and count are given; one of them must go."
    if source.kind is not None and source.kind not in list(SampleKind):
        suggestion = format_suggestion(find_nearest(source.kind, list(SampleKind)))
        yield f"{key}.kind: there is no kind {source.kind}; there are {', '.join(SampleKind)}.{suggestion}"


def _find_image_root_errors(key: str, source: SourceConfig) -> Iterator[str]:
    roots = source.image_root if isinstance(source.image_root, list) else [source.image_root]
    if source.image_root is not None and not (roots and all(isinstance(root, str) and root for root in roots)):
        yield f"{key}: expected a folder or a list of folders, found {source.image_root!r}."
    elif len(roots) > 1 and source.format == Format.mapped:
        yield f"{key}: format=mapped reads pictures from one folder, found {len(roots)}. Give the folder that holds them all."


def _find_weight_errors(data: DataConfig) -> Iterator[str]:
    sources = data.sources
    weights = {name: source.weight for name, source in sources.items()}
    counted_sources = [
        name for name, source in sources.items() if source.repeat is not None or source.count is not None
    ]
    if counted_sources and any(weight is not None for weight in weights.values()):
        yield f"data.sources: {', '.join(counted_sources)}: repeat and count say how much an epoch reads, weights say shares; use one way."
    if data.temperature != 1.0 and any(weight is not None for weight in weights.values()):
        yield "data.temperature: tempers the sizes of sources without weights; take the weights away, or set it to 1."
    if data.weights_in is WeightUnit.tokens and all(weight is None for weight in weights.values()):
        yield "data.weights_in=tokens: no source has a weight; give every source one."
    unweighted = [name for name, weight in weights.items() if weight is None]
    if unweighted and len(unweighted) < len(weights):
        yield (
            f"data.sources: {', '.join(unweighted)} {'has' if len(unweighted) == 1 else 'have'} no weight and the others do;"
            " give every source a weight, or none (then their sizes count)."
        )
    elif weights and not unweighted and not any(weights.values()):
        yield "data.sources: every weight is 0, so there is nothing to draw from."


def _find_share_errors(share: ShareConfig) -> Iterator[str]:
    for name in share.kinds:
        if name not in list(SampleKind):
            suggestion = format_suggestion(find_nearest(name, list(SampleKind)))
            yield f"data.share.kinds: there is no kind {name}; there are {', '.join(SampleKind)}.{suggestion}"
    if sum(share.kinds.values()) > 1 + 1e-9:
        yield f"data.share.kinds: the shares add up to {sum(share.kinds.values()):g}, more than 1."


def has_preference_pairs(source: SourceConfig) -> bool | None:
    """Return True if a source contains preference pairs; None if only the file can tell."""
    if source.format == Format.preference or source.kind == SampleKind.preference:
        return True
    if source.format == Format.builtin:
        return source.path == SampleKind.preference
    is_open = source.format == Format.auto or is_class_path(source.format)
    return None if is_open and source.kind is None else False


def _find_preference_errors(config: RunConfig) -> Iterator[str]:
    is_dpo, stage = config.stage.name is StageName.dpo, config.stage.name.value
    mismatched = [name for name, source in config.data.sources.items() if has_preference_pairs(source) is not None]
    mismatched = [name for name in mismatched if has_preference_pairs(config.data.sources[name]) is not is_dpo]
    names = ", ".join(mismatched)
    if mismatched and is_dpo:
        yield f"data.sources: {names}: no preference pairs, and stage=dpo needs them; choose data=preference."
    elif mismatched:
        yield f"data.sources: {names}: preference pairs, which stage={stage} cannot use; choose other data or dpo."


def _find_prefer_data_errors(config: RunConfig) -> Iterator[str]:
    names = ", ".join(name for name, source in config.data.sources.items() if has_preference_pairs(source))
    if names:
        yield f"data.sources: {names}: preference pairs already; task=prefer makes them of conversations. Choose other data."


def _find_trainer_errors(config: RunConfig) -> Iterator[str]:
    trainer = config.trainer
    batches = trainer.limit_val_batches
    if batches is not None and batches > 1 and batches % 1:
        yield f"trainer.limit_val_batches: above 1 it is a number of batches and must be whole, found {batches}."
    if trainer.precision not in PRECISIONS:
        nearest_precision = PRECISION_ALIASES.get(trainer.precision) or find_nearest(trainer.precision, PRECISIONS)
        offered = ", ".join(PRECISIONS)
        yield f"trainer.precision: expected one of {offered}, found {trainer.precision}.{format_suggestion(nearest_precision)}"
    world, size = trainer.devices * trainer.num_nodes, trainer.shard_size
    if trainer.strategy is StrategyName.hsdp and size and size > 0 and world % size:
        offered = ", ".join(str(number) for number in range(2, world) if world % number == 0) or "none but all of them"
        yield f"trainer.shard_size: {world} devices cannot be divided into groups of {size}; groups may be of {offered}."
    if (
        trainer.strategy in SHARDED_STRATEGIES
        and trainer.precision in PRECISIONS
        and trainer.precision not in SHARDED_PRECISIONS
    ):
        offered = ", ".join(SHARDED_PRECISIONS)
        yield f"trainer.precision: {trainer.strategy.value} computes in {offered}, found {trainer.precision}; choose bf16-mixed."
    for name in trainer.extra:
        yield from _find_extra_argument_errors(name)


def _find_extra_argument_errors(name: str) -> Iterator[str]:
    key = f"trainer.extra.{name}"
    if name in get_field_types(TrainerConfig):
        yield f"{key}: is a setting of its own, trainer.{name}."
    elif name in MANAGED_TRAINER_ARGUMENTS:
        yield f"{key}: is not yours to set; {MANAGED_TRAINER_ARGUMENTS[name]}."
    elif name not in list_trainer_arguments():
        yield f"{key}: lightning.Trainer has no such argument.{format_suggestion(find_nearest(name, list_trainer_arguments()))}"


@cache
def list_trainer_arguments() -> tuple[str, ...]:
    """List the arguments of lightning.Trainer, read from its source.

    Importing Lightning takes seconds, and an error message should not wait for it.
    """
    spec = importlib.util.find_spec("lightning")
    assert spec is not None and spec.origin is not None
    package = Path(spec.origin).parent
    tree = ast.parse((package / "pytorch/trainer/trainer.py").read_text(encoding="utf-8"))
    trainer = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Trainer")
    init = next(node for node in trainer.body if isinstance(node, ast.FunctionDef) and node.name == "__init__")
    return tuple(argument.arg for argument in init.args.kwonlyargs)


def _find_checkpoint_errors(config: RunConfig) -> Iterator[str]:
    resume_from = config.resume_from
    if resume_from not in ("auto", "none") and not Path(resume_from).expanduser().is_dir():
        yield (
            f"resume_from: there is no folder {resume_from}; name a checkpoint's (runs/.../checkpoints/step-...), auto for the"
            " run's own newest, or none to start from the beginning."
        )


CONTROL_CHARACTERS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
MAX_NAME_BYTES = 255  # maximum bytes of a folder name
RESERVED_NAMES = ("index",)  # folders of run_dir that belong to no run
RUN_SUBFOLDERS = ("checkpoints", "hf", "samples", "wandb")  # subfolders of a run, which must not contain another run
ABSOLUTE_PATH_START = re.compile(r"[/\\~]|[A-Za-z]:[/\\]")


def find_name_errors(config: RunConfig) -> Iterator[str]:
    """Yield an error message for each name or path that cannot be used for the folder of a run."""
    if config.run_name is not None:
        for reason in _find_run_name_errors(config.run_name):
            yield f"run_name: {reason}, found {config.run_name!r}; name a folder below run_dir, e.g. run_name=first/try."
    for key, path in (("run_dir", config.run_dir), ("data.index_dir", config.data.index_dir)):
        if path is not None and CONTROL_CHARACTERS.search(path):
            yield f"{key}: has a control character in it, found {path!r}."


def _find_run_name_errors(name: str) -> Iterator[str]:
    parts = name.split("/")
    if not name.strip():
        yield "is empty"
    elif CONTROL_CHARACTERS.search(name):
        yield "has a control character in it"
    elif ABSOLUTE_PATH_START.match(name):
        yield "must not begin at another folder than run_dir"
    elif any(part in ("", ".", "..") for part in parts):
        yield "must not have empty parts, . or .. in it"
    elif any(part != part.strip() or "\\" in part for part in parts):
        yield "must have no backslash, and no part that begins or ends with a space"
    elif any(len(part.encode(errors="surrogatepass")) > MAX_NAME_BYTES for part in parts):
        yield f"has a part of more than {MAX_NAME_BYTES} bytes"
    elif any(0xD800 <= ord(letter) <= 0xDFFF for letter in name):
        yield "is no Unicode text"
    elif parts[0] in RESERVED_NAMES:
        yield f"must not begin with {parts[0]}, where indexes and plans are kept"
    elif inner := next((part for part in parts[1:] if part in RUN_SUBFOLDERS), None):
        yield f"must not have {inner} behind another folder, where a run keeps files of its own"


def find_prefer_errors(config: RunConfig) -> Iterator[str]:
    """Yield an error message for each missing or unusable setting of task=prefer."""
    prefer = config.prefer
    if config.init_from is None:
        yield "init_from is not set: task=prefer asks a finished model, init_from=runs/<name>/hf or a hub id."
    if not prefer.output.endswith(".jsonl"):
        yield f"prefer.output: must end in .jsonl, found {prefer.output}."
    if not prefer.kinds:
        yield "prefer.kinds: is empty; name response, control or both."
    uses_judge = prefer.scorer is ScorerName.judge
    if uses_judge and prefer.judge is None:
        yield "prefer.judge is not set: scorer=judge needs a finished model's folder, or the import path of your own class."
    if not uses_judge and prefer.judge is not None:
        yield f"prefer.judge: is asked with prefer.scorer=judge only, and the scorer is {prefer.scorer.value}."


def find_exam_errors(config: RunConfig) -> Iterator[str]:
    """Yield an error message for each missing or unusable setting of task=exam."""
    if config.init_from is None:
        yield "init_from is not set: task=exam asks a finished model, init_from=runs/<name>/hf or a hub id."
    if config.evaluate.exam_items == 0:
        yield "evaluate.exam_items: task=exam needs at least 1 question of each kind, found 0."


def _find_evaluation_metric_errors(config: RunConfig) -> Iterator[str]:
    """Yield an error message for each metric of an evaluation while training that the run would not log."""
    checkpoint, evaluate = config.checkpoint, config.evaluate
    metrics = {"logger.metric": config.logger.metric, "checkpoint.best_metric": checkpoint.best_metric}
    for key, metric in metrics.items():
        if metric is None or not metric.startswith(("exam/", "benchmark/")):
            continue
        if evaluate.every_steps is None:
            yield f"{key}={metric}: nothing is evaluated while the stage trains. Set evaluate.every_steps=<steps>."
        elif metric.startswith("exam/") and evaluate.training_items == 0:
            yield f"{key}={metric}: evaluate.training_items=0 leaves the exam out. Set it to 1 or more."
        elif metric.startswith("benchmark/") and metric.removeprefix("benchmark/") not in config.benchmarks:
            yield f"{key}={metric}: the benchmark is not asked while the stage trains. Name it in benchmarks=[...]."
    if not checkpoint.best_metric.startswith(("exam/", "benchmark/")) and checkpoint.best_metric != "val/loss":
        yield (
            "checkpoint.best_metric: is val/loss, a score of the exam (exam/mean) or of a benchmark (benchmark/k_dtcbench), found"
            f" {checkpoint.best_metric}."
        )


def _find_pair_metric_errors(config: RunConfig) -> Iterator[str]:
    """Yield an error message if the best checkpoint is chosen by a metric that a stage of image-text pairs does not log."""
    stage, metric = config.stage, config.checkpoint.best_metric
    assert isinstance(stage, PairStageConfig)
    if metric not in (names := stage.list_validation_metrics()) and (
        config.checkpoint.keep_best or metric != "val/loss"
    ):
        yield f"checkpoint.best_metric: stage={stage.name.value} logs {', '.join(names)}, found {metric}."


ARTIFACTS = ("model", "lock", "report")


def find_logger_errors(config: RunConfig) -> Iterator[str]:
    """Yield an error message for each unknown artifact, and for artifacts without W&B."""
    logger = config.logger
    for name in logger.artifacts:
        if name not in ARTIFACTS:
            suggestion = format_suggestion(find_nearest(name, ARTIFACTS))
            yield f"logger.artifacts: there is no artifact {name}; there are {', '.join(ARTIFACTS)}.{suggestion}"
    if logger.artifacts and not logger.wandb:
        yield "logger.artifacts: are uploaded to Weights & Biases, and logger.wandb is false; choose logger=wandb."


def find_sync_errors(config: RunConfig) -> Iterator[str]:
    """Yield an error message if task=sync has no folders."""
    if not config.sync:
        yield "sync is not set: task=sync sends the runs of these folders, sync=runs/<name>."


def _find_callback_setting_errors(config: RunConfig) -> Iterator[str]:
    yield from find_callback_errors(config.callbacks)


# Checks of a stage that answers prompts, and of one that learns from image-text pairs; each takes the whole config.
CHAT_STAGE_CHECKS = (
    _find_projector_errors,
    _find_stage_errors,
    _find_data_errors,
    _find_preference_errors,
    _find_trainer_errors,
    _find_callback_setting_errors,
    find_unused_stage_settings,
    find_logger_errors,
    _find_evaluation_metric_errors,
    find_training_benchmark_errors,
    _find_checkpoint_errors,
)
PAIR_STAGE_CHECKS = (
    find_pair_errors,
    _find_data_errors,
    _find_preference_errors,
    _find_trainer_errors,
    _find_callback_setting_errors,
    find_unused_stage_settings,
    find_logger_errors,
    _find_pair_metric_errors,
    _find_checkpoint_errors,
)


def find_stage_errors(config: RunConfig) -> Iterator[str]:
    """Yield an error message for each setting with which the stage cannot train on its data."""
    for check in PAIR_STAGE_CHECKS if is_pair_stage(config.stage) else CHAT_STAGE_CHECKS:
        yield from check(config)


# Checks of the tasks that use one stage and its data, and of task=prefer
STAGE_CHECKS = (find_stage_errors,)
CURATE_CHECKS = (find_curate_errors, _find_data_errors)
GENERATE_CHECKS = (find_generate_errors, _find_data_errors)
PREFER_CHECKS = (find_prefer_errors, _find_data_errors, _find_prefer_data_errors)
