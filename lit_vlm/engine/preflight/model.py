"""Preflight estimates from the model's config: trainable parts, memory, time, disk. No weights are read."""

from __future__ import annotations

import copy
import os
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from lit_vlm.config.schema import ActivationCheckpointing as Level
from lit_vlm.config.schema import DPOStageConfig, RunConfig, StageConfig, StrategyName
from lit_vlm.cost import DEVICES, Flops, MicroBatchSize, ParameterCounts, TrainingOptions, TrainingSetup
from lit_vlm.cost.memory import NUM_ADAM_MOMENTS, Precision, compute_host_bytes
from lit_vlm.engine.preflight.facts import DiskRow, MemoryFacts, MemoryRow, PartRow, PlanFacts, TimeFacts
from lit_vlm.engine.preflight.page import format_bytes
from lit_vlm.engine.preflight.strategy import CHECKPOINTING_LEVELS, STRATEGY_NAMES, list_strategies
from lit_vlm.model.build import ModelSpec, build_on_meta
from lit_vlm.model.frozen import list_frozen_matrices, list_matrices
from lit_vlm.model.parts import get_part
from lit_vlm.stages import Stage
from lit_vlm.types import ModelPart, format_count

REPORT_BYTES = 5e6  # a report with its images, samples and metrics; about the size in the shipped recipes


def prepare_meta_stage(stage: Stage, spec: ModelSpec) -> Stage:
    """Prepare a stage with its model on torch's `meta` device: shapes, adapters and frozen parameters, without memory.

    A reference model from another folder is not loaded: it is as large as the model itself, and only its size matters.
    """
    if stage.hparams.get("reference"):
        stage.hparams["reference"] = None
    config = copy.deepcopy(spec.config)
    config.text_config.vocab_size = max(config.text_config.vocab_size, len(spec.tokenizer))
    stage.model = build_on_meta(config)
    ids = spec.tokenizer.convert_tokens_to_ids
    stage._new_ids, stage._special_ids = ids(spec.new_tokens), ids(spec.special_tokens)
    with warnings.catch_warnings(action="ignore"):  # transformers' warnings about its own names
        stage._prepare_training()
    return stage


def list_parts(stage: Stage) -> list[PartRow]:
    """List the parts of the model with parameters, trainable parameters and learning rate."""
    rows = []
    for row in stage.part_summary:
        rate = stage.optimizer_options.get(ModelPart(row.part), "learning_rate") if row.trainable else None
        rows.append(PartRow(row.part, row.parameters, row.trainable, rate, row.how))
    return rows


def count_parameters(stage: Stage, config: StageConfig) -> ParameterCounts:
    """Count the parameters for the memory estimate: all, trainable, cast by autocast, frozen matrices, reference model."""
    model = stage.model
    assert model is not None
    autocast_parts = [part for part in ModelPart if part is not ModelPart.vision_tower or part in config.trainable]
    linear = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and get_part(f"{name}.") in autocast_parts
    ]
    cast = {id(p): p for _, module in linear for p in module.parameters(recurse=False)}
    frozen = list_frozen_matrices(model)
    reference = _find_reference_model(stage, config)
    layers: Any = model.model.language_model.layers
    return ParameterCounts(
        total=sum(p.numel() for p in model.parameters()),
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        autocast=sum(p.numel() for p in cast.values()),
        autocast_frozen=sum(p.numel() for p in cast.values() if not p.requires_grad),
        frozen_matrices=sum(p.numel() for p in frozen),
        autocast_frozen_matrices=sum(p.numel() for p in frozen if id(p) in cast),
        reference=sum(p.numel() for p in reference.parameters()) if reference else 0,
        reference_matrices=sum(p.numel() for p in list_matrices(reference)) if reference else 0,
        largest_layer=max(sum(p.numel() for p in layers[0].parameters()), model.lm_head.weight.numel()),
    )


def _find_reference_model(stage: Stage, config: StageConfig) -> nn.Module | None:
    """Find the reference model of a preference stage that is held in memory in addition to the model.

    It is a copy without the vision tower, if both models share that; or the model of another folder, which is as large as
    this one. It is None under LoRA, or if the reference log-probabilities are cached.
    """
    if not isinstance(config, DPOStageConfig) or config.cache_reference:
        return None
    return stage.model if config.reference else getattr(stage, "reference", None)


def describe_training(config: RunConfig, parameters: ParameterCounts) -> TrainingOptions:
    """Describe the training for the cost model. `auto` counts as no activation checkpointing: the setup lists the levels to choose from."""
    stage, level = config.stage, config.stage.activation_checkpointing
    return TrainingOptions(
        Precision.from_name(config.trainer.precision),
        trains_language_model=ModelPart.language_model in stage.trainable,
        trains_tower=ModelPart.vision_tower in stage.trainable,
        checkpointing=Level.none if level is Level.auto else level,
        reference_parameters=parameters.reference,
        reference_matrices=parameters.reference_matrices,
    )


