"""Choice of the distributed strategy: the value of `trainer.strategy`, its reason, and the cost of the alternatives."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from lit_vlm.config.schema import ActivationCheckpointing, RunConfig, StrategyName
from lit_vlm.cost import (
    DEVICES,
    Device,
    Fabric,
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
from lit_vlm.cost.choice import CPU_REASON, MOSTLY_FROZEN_SHARE
from lit_vlm.cost.situation import SHARDINGS
from lit_vlm.engine.preflight.facts import Finding, PlanFacts, Severity, StrategyFacts

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
