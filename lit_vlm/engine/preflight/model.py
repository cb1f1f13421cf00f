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
from lit_vlm.config.schema import DPOStageConfig, RunConfig, StageConfig, Strategy
from lit_vlm.cost import DEVICES, Flops, Load, Parameters, Situation, Training
from lit_vlm.cost.memory import ADAM, Precision, host_bytes
from lit_vlm.engine.preflight.facts import DiskRow, MemoryFacts, MemoryRow, PartRow, PlanFacts, TimeFacts
from lit_vlm.engine.preflight.page import gigabytes
from lit_vlm.engine.preflight.strategy import LEVELS, NAMES, ways
from lit_vlm.model.build import Blueprint, build_on_meta
from lit_vlm.model.frozen import frozen_matrices, matrices
from lit_vlm.model.parts import part_of
from lit_vlm.stages import Stage
from lit_vlm.types import Part, counted

REPORT_BYTES = 5e6  # a report with its images, samples and metrics; about the size in the shipped recipes


def outline(stage: Stage, blueprint: Blueprint) -> Stage:
    """Prepare a stage with its model on torch's `meta` device: shapes, adapters and frozen parameters, without memory.

    A reference model from another folder is not loaded: it is as large as the model itself, and only its size matters.
    """
    if stage.hparams.get("reference"):
        stage.hparams["reference"] = None
    config = copy.deepcopy(blueprint.config)
    config.text_config.vocab_size = max(config.text_config.vocab_size, len(blueprint.tokenizer))
    stage.model = build_on_meta(config)
    ids = blueprint.tokenizer.convert_tokens_to_ids
    stage._new_ids, stage._special_ids = ids(blueprint.new_tokens), ids(blueprint.special_tokens)
    with warnings.catch_warnings(action="ignore"):  # transformers' warnings about its own names
        stage._prepare_training()
    return stage


def part_rows(stage: Stage) -> list[PartRow]:
    """List the parts of the model with parameters, trainable parameters and learning rate."""
    rows = []
    for row in stage.part_summary:
        rate = stage.options.of(Part(row.part), "learning_rate") if row.trainable else None
        rows.append(PartRow(row.part, row.parameters, row.trainable, rate, row.how))
    return rows


def parameters_of(stage: Stage, config: StageConfig) -> Parameters:
    """Count the parameters for the memory estimate: all, trainable, cast by autocast, frozen matrices, reference model."""
    model = stage.model
    assert model is not None
    autocast_parts = [part for part in Part if part is not Part.vision_tower or part in config.trainable]
    linear = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and part_of(f"{name}.") in autocast_parts
    ]
    cast = {id(p): p for _, module in linear for p in module.parameters(recurse=False)}
    frozen = frozen_matrices(model)
    reference = _reference_of(stage, config)
    layers: Any = model.model.language_model.layers
    return Parameters(
        total=sum(p.numel() for p in model.parameters()),
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        cast=sum(p.numel() for p in cast.values()),
        cast_frozen=sum(p.numel() for p in cast.values() if not p.requires_grad),
        held=sum(p.numel() for p in frozen),
        held_cast=sum(p.numel() for p in frozen if id(p) in cast),
        reference=sum(p.numel() for p in reference.parameters()) if reference else 0,
        reference_matrices=sum(p.numel() for p in matrices(reference)) if reference else 0,
        largest_layer=max(sum(p.numel() for p in layers[0].parameters()), model.lm_head.weight.numel()),
    )


def _reference_of(stage: Stage, config: StageConfig) -> nn.Module | None:
    """Find the reference model of a preference stage that is held in memory in addition to the model.

    It is a copy without the vision tower, if both models share that; or the model of another folder, which is as large as
    this one. It is None under LoRA, or if the reference log-probabilities are cached.
    """
    if not isinstance(config, DPOStageConfig) or config.cache_reference:
        return None
    return stage.model if config.reference else getattr(stage, "reference", None)


def training_of(config: RunConfig, parameters: Parameters) -> Training:
    """Describe the training for the cost model. `auto` counts as no activation checkpointing: the setup lists the levels to choose from."""
    stage, level = config.stage, config.stage.activation_checkpointing
    return Training(
        Precision.named(config.trainer.precision),
        trains_language_model=Part.language_model in stage.trainable,
        trains_tower=Part.vision_tower in stage.trainable,
        checkpointing=Level.none if level is Level.auto else level,
        reference=parameters.reference,
        reference_held=parameters.reference_matrices,
    )


