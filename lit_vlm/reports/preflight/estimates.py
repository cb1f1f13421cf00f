"""Choice of the distributed strategy: the value of `trainer.strategy`, its reason, and the cost of the alternatives."""

from __future__ import annotations

import copy
import math
import os
import shutil
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lit_vlm.config.schema import ActivationCheckpointing, RunConfig, StageConfig, StrategyName
from lit_vlm.config.schema import ActivationCheckpointing as Level
from lit_vlm.cost import (
    DEVICES,
    Device,
    Fabric,
    Flops,
    MicroBatchSize,
    ModelShape,
    ParameterCounts,
    StrategyChoice,
    TrainingOptions,
    TrainingSetup,
    choose_level,
    choose_strategy,
    describe_level,
)
from lit_vlm.cost.memory import NUM_ADAM_MOMENTS, Precision, compute_host_bytes
from lit_vlm.cost.strategy import CPU_REASON, MOSTLY_FROZEN_SHARE, SHARDINGS
from lit_vlm.formatting import format_bytes, format_count
from lit_vlm.model.parts import get_part
from lit_vlm.model.skeleton import build_on_meta, list_frozen_matrices, list_matrices
from lit_vlm.model.spec import ModelSpec
from lit_vlm.reports.preflight.facts import (
    DiskRow,
    Finding,
    MemoryFacts,
    MemoryRow,
    PartRow,
    PlanFacts,
    Severity,
    StrategyFacts,
    TimeFacts,
)
from lit_vlm.stages import DPOStage, Stage
from lit_vlm.stages.optimizer import get_part_setting
from lit_vlm.types import ModelPart

CPU_MATRIX_SIZE, CPU_REPETITIONS = 512, 8  # of the matrix products that measure a CPU: some hundredths of a second
DEVICES_PER_NODE = 8  # devices of a node, if the run has one device and preflight.world_size is larger
MIN_COMPUTE_SHARE = 0.9  # below this share of the devices' speed, report the network

CHECKPOINTING_LEVELS = (
    ActivationCheckpointing.none,
    ActivationCheckpointing.selective,
    ActivationCheckpointing.full,
)  # choices of `auto`, the fastest first

STRATEGY_NAMES = {
    StrategyName.single: "one device",
    StrategyName.ddp: "DDP",
    StrategyName.deepspeed_zero2: "ZeRO-2",
    StrategyName.deepspeed_zero3: "ZeRO-3",
    StrategyName.deepspeed_zero3_offload: "ZeRO-3 with offload",
    StrategyName.fsdp2: "FSDP2",
    StrategyName.hsdp: "HSDP",
}


@dataclass(frozen=True, slots=True)
class StrategyDecision:
    """Strategy and activation checkpointing level of a run, with reasons, and the choice of `auto`."""

    strategy: StrategyName
    reason: str  # for the choice of `auto`
    level: ActivationCheckpointing
    level_reason: str
    advised: StrategyChoice


def make_training_setup(
    config: RunConfig,
    shape: ModelShape,
    parameters: ParameterCounts,
    training: TrainingOptions,
    plan: PlanFacts,
    device: Device | None = None,
) -> TrainingSetup:
    """Make the setup that decides the strategy.

    A trainer on a CPU has no memory limit: there every strategy fits.

    Args:
        device: the actual device; None: the one that `preflight.device` names.
    """
    if device is None and config.trainer.accelerator in ("gpu", "cuda"):
        device = DEVICES[config.preflight.device]
    return TrainingSetup(
        shape=shape,
        parameters=parameters,
        training=training,
        micro_batch=MicroBatchSize(round(plan.pack_tokens.most), round(plan.pack_tiles.most), plan.most_supervised),
        world_size=plan.world_size,
        devices_per_node=get_devices_per_node(config, plan.world_size),
        device=device,
        utilisation=config.preflight.utilisation,
        fabric=Fabric.from_gigabits(config.preflight.network),
        shard_size=config.trainer.shard_size,
        num_micro_batches=plan.k,
        allowed_levels=CHECKPOINTING_LEVELS
        if config.stage.activation_checkpointing is ActivationCheckpointing.auto
        else (),
    )