def compare_memory(config: RunConfig, setup: TrainingSetup, used: StrategyName, plan: PlanFacts) -> MemoryFacts:
    """Estimate the memory of one device: for this run, for its other levels of activation checkpointing, for other strategies.

    Args:
        setup: with the checkpointing level of this run.
        used: the strategy of this run.
    """
    own_level, rows = setup.training.checkpointing, []
    for level in sorted(CHECKPOINTING_LEVELS, key=lambda level: level is not own_level):
        suffix = f", activation checkpointing {level.value}"
        rows.append(_make_row(setup.replace_level(level), used, chosen=level is own_level, suffix=suffix))
    rows += [_make_row(setup, strategy) for strategy in list_strategies(setup) if strategy is not used]
    full_micro_batch = MicroBatchSize(
        plan.most_tokens,
        plan.most_tiles,
        round(plan.most_tokens * setup.micro_batch.supervised / max(setup.micro_batch.tokens, 1)),
    )
    at_caps = replace(setup, micro_batch=full_micro_batch).estimate_memory(used).total
    device = setup.device or DEVICES[config.preflight.device]
    load, compared = setup.micro_batch, setup.device is not None
    return MemoryFacts(
        device.name, device.memory_bytes, compared, load.tokens, load.tiles, load.supervised, at_caps, rows
    )


def _make_row(setup: TrainingSetup, strategy: StrategyName, *, chosen: bool = False, suffix: str = "") -> MemoryRow:
    name, note = STRATEGY_NAMES[strategy], ""
    if setup.world_size > 1:
        name += f" over {setup.world_size:,} devices"
    if strategy is StrategyName.hsdp:
        name += f", {setup.shard_size or setup.devices_per_node} to a copy"
    if strategy is StrategyName.deepspeed_zero3_offload:
        host = compute_host_bytes(setup.parameters, setup.training, setup.world_size, setup.devices_per_node)
        note = f"and {format_bytes(host)} of each node's own memory"
    return MemoryRow(
        name + suffix, strategy.value, setup.world_size, setup.estimate_memory(strategy).parts, chosen, note
    )


def estimate_time(config: RunConfig, flops: float, plan: PlanFacts, network: float) -> TimeFacts:
    """Estimate the training time.

    Args:
        flops: of the whole plan.
        network: share of the devices' speed that is left after waiting for the network.
    """
    device, share = DEVICES[config.preflight.device], config.preflight.utilisation
    balance = plan.balance_ranks
    seconds = device.estimate_seconds(flops, devices=plan.world_size, utilisation=share, balance=balance) / network
    return TimeFacts(
        flops=flops,
        devices=plan.world_size,
        device=device.name,
        peak=device.peak_flops_per_second,
        utilisation=share,
        balance=balance,
        network=network,
        seconds=seconds,
        device_hours=seconds * plan.world_size / 3600,
    )


def compute_flops(model_config: dict[str, Any], config: RunConfig, training: TrainingOptions) -> Flops:
    """Compute the FLOPs model of the run, with recomputation and the reference model."""
    return Flops.from_config(
        model_config,
        trains_tower=training.trains_tower,
        trains_language_model=training.trains_language_model,
        recomputed_share=training.recomputed_share,
        has_reference=isinstance(config.stage, DPOStageConfig) and not config.stage.cache_reference,
    )


def estimate_disk(
    config: RunConfig, run_dir: Path, store: Path, parameters: ParameterCounts, index_bytes: float
) -> list[DiskRow]:
    """Estimate the peak disk space of the run: model, checkpoints, report, index and plan.

    The model counts once: it is written to a temporary folder, and an older one that it replaces is on disk already.
    Checkpoints are deleted after the model is written. Each holds the trainable parameters and AdamW's two moments, under
    ZeRO in float32 for any precision.
    """
    precision, kept = Precision.from_name(config.trainer.precision), config.checkpoint
    model = float(parameters.total) * precision.weight_bytes
    number = kept.keep_last + 1 + kept.keep_best  # + 1: the one that is being written; keep_best: the best
    checkpoints = float(parameters.trainable) * (1 + NUM_ADAM_MOMENTS) * max(4, precision.weight_bytes) * number
    return [
        DiskRow("the model in transformers' layout", model, str(run_dir / "hf"), _get_free_bytes(run_dir)),
        DiskRow(
            f"at most {format_count(number, 'checkpoint')}",
            checkpoints,
            str(run_dir / "checkpoints"),
            _get_free_bytes(run_dir),
        ),
        DiskRow("report, metrics, samples", REPORT_BYTES, str(run_dir), _get_free_bytes(run_dir)),
        DiskRow("index and plan", index_bytes, str(store), _get_free_bytes(store)),
    ]


def sum_file_sizes(folder: Path) -> int:
    """Sum the sizes of all files below a folder, in bytes."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else 0


def _get_free_bytes(path: Path) -> float:
    place = next(place for place in (path, *path.parents) if os.path.lexists(place))
    return float(shutil.disk_usage(place).free)
