"""Estimates that preflight shows: the strategy with its alternatives, memory, time, disk."""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from lit_vlm.config.choices import ActivationCheckpointing, StrategyName
from lit_vlm.config.schema import CheckpointConfig, StageConfig, TrainerConfig
from lit_vlm.config.task_settings import PreflightConfig
from lit_vlm.cost import (
    DEVICES,
    Device,
    Flops,
    MicroBatchSize,
    ParameterCounts,
    TrainingOptions,
    TrainingSetup,
)
from lit_vlm.cost.memory import NUM_ADAM_MOMENTS, Precision, compute_host_bytes
from lit_vlm.cost.strategy import CHECKPOINTING_LEVELS, MOSTLY_FROZEN_SHARE, SHARDINGS, select_strategy
from lit_vlm.formatting import format_bytes, format_count
from lit_vlm.model.parts import PartSummary
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
from lit_vlm.types import ModelPart

CPU_MATRIX_SIZE, CPU_REPETITIONS = 512, 8  # of the matrix products that measure a CPU: some hundredths of a second
MIN_COMPUTE_SHARE = 0.9  # below this share of the devices' speed, report the network

STRATEGY_NAMES = {
    StrategyName.single: "one device",
    StrategyName.ddp: "DDP",
    StrategyName.deepspeed_zero2: "ZeRO-2",
    StrategyName.deepspeed_zero3: "ZeRO-3",
    StrategyName.deepspeed_zero3_offload: "ZeRO-3 with offload",
    StrategyName.fsdp2: "FSDP2",
    StrategyName.hsdp: "HSDP",
}


def summarize_strategy(
    setup: TrainingSetup, plan: PlanFacts, strategy: StrategyName, level: ActivationCheckpointing
) -> StrategyFacts:
    """Summarize the strategy of the run, its activation checkpointing, its communication, and the choice of `auto`.

    Args:
        strategy, level: as set, also `auto`.
    """
    decision = select_strategy(setup, strategy)
    advised, used = decision.advised, decision.strategy
    mean_setup = replace(
        setup.replace_level(decision.level),
        micro_batch=MicroBatchSize(
            round(plan.pack_tokens.mean), round(plan.pack_tiles.mean), max(1, plan.supervised // _count_packs(plan))
        ),
    )
    timing = mean_setup.simulate_step(used)
    return StrategyFacts(
        name=used.value,
        title=STRATEGY_NAMES[used],
        asked=strategy is not StrategyName.auto,
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
        level_asked=level is not ActivationCheckpointing.auto,
        level_reason=decision.level_reason,
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


def list_parts(summaries: list[PartSummary], stage: StageConfig) -> list[PartRow]:
    """List the parts of the model with parameters, trainable parameters and learning rate."""
    rows = []
    for row in summaries:
        rate = stage.get_part_setting(ModelPart(row.part), "learning_rate") if row.trainable else None
        rows.append(PartRow(row.part, row.parameters, row.trainable, rate, row.how))
    return rows


def compare_memory(setup: TrainingSetup, used: StrategyName, plan: PlanFacts, device: Device) -> MemoryFacts:
    """Estimate the memory of one device: for this run, for its other levels of activation checkpointing, for other strategies.

    Args:
        setup: with the checkpointing level of this run.
        used: the strategy of this run.
        device: device to show if memory is not compared.
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
    device = setup.device or device
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


def trains_on_cpu(trainer: TrainerConfig) -> bool:
    """Return True if the trainer would train on the CPU of this machine."""
    return trainer.accelerator == "cpu" or (trainer.accelerator == "auto" and not torch.cuda.is_available())


def get_planned_device(preflight: PreflightConfig, trainer: TrainerConfig) -> Device:
    """Return the device that the run is planned for: this machine for a run on its CPU, else that of `preflight.device`."""
    return measure_cpu(trainer.num_threads) if trains_on_cpu(trainer) else DEVICES[preflight.device]


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


def estimate_time(
    preflight: PreflightConfig, trainer: TrainerConfig, flops: float, plan: PlanFacts, network: float
) -> TimeFacts:
    """Estimate the training time.

    Args:
        flops: of the whole plan.
        network: share of the devices' speed that is left after waiting for the network.
    """
    device, share = get_planned_device(preflight, trainer), preflight.utilisation
    balance = plan.balance_ranks
    devices = 1 if trains_on_cpu(trainer) else plan.world_size  # its processes share the machine
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


def compute_flops(model_config: dict[str, Any], stage: StageConfig, training: TrainingOptions) -> Flops:
    """Compute the FLOPs model of the run, with recomputation and the reference model."""
    return Flops.from_config(
        model_config,
        trains_tower=training.trains_tower,
        trains_language_model=training.trains_language_model,
        recomputed_share=training.recomputed_share,
        has_reference=stage.has_reference_model,
    )


def estimate_disk(
    checkpoint: CheckpointConfig,
    precision_name: str,
    run_dir: Path,
    store: Path,
    parameters: ParameterCounts,
    index_bytes: float,
) -> list[DiskRow]:
    """Estimate the peak disk space of the run: model, checkpoints, report, index and plan.

    The model counts once: it is written to a temporary folder, and an older one that it replaces is on disk already.
    Checkpoints are deleted after the model is written. Each holds the trainable parameters and AdamW's two moments, under
    ZeRO in float32 for any precision.
    """
    precision, kept = Precision.from_name(precision_name), checkpoint
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