def memory_facts(config: RunConfig, of: Situation, used: Strategy, plan: PlanFacts) -> MemoryFacts:
    """Estimate the memory of one device: for this run, for its other levels of activation checkpointing, for other strategies.

    Args:
        setup: with the checkpointing level of this run.
        used: the strategy of this run.
    """
    own_level, rows = of.training.checkpointing, []
    for level in sorted(LEVELS, key=lambda level: level is not own_level):
        suffix = f", activation checkpointing {level.value}"
        rows.append(_row(of.at(level), used, chosen=level is own_level, more=suffix))
    rows += [_row(of, strategy) for strategy in ways(of) if strategy is not used]
    full_micro_batch = Load(
        plan.most_tokens, plan.most_tiles, round(plan.most_tokens * of.load.supervised / max(of.load.tokens, 1))
    )
    at_caps = replace(of, load=full_micro_batch).memory(used).total
    device = of.device or DEVICES[config.preflight.device]
    load, compared = of.load, of.device is not None
    return MemoryFacts(device.name, device.memory, compared, load.tokens, load.tiles, load.supervised, at_caps, rows)


def _row(of: Situation, strategy: Strategy, *, chosen: bool = False, more: str = "") -> MemoryRow:
    name, note = NAMES[strategy], ""
    if of.world_size > 1:
        name += f" over {of.world_size:,} devices"
    if strategy is Strategy.hsdp:
        name += f", {of.shard_size or of.devices_per_node} to a copy"
    if strategy is Strategy.deepspeed_zero3_offload:
        host = host_bytes(of.parameters, of.training, of.world_size, of.devices_per_node)
        note = f"and {gigabytes(host)} of each node's own memory"
    return MemoryRow(name + more, strategy.value, of.world_size, of.memory(strategy).parts, chosen, note)


def time_facts(config: RunConfig, flops: float, plan: PlanFacts, network: float) -> TimeFacts:
    """Estimate the training time.

    Args:
        flops: of the whole plan.
        network: share of the devices' speed that is left after waiting for the network.
    """
    device, share = DEVICES[config.preflight.device], config.preflight.utilisation
    balance = plan.balance_ranks
    seconds = device.seconds(flops, devices=plan.world_size, utilisation=share, balance=balance) / network
    return TimeFacts(
        flops=flops,
        devices=plan.world_size,
        device=device.name,
        peak=device.peak,
        utilisation=share,
        balance=balance,
        network=network,
        seconds=seconds,
        device_hours=seconds * plan.world_size / 3600,
    )


def work_of(model_config: dict[str, Any], config: RunConfig, training: Training) -> Flops:
    """Compute the FLOPs model of the run, with recomputation and the reference model."""
    return Flops.from_config(
        model_config,
        trains_tower=training.trains_tower,
        trains_language_model=training.trains_language_model,
        recomputes=training.again,
        reference=isinstance(config.stage, DPOStageConfig) and not config.stage.cache_reference,
    )


def disk_rows(
    config: RunConfig, run_dir: Path, store: Path, parameters: Parameters, index_bytes: float
) -> list[DiskRow]:
    """Estimate the peak disk space of the run: model, checkpoints, report, index and plan.

    The model counts once: it is written to a temporary folder, and an older one that it replaces is on disk already.
    Checkpoints are deleted after the model is written. Each holds the trainable parameters and AdamW's two moments, under
    ZeRO in float32 for any precision.
    """
    precision, kept = Precision.named(config.trainer.precision), config.checkpoint
    model = float(parameters.total) * precision.weight
    number = kept.keep_last + 1 + kept.keep_best  # + 1: the one that is being written; keep_best: the best
    checkpoints = float(parameters.trainable) * (1 + ADAM) * max(4, precision.weight) * number
    return [
        DiskRow("the model in transformers' layout", model, str(run_dir / "hf"), _free(run_dir)),
        DiskRow(f"at most {counted(number, 'checkpoint')}", checkpoints, str(run_dir / "checkpoints"), _free(run_dir)),
        DiskRow("report, metrics, samples", REPORT_BYTES, str(run_dir), _free(run_dir)),
        DiskRow("index and plan", index_bytes, str(store), _free(store)),
    ]


def bytes_in(folder: Path) -> int:
    """Sum the sizes of all files below a folder, in bytes."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else 0


def _free(path: Path) -> float:
    place = next(place for place in (path, *path.parents) if os.path.lexists(place))
    return float(shutil.disk_usage(place).free)
