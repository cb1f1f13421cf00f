"""What of preflight follows from the model's config: what trains, memory, time, disk. No weight is read."""

from __future__ import annotations

import copy
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

from torch import nn

from lit_vlm.config.schema import DPOStageConfig, RunConfig, StageConfig
from lit_vlm.cost import DEVICES, Flops, Load, Parameters, Shape, Training, memory_of
from lit_vlm.cost.memory import Precision, Sharding
from lit_vlm.engine.preflight.facts import DiskRow, MemoryFacts, MemoryRow, PartRow, PlanFacts, TimeFacts
from lit_vlm.model.build import Blueprint, build_on_meta
from lit_vlm.model.parts import part_of
from lit_vlm.stages import Stage
from lit_vlm.types import Part

WORLD = 8  # devices that the ways to share are shown for where the run has one
REPORT_BYTES = 5e6  # a report with its pictures, samples and metrics; about what the shipped recipes leave
OUR_WAYS = (Sharding.single, Sharding.ddp)
OTHER_WAYS = {Sharding.zero2: "ZeRO-2", Sharding.zero3: "ZeRO-3", Sharding.fsdp2: "FSDP2"}


def outline(stage: Stage, blueprint: Blueprint) -> Stage:
    """The stage with its model on torch's `meta` device: shapes, adapters and what is frozen, but no memory."""
    config = copy.deepcopy(blueprint.config)
    config.text_config.vocab_size = max(config.text_config.vocab_size, len(blueprint.tokenizer))
    stage.model = build_on_meta(config)
    ids = blueprint.tokenizer.convert_tokens_to_ids
    stage._new_ids, stage._special_ids = ids(blueprint.new_tokens), ids(blueprint.special_tokens)
    with warnings.catch_warnings(action="ignore"):  # transformers' about names of its own
        stage._prepare_training()
    return stage


def part_rows(stage: Stage) -> list[PartRow]:
    rows = []
    for row in stage.part_summary:
        rate = stage.options.of(Part(row.part), "learning_rate") if row.trainable else None
        rows.append(PartRow(row.part, row.parameters, row.trainable, rate, row.how))
    return rows


def parameters_of(stage: Stage, config: StageConfig) -> Parameters:
    """Numbers for the memory estimate."""
    model = stage.model
    assert model is not None
    crossed = [part for part in Part if part is not Part.vision_tower or part in config.trainable]
    matrices = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and part_of(f"{name}.") in crossed
    ]
    cast = {id(p): p for _, module in matrices for p in module.parameters(recurse=False)}.values()
    layers: Any = model.model.language_model.layers
    return Parameters(
        total=sum(p.numel() for p in model.parameters()),
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        cast=sum(p.numel() for p in cast),
        cast_frozen=sum(p.numel() for p in cast if not p.requires_grad),
        largest_layer=max(sum(p.numel() for p in layers[0].parameters()), model.lm_head.weight.numel()),
    )


def training_of(config: RunConfig, parameters: Parameters) -> Training:
    stage = config.stage
    lora = stage.parts.language_model.lora.rank > 0
    return Training(
        Precision.named(config.trainer.precision),
        trains_language_model=Part.language_model in stage.trainable,
        trains_tower=Part.vision_tower in stage.trainable,
        checkpointing=stage.activation_checkpointing,
        # under LoRA the reference is the model itself, with its adapters off
        reference=parameters.total if isinstance(stage, DPOStageConfig) and (stage.reference or not lora) else 0,
    )


def memory_facts(config: RunConfig, shape: Shape, parameters: Parameters, plan: PlanFacts) -> MemoryFacts:
    """The chosen way first, with and without activation checkpointing, then the others."""
    device = DEVICES[config.preflight.device]
    load = Load(round(plan.pack_tokens.most), round(plan.pack_tiles.most), plan.most_supervised)
    chosen, world = chosen_way(config, plan.world_size), plan.world_size
    training = training_of(config, parameters)
    rows = []
    for checkpointing in (training.checkpointing, not training.checkpointing):
        memory = memory_of(shape, parameters, _with(training, checkpointing), load, chosen, world)
        name = _name(chosen, world) + (" with activation checkpointing" if checkpointing else "")
        own = checkpointing is training.checkpointing
        name += " without activation checkpointing" if not own and not checkpointing else ""
        rows.append(MemoryRow(name, world, memory.parts, own, chosen in OUR_WAYS))
    spread = world if world > 1 else WORLD
    for way in (Sharding.ddp, *OTHER_WAYS):
        if way is not chosen and (spread > 1):
            memory = memory_of(shape, parameters, training, load, way, spread)
            rows.append(MemoryRow(_name(way, spread), spread, memory.parts, False, way in OUR_WAYS))
    caps = Load(plan.most_tokens, plan.most_tiles, round(plan.most_tokens * load.supervised / max(load.tokens, 1)))
    at_caps = memory_of(shape, parameters, training, caps, chosen, world).total
    compared = config.trainer.accelerator in ("gpu", "cuda")
    return MemoryFacts(device.name, device.memory, compared, load.tokens, load.tiles, load.supervised, at_caps, rows)


def chosen_way(config: RunConfig, world_size: int) -> Sharding:
    """What `trainer.strategy` comes to; Lightning's `auto` is DDP on several devices."""
    strategy = config.trainer.strategy.lower()
    if "deepspeed" in strategy:
        return Sharding.zero3 if "3" in strategy else Sharding.zero2
    if "fsdp" in strategy or "model_parallel" in strategy:
        return Sharding.fsdp2
    return Sharding.ddp if world_size > 1 else Sharding.single


def time_facts(config: RunConfig, flops: float, plan: PlanFacts) -> TimeFacts:
    device, share = DEVICES[config.preflight.device], config.preflight.utilisation
    seconds = device.seconds(flops, devices=plan.world_size, utilisation=share, balance=plan.balance_ranks)
    return TimeFacts(
        flops=flops,
        devices=plan.world_size,
        device=device.name,
        peak=device.peak,
        utilisation=share,
        balance=plan.balance_ranks,
        seconds=seconds,
        device_hours=seconds * plan.world_size / 3600,
    )


def work_of(model_config: dict[str, Any], config: RunConfig, training: Training) -> Flops:
    """All that the device does, recomputing and a reference included."""
    return Flops.from_config(
        model_config,
        trains_tower=training.trains_tower,
        trains_language_model=training.trains_language_model,
        recomputes=training.checkpointing,
        reference=isinstance(config.stage, DPOStageConfig),
    )


def disk_rows(run_dir: Path, store: Path, parameters: int, precision: Precision, index_bytes: float) -> list[DiskRow]:
    """What the run will write: the model twice for a moment (it is written beside its place), report, index and plan."""
    model = float(parameters) * precision.weight
    return [
        DiskRow("the model in transformers' layout", model, str(run_dir / "hf"), _free(run_dir)),
        DiskRow("report, metrics, samples", REPORT_BYTES, str(run_dir), _free(run_dir)),
        DiskRow("index and plan", index_bytes, str(store), _free(store)),
    ]


def bytes_in(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else 0


def _free(path: Path) -> float:
    place = next(place for place in (path, *path.parents) if os.path.lexists(place))
    return float(shutil.disk_usage(place).free)


def _name(way: Sharding, world_size: int) -> str:
    if way is Sharding.single:
        return "one device"
    name = "DDP" if way is Sharding.ddp else OTHER_WAYS[way]
    return f"{name} over {world_size:,} devices"


def _with(training: Training, checkpointing: bool) -> Training:
    return Training(
        training.precision, training.trains_language_model, training.trains_tower, checkpointing, training.reference
    )