def get_devices_per_node(config: RunConfig, world_size: int) -> int:
    """Return the devices of a node: those of the run, or `DEVICES_PER_NODE` if the run has one device and plans for more."""
    alone = config.trainer.devices * config.trainer.num_nodes == 1
    return min(world_size, DEVICES_PER_NODE if alone else config.trainer.devices)


def summarize_strategy(config: RunConfig, setup: TrainingSetup, plan: PlanFacts) -> StrategyFacts:
    """Summarize the strategy of the run, its activation checkpointing, its communication, and the choice of `auto`."""
    decision = select_strategy(config, setup)
    advised, strategy = decision.advised, decision.strategy
    mean_setup = replace(
        setup.replace_level(decision.level),
        micro_batch=MicroBatchSize(
            round(plan.pack_tokens.mean), round(plan.pack_tiles.mean), max(1, plan.supervised // _count_packs(plan))
        ),
    )
    timing = mean_setup.simulate_step(strategy)
    return StrategyFacts(
        name=strategy.value,
        title=STRATEGY_NAMES[strategy],
        asked=config.trainer.strategy is not StrategyName.auto,
        advised=advised.strategy.value,
        reason=advised.reason,
        advised_fits=advised.fits,
        network=setup.fabric.name if setup.num_nodes > 1 else "one node",
        step=timing.total_seconds if timing else 0.0,
        communication=timing.communication_seconds if timing else 0.0,
        exposed=timing.exposed_seconds if timing else 0.0,
        inside=timing.traffic.intra_node_bytes if timing else 0.0,
        outside=timing.traffic.inter_node_bytes if timing else 0.0,
        level=decision.level.value,
        level_asked=config.stage.activation_checkpointing is not ActivationCheckpointing.auto,
        level_reason=decision.level_reason,
    )


def select_strategy(config: RunConfig, setup: TrainingSetup) -> StrategyDecision:
    """Select strategy and activation checkpointing level: as set, or chosen where the setting is `auto`."""
    best, requested = choose_strategy(setup), config.trainer.strategy
    strategy = best.strategy if requested is StrategyName.auto else requested
    level = best.level if requested is StrategyName.auto else choose_level(setup, strategy)
    return StrategyDecision(strategy, best.reason, level, describe_level(setup, strategy, level), best)


def select_cpu_strategy(config: RunConfig) -> StrategyDecision:
    """Select the strategy on a CPU: full copies of the model without activation checkpointing, since memory is not compared."""
    strategy = StrategyName.ddp if config.trainer.devices * config.trainer.num_nodes > 1 else StrategyName.single
    best = StrategyChoice(strategy, "the trainer is on a CPU")
    requested, level = config.trainer.strategy, config.stage.activation_checkpointing
    return StrategyDecision(
        strategy if requested is StrategyName.auto else requested,
        best.reason,
        best.level if level is ActivationCheckpointing.auto else level,
        CPU_REASON,
        best,
    )


def _count_packs(plan: PlanFacts) -> int:
    return max(1, plan.steps * plan.k * plan.world_size)


def list_strategies(setup: TrainingSetup) -> list[StrategyName]:
    """List the strategies to show: those of a single device, or all distributed ones."""
    if setup.world_size == 1:
        return [StrategyName.single, StrategyName.deepspeed_zero3_offload]
    left_out = {StrategyName.single, *([StrategyName.hsdp] if setup.num_nodes == 1 else [])}
    return [strategy for strategy in SHARDINGS if strategy not in left_out]


def check_strategy(setup: TrainingSetup, facts: StrategyFacts) -> Iterator[Finding]:
    """Check a named strategy: report one that is slow or that another one would beat."""
    used, world_size = StrategyName(facts.name), setup.world_size
    if used is StrategyName.deepspeed_zero3_offload and facts.advised == used.value and facts.advised_fits:
        what = f"Weights and optimizer move between the host's memory and the device: {facts.reason}."
        yield Finding(Severity.warning, what, "More devices, LoRA, or fewer parts that train would be faster.")
    if not facts.asked or world_size == 1 or not setup.can_fit(used):
        return
    frozen = setup.parameters.trainable < MOSTLY_FROZEN_SHARE * setup.parameters.total
    shards_weights = used not in (StrategyName.ddp, StrategyName.deepspeed_zero2, StrategyName.single)
    if shards_weights and frozen and setup.can_fit(StrategyName.ddp):
        what = f"{facts.title} sends all weights several times in each micro-batch, and nearly all of them are frozen."
        yield Finding(Severity.warning, what, "A whole copy fits on each device: trainer=ddp sends what trains alone.")
    elif used is StrategyName.deepspeed_zero3_offload and facts.advised != used.value:
        what = "Offloading moves the states to the host's memory and back in each step, and they would fit without."
        yield Finding(Severity.warning, what, f"trainer={facts.advised}: {facts.reason}.")
    elif facts.share < MIN_COMPUTE_SHARE and facts.advised != used.value:
        what = f"The devices wait for the network for {1 - facts.share:.0%} of the time with {facts.title} ({facts.network})."
        yield Finding(Severity.advice, what, f"trainer={facts.advised}: {facts.reason}.")


REPORT_BYTES = 5e6  # a report with its images, samples and metrics; about the size in the shipped recipes


def prepare_meta_stage(stage: Stage, spec: ModelSpec) -> Stage:
    """Prepare a stage with its model on torch's `meta` device: shapes, adapters and frozen parameters, without memory.

    A reference model from another folder is not loaded: it is as large as the model itself, and only its size matters.
    """
    if isinstance(stage, DPOStage):
        stage.config.reference = None
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
        rate = get_part_setting(stage.config, ModelPart(row.part), "learning_rate") if row.trainable else None
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
    if not config.has_reference_model:
        return None
    return stage.model if config.model_folders else getattr(stage, "reference", None)


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
    device = setup.device or get_planned_device(config)
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


def trains_on_cpu(config: RunConfig) -> bool:
    """Return True if the trainer would train on the CPU of this machine."""
    accelerator = config.trainer.accelerator
    return accelerator == "cpu" or (accelerator == "auto" and not torch.cuda.is_available())


def get_planned_device(config: RunConfig) -> Device:
    """Return the device that the run is planned for: this machine for a run on its CPU, else that of `preflight.device`."""
    return measure_cpu(config.trainer.num_threads) if trains_on_cpu(config) else DEVICES[config.preflight.device]


@cache
def measure_cpu(num_threads: int | None) -> Device:
    """Measure the CPU of this machine: its memory, and the FLOP/s of the best of some float32 matrix products.

    Args:
        num_threads: threads of a process; None: torch's choice.
    """
    memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    threads, matrix, seconds = torch.get_num_threads(), torch.ones(CPU_MATRIX_SIZE, CPU_MATRIX_SIZE), math.inf
    torch.set_num_threads(num_threads or threads)
    try:
        for _ in range(CPU_REPETITIONS):
            started = time.perf_counter()
            torch.mm(matrix, matrix)
            seconds = min(seconds, time.perf_counter() - started)
    finally:
        torch.set_num_threads(threads)
    return Device("this machine's CPU", memory, 2 * CPU_MATRIX_SIZE**3 / seconds)


def estimate_time(config: RunConfig, flops: float, plan: PlanFacts, network: float) -> TimeFacts:
    """Estimate the training time.

    Args:
        flops: of the whole plan.
        network: share of the devices' speed that is left after waiting for the network.
    """
    device, share = get_planned_device(config), config.preflight.utilisation
    balance = plan.balance_ranks
    devices = 1 if trains_on_cpu(config) else plan.world_size  # its processes share the machine
    seconds = device.estimate_seconds(flops, devices=devices, utilisation=share, balance=balance) / network
    return TimeFacts(
        flops=flops,
        devices=devices,
        device=device.name,
        peak=device.peak_flops_per_second,
        utilisation=share,
        balance=balance,
        network=network,
        seconds=seconds,
        device_hours=seconds * devices / 3600,
    )


def compute_flops(model_config: dict[str, Any], config: RunConfig, training: TrainingOptions) -> Flops:
    """Compute the FLOPs model of the run, with recomputation and the reference model."""
    return Flops.from_config(
        model_config,
        trains_tower=training.trains_tower,
        trains_language_model=training.trains_language_model,
        recomputed_share=training.recomputed_share,
        has_reference=config.stage.has_reference_model,
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
