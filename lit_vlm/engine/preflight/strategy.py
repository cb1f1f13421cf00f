"""Choice of the distributed strategy: the value of `trainer.strategy`, its reason, and the cost of the alternatives."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from lit_vlm.config.schema import ActivationCheckpointing, RunConfig, Strategy
from lit_vlm.cost import (
    DEVICES,
    Choice,
    Device,
    Fabric,
    Load,
    Parameters,
    Shape,
    Situation,
    Training,
    choose,
    level_for,
    why_level,
)
from lit_vlm.cost.choice import MOSTLY_FROZEN, ON_CPU
from lit_vlm.cost.situation import SHARDINGS
from lit_vlm.engine.preflight.facts import Finding, Level, PlanFacts, StrategyFacts

NODE = 8  # devices of a node, if the run has one device and preflight.world_size is larger
SLOW = 0.9  # below this share of the devices' speed, report the network

LEVELS = (
    ActivationCheckpointing.none,
    ActivationCheckpointing.selective,
    ActivationCheckpointing.full,
)  # choices of `auto`, the fastest first

NAMES = {
    Strategy.single: "one device",
    Strategy.ddp: "DDP",
    Strategy.deepspeed_zero2: "ZeRO-2",
    Strategy.deepspeed_zero3: "ZeRO-3",
    Strategy.deepspeed_zero3_offload: "ZeRO-3 with offload",
    Strategy.fsdp2: "FSDP2",
    Strategy.hsdp: "HSDP",
}


@dataclass(frozen=True, slots=True)
class Decision:
    """Strategy and activation checkpointing level of a run, with reasons, and the choice of `auto`."""

    strategy: Strategy
    reason: str  # for the choice of `auto`
    level: ActivationCheckpointing
    level_reason: str
    advised: Choice


def situation_of(
    config: RunConfig,
    shape: Shape,
    parameters: Parameters,
    training: Training,
    plan: PlanFacts,
    device: Device | None = None,
) -> Situation:
    """Make the setup that decides the strategy.

    A trainer on a CPU has no memory limit: there every strategy fits.

    Args:
        device: the actual device; None: the one that `preflight.device` names.
    """
    if device is None and config.trainer.accelerator in ("gpu", "cuda"):
        device = DEVICES[config.preflight.device]
    return Situation(
        shape=shape,
        parameters=parameters,
        training=training,
        load=Load(round(plan.pack_tokens.most), round(plan.pack_tiles.most), plan.most_supervised),
        world_size=plan.world_size,
        devices_per_node=per_node(config, plan.world_size),
        device=device,
        utilisation=config.preflight.utilisation,
        fabric=Fabric.of_node(config.preflight.network),
        shard_size=config.trainer.shard_size,
        k=plan.k,
        levels=LEVELS if config.stage.activation_checkpointing is ActivationCheckpointing.auto else (),
    )


def per_node(config: RunConfig, world_size: int) -> int:
    """Return the devices of a node: those of the run, or `DEVICES_PER_NODE` if the run has one device and plans for more."""
    alone = config.trainer.devices * config.trainer.num_nodes == 1
    return min(world_size, NODE if alone else config.trainer.devices)


def strategy_facts(config: RunConfig, situation: Situation, plan: PlanFacts) -> StrategyFacts:
    """Summarize the strategy of the run, its activation checkpointing, its communication, and the choice of `auto`."""
    decision = decided(config, situation)
    advised, strategy = decision.advised, decision.strategy
    mean_setup = replace(
        situation.at(decision.level),
        load=Load(round(plan.pack_tokens.mean), round(plan.pack_tiles.mean), max(1, plan.supervised // _packs(plan))),
    )
    timing = mean_setup.timing(strategy)
    return StrategyFacts(
        name=strategy.value,
        title=NAMES[strategy],
        asked=config.trainer.strategy is not Strategy.auto,
        advised=advised.strategy.value,
        reason=advised.reason,
        advised_fits=advised.fits,
        network=situation.fabric.name if situation.nodes > 1 else "one node",
        step=timing.total if timing else 0.0,
        communication=timing.communication if timing else 0.0,
        exposed=timing.exposed if timing else 0.0,
        inside=timing.traffic.inside if timing else 0.0,
        outside=timing.traffic.outside if timing else 0.0,
        level=decision.level.value,
        level_asked=config.stage.activation_checkpointing is not ActivationCheckpointing.auto,
        level_reason=decision.level_reason,
    )


def decided(config: RunConfig, situation: Situation) -> Decision:
    """Select strategy and activation checkpointing level: as set, or chosen where the setting is `auto`."""
    best, requested = choose(situation), config.trainer.strategy
    strategy = best.strategy if requested is Strategy.auto else requested
    level = best.level if requested is Strategy.auto else level_for(situation, strategy)
    return Decision(strategy, best.reason, level, why_level(situation, strategy, level), best)


def on_a_cpu(config: RunConfig) -> Decision:
    """Select the strategy on a CPU: full copies of the model without activation checkpointing, since memory is not compared."""
    strategy = Strategy.ddp if config.trainer.devices * config.trainer.num_nodes > 1 else Strategy.single
    best = Choice(strategy, "the trainer is on a CPU")
    requested, level = config.trainer.strategy, config.stage.activation_checkpointing
    return Decision(
        strategy if requested is Strategy.auto else requested,
        best.reason,
        best.level if level is ActivationCheckpointing.auto else level,
        ON_CPU,
        best,
    )


def _packs(plan: PlanFacts) -> int:
    return max(1, plan.steps * plan.k * plan.world_size)


def ways(situation: Situation) -> list[Strategy]:
    """List the strategies to show: those of a single device, or all distributed ones."""
    if situation.world_size == 1:
        return [Strategy.single, Strategy.deepspeed_zero3_offload]
    left_out = {Strategy.single, *([Strategy.hsdp] if situation.nodes == 1 else [])}
    return [strategy for strategy in SHARDINGS if strategy not in left_out]


def of_strategy(situation: Situation, facts: StrategyFacts) -> Iterator[Finding]:
    """Check a named strategy: report one that is slow or that another one would beat."""
    used, world_size = Strategy(facts.name), situation.world_size
    if used is Strategy.deepspeed_zero3_offload and facts.advised == used.value and facts.advised_fits:
        what = f"Weights and optimizer move between the host's memory and the device: {facts.reason}."
        yield Finding(Level.warning, what, "More devices, LoRA, or fewer parts that train would be faster.")
    if not facts.asked or world_size == 1 or not situation.fits(used):
        return
    frozen = situation.parameters.trainable < MOSTLY_FROZEN * situation.parameters.total
    shards_weights = used not in (Strategy.ddp, Strategy.deepspeed_zero2, Strategy.single)
    if shards_weights and frozen and situation.fits(Strategy.ddp):
        what = f"{facts.title} sends all weights several times in each micro-batch, and nearly all of them are frozen."
        yield Finding(Level.warning, what, "A whole copy fits on each device: trainer=ddp sends what trains alone.")
    elif used is Strategy.deepspeed_zero3_offload and facts.advised != used.value:
        what = "Offloading moves the states to the host's memory and back in each step, and they would fit without."
        yield Finding(Level.warning, what, f"trainer={facts.advised}: {facts.reason}.")
    elif facts.share < SLOW and facts.advised != used.value:
        what = f"The devices wait for the network for {1 - facts.share:.0%} of the time with {facts.title} ({facts.network})."
        yield Finding(Level.advice, what, f"trainer={facts.advised}: {facts.reason}.")
