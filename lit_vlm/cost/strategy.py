"""Choice of the strategy and of the level of activation checkpointing, for training and for preflight."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from lit_vlm.config.choices import ActivationCheckpointing as Level
from lit_vlm.config.choices import StrategyName
from lit_vlm.config.schema import StageConfig, TrainerConfig
from lit_vlm.config.task_settings import PreflightConfig
from lit_vlm.cost.communication import (
    BytesPerValue,
    Cluster,
    CommunicationScheme,
    Fabric,
    LayerCost,
    StepTiming,
    compute_break_even_tokens,
    simulate_step,
)
from lit_vlm.cost.layers import build_layer_costs
from lit_vlm.cost.memory import (
    DEVICES,
    Device,
    MemoryEstimate,
    MicroBatchSize,
    ParameterCounts,
    Precision,
    Sharding,
    TrainingOptions,
    estimate_memory,
)
from lit_vlm.cost.model_shape import ModelShape
from lit_vlm.formatting import format_bytes, format_count
from lit_vlm.types import ModelPart

SHARDINGS = {
    StrategyName.single: Sharding.single,
    StrategyName.ddp: Sharding.ddp,
    StrategyName.deepspeed_zero2: Sharding.zero2,
    StrategyName.deepspeed_zero3: Sharding.zero3,
    StrategyName.deepspeed_zero3_offload: Sharding.offload,
    StrategyName.fsdp2: Sharding.fsdp2,
    StrategyName.hsdp: Sharding.hsdp,
}
SCHEMES = {
    StrategyName.ddp: CommunicationScheme.ddp,
    StrategyName.deepspeed_zero2: CommunicationScheme.zero2,
    StrategyName.deepspeed_zero3: CommunicationScheme.zero3,
    StrategyName.deepspeed_zero3_offload: CommunicationScheme.zero3,
    StrategyName.fsdp2: CommunicationScheme.zero3,
    StrategyName.hsdp: CommunicationScheme.hsdp,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSetup:
    """Training setup: model, parts that train, micro-batch and cluster.

    Attributes:
        shape: sizes of the model.
        parameters: numbers of parameters.
        training: precision and parts that train.
        micro_batch: the largest micro-batch of a device.
        world_size: number of all devices.
        devices_per_node: number of devices of one node.
        device: its memory and peak speed. None: memory is not compared, as on a CPU, and everything fits.
        fabric: links between the devices.
        utilisation: share of the peak that training is assumed to reach.
        shard_size: for `hsdp`, number of devices that share one copy of the model; None: the devices of a node.
        num_micro_batches: micro-batches of a device in an optimizer step.
        allowed_levels: levels of activation checkpointing to choose from, the fastest first; empty: the level of
            `training`.
    """

    shape: ModelShape
    parameters: ParameterCounts
    training: TrainingOptions
    micro_batch: MicroBatchSize
    world_size: int
    devices_per_node: int
    device: Device | None
    fabric: Fabric
    utilisation: float = 0.4
    shard_size: int | None = None
    num_micro_batches: int = 1
    allowed_levels: tuple[Level, ...] = ()

    @property
    def candidate_levels(self) -> tuple[Level, ...]:
        """Levels of activation checkpointing to choose from."""
        return self.allowed_levels or (self.training.checkpointing,)

    def replace_level(self, level: Level) -> TrainingSetup:
        """Return the setup with one level of activation checkpointing and no choice of others."""
        return replace(self, training=replace(self.training, checkpointing=level), allowed_levels=())

    @property
    def num_nodes(self) -> int:
        """Number of full nodes, at least 1."""
        return max(1, self.world_size // self.devices_per_node)

    def estimate_memory(self, strategy: StrategyName, world_size: int | None = None) -> MemoryEstimate:
        """Estimate the memory of one device."""
        num_devices = world_size or self.world_size
        sharding_devices = (
            min(self.shard_size or self.devices_per_node, num_devices) if strategy is StrategyName.hsdp else num_devices
        )
        return estimate_memory(
            self.shape, self.parameters, self.training, self.micro_batch, SHARDINGS[strategy], sharding_devices
        )

    def can_fit(self, strategy: StrategyName, max_share: float = 1.0, world_size: int | None = None) -> bool:
        """Return True if the estimate is at most the share `max_share` of the device's memory."""
        return (
            self.device is None
            or self.estimate_memory(strategy, world_size).total <= max_share * self.device.memory_bytes
        )

    def simulate_step(self, strategy: StrategyName) -> StepTiming | None:
        """Simulate an optimizer step; None if nothing is sent or if no device speed is known."""
        if strategy not in SCHEMES or self.device is None or self.world_size == 1:
            return None
        layers = self._build_layers(self.device)
        per_node = self.shard_size if strategy is StrategyName.hsdp and self.shard_size else self.devices_per_node
        cluster = Cluster(self.world_size, self.fabric, min(per_node, self.world_size))
        return simulate_step(
            SCHEMES[strategy],
            layers,
            cluster,
            num_micro_batches=self.num_micro_batches,
            bytes_per_value=self.bytes_per_value,
        )

    def estimate_step_seconds(self, strategy: StrategyName) -> float:
        """Estimate the seconds of an optimizer step, without the transfers of offload."""
        if self.device is None:
            return 0.0
        timing = self.simulate_step(strategy)
        return (
            timing.total_seconds
            if timing
            else self.num_micro_batches
            * sum(layer.forward_seconds + layer.backward_seconds for layer in self._build_layers(self.device))
        )

    def _build_layers(self, device: Device) -> list[LayerCost]:
        flops_per_second = device.peak_flops_per_second * self.utilisation
        return build_layer_costs(self.shape, self.parameters, self.training, self.micro_batch, flops_per_second)

    @property
    def bytes_per_value(self) -> BytesPerValue:
        """Bytes of a weight and of a gradient when they are sent, from the precision."""
        precision = self.training.precision
        return BytesPerValue(weight=precision.compute_bytes, gradient=precision.weight_bytes)


COMFORTABLE_SHARE = 0.9  # maximum share of a device's memory that an estimate may use without risk
MOSTLY_FROZEN_SHARE = 0.1  # below this share of trainable weights the cost of the frozen weights dominates
MIN_SPEED_GAIN = 0.02  # share of the devices' speed: for a smaller gain, prefer the strategy with less network traffic
MAX_HALVINGS = 8  # maximum halvings of a micro-batch that does not fit with any strategy
CPU_REASON = "the trainer is on a CPU, whose memory nothing is compared with"
DEVICES_PER_NODE = 8  # devices of a node, if the run has one device and preflight.world_size is larger
CHECKPOINTING_LEVELS = (
    Level.none,
    Level.selective,
    Level.full,
)  # choices of `auto`, the fastest first
MAX_DEVICES = 4096  # upper limit of the search for a sufficient number


@dataclass(frozen=True, slots=True)
class StrategyChoice:
    """Chosen strategy, with the reason.

    Attributes:
        fits: True if it fits on the devices, by the estimate.
        min_devices: smallest number of devices that would be enough without offload, if these are too few; None: no number
            is enough.
        level: level of activation checkpointing.
    """

    strategy: StrategyName
    reason: str
    fits: bool = True
    min_devices: int | None = None
    level: Level = Level.none


def choose_strategy(setup: TrainingSetup) -> StrategyChoice:
    """Choose the strategy and the level of activation checkpointing of a stage, among the allowed levels.

    For each level the order is: DDP first, which sends the gradients of the trainable weights once per optimizer step and
    nothing else. If a full copy does not fit, the model is sharded inside a node or over all nodes, whichever waits less
    for the network, and at last offloaded to host memory. Of the results that fit on the devices, the fastest is chosen.
    If the micro-batch is too large for all of them, the choice is made for a smaller micro-batch, with the level that
    saves most memory.
    """
    if choice := _choose_fastest(setup):
        return choice
    smallest = setup.replace_level(setup.candidate_levels[-1])
    for halved in range(1, MAX_HALVINGS):
        smaller = _scale_micro_batch(smallest, 0.5**halved)
        if choice := _choose_fastest(smaller):
            sizes = f"micro-batches of {smaller.micro_batch.tokens:,} tokens would fit, those of {setup.micro_batch.tokens:,} do not"
            return replace(choice, reason=f"{choice.reason}; {sizes}", fits=False)
    need = smallest.estimate_memory(StrategyName.deepspeed_zero3_offload).total
    reason = f"nothing fits: a device needs {format_bytes(need)} at the least"
    return StrategyChoice(StrategyName.deepspeed_zero3_offload, reason, fits=False, level=setup.candidate_levels[-1])


def _choose_fastest(setup: TrainingSetup) -> StrategyChoice | None:
    """Choose the fastest strategy and level that fit; offload only if nothing else fits at any level. None if nothing fits."""
    choices = [
        replace(choice, level=level)
        for level in setup.candidate_levels
        if (
            choice := next((choice for choice in _iter_choices(setup.replace_level(level)) if choice is not None), None)
        )
    ]
    on_devices = [choice for choice in choices if choice.strategy is not StrategyName.deepspeed_zero3_offload]
    return min(
        on_devices or choices,
        key=lambda choice: setup.replace_level(choice.level).estimate_step_seconds(choice.strategy),
        default=None,
    )


def choose_level(setup: TrainingSetup, strategy: StrategyName) -> Level:
    """Choose the first allowed level that fits with a strategy; if none fits, the one that saves most memory."""
    return next(
        (level for level in setup.candidate_levels if setup.replace_level(level).can_fit(strategy)),
        setup.candidate_levels[-1],
    )


def describe_level(setup: TrainingSetup, strategy: StrategyName, level: Level) -> str:
    """Describe the estimated bytes with a level, the device's memory, and the bytes with the previous level."""
    if setup.device is None:
        return CPU_REASON
    need, name = setup.replace_level(level).estimate_memory(strategy).total, setup.device.name
    text = f"a device needs about {format_bytes(need)} of the {format_bytes(setup.device.memory_bytes)} of {name}"
    if level is setup.candidate_levels[0]:
        return text
    previous = setup.candidate_levels[setup.candidate_levels.index(level) - 1]
    return f"{text}; with {previous.value} it would need {format_bytes(setup.replace_level(previous).estimate_memory(strategy).total)}"


@dataclass(frozen=True, slots=True)
class StrategyDecision:
    """Strategy and activation checkpointing level of a run, with reasons, and the choice of `auto`."""

    strategy: StrategyName
    reason: str  # for the choice of `auto`
    level: Level
    level_reason: str
    advised: StrategyChoice


def select_strategy(setup: TrainingSetup, requested: StrategyName) -> StrategyDecision:
    """Select strategy and activation checkpointing level: as set, or chosen where the setting is `auto`."""
    best = choose_strategy(setup)
    strategy = best.strategy if requested is StrategyName.auto else requested
    level = best.level if requested is StrategyName.auto else choose_level(setup, strategy)
    return StrategyDecision(strategy, best.reason, level, describe_level(setup, strategy, level), best)


def select_cpu_strategy(trainer: TrainerConfig, level: Level) -> StrategyDecision:
    """Select the strategy on a CPU: full copies of the model without activation checkpointing, since memory is not compared."""
    requested = trainer.strategy
    strategy = StrategyName.ddp if trainer.devices * trainer.num_nodes > 1 else StrategyName.single
    best = StrategyChoice(strategy, "the trainer is on a CPU")
    return StrategyDecision(
        strategy if requested is StrategyName.auto else requested,
        best.reason,
        best.level if level is Level.auto else level,
        CPU_REASON,
        best,
    )


def make_training_setup(
    shape: ModelShape,
    parameters: ParameterCounts,
    micro_batch: MicroBatchSize,
    *,
    world_size: int,
    num_micro_batches: int,
    stage: StageConfig,
    trainer: TrainerConfig,
    preflight: PreflightConfig,
    device: Device | None = None,
) -> TrainingSetup:
    """Make the setup that decides the strategy.

    A trainer on a CPU has no memory limit: there every strategy fits.

    Args:
        micro_batch: the largest micro-batch of a device.
        num_micro_batches: micro-batches of a device in an optimizer step.
        device: the actual device; None: the one that `preflight.device` names.
    """
    if device is None and trainer.accelerator in ("gpu", "cuda"):
        device = DEVICES[preflight.device]
    return TrainingSetup(
        shape=shape,
        parameters=parameters,
        training=describe_training(stage, trainer.precision, parameters),
        micro_batch=micro_batch,
        world_size=world_size,
        devices_per_node=get_devices_per_node(trainer, world_size),
        device=device,
        utilisation=preflight.utilisation,
        fabric=Fabric.from_gigabits(preflight.network),
        shard_size=trainer.shard_size,
        num_micro_batches=num_micro_batches,
        allowed_levels=CHECKPOINTING_LEVELS if stage.activation_checkpointing is Level.auto else (),
    )


def get_devices_per_node(trainer: TrainerConfig, world_size: int) -> int:
    """Return the devices of a node: those of the run, or `DEVICES_PER_NODE` if the run has one device and plans for more."""
    alone = trainer.devices * trainer.num_nodes == 1
    return min(world_size, DEVICES_PER_NODE if alone else trainer.devices)


def describe_training(stage: StageConfig, precision: str, parameters: ParameterCounts) -> TrainingOptions:
    """Describe the training for the cost model. `auto` counts as no activation checkpointing: the setup lists the levels to choose from."""
    level = stage.activation_checkpointing
    return TrainingOptions(
        Precision.from_name(precision),
        trains_language_model=ModelPart.language_model in stage.trainable,
        trains_tower=ModelPart.vision_tower in stage.trainable,
        checkpointing=Level.none if level is Level.auto else level,
        reference_parameters=parameters.reference,
        reference_matrices=parameters.reference_matrices,
    )


def _scale_micro_batch(setup: TrainingSetup, share: float) -> TrainingSetup:
    load = MicroBatchSize(
        round(setup.micro_batch.tokens * share),
        round(setup.micro_batch.tiles * share),
        round(setup.micro_batch.supervised * share),
    )
    return replace(setup, micro_batch=load)


def _iter_choices(setup: TrainingSetup) -> Iterator[StrategyChoice | None]:
    if setup.world_size == 1:
        yield _choose_if_fits(setup, StrategyName.single, "one device holds the model and its optimizer")
    else:
        yield _choose_if_fits(setup, StrategyName.ddp, _describe_ddp(setup))
        yield _choose_within_node(setup) if setup.num_nodes == 1 else _choose_across_nodes(setup)
    devices = find_min_devices(setup)
    reason = (
        f"the states do not fit on {format_count(setup.world_size, 'device')}, so the host's memory holds them, slowly"
    )
    alternative = f"; {devices} devices would do without" if devices else ""
    offloaded = _choose_if_fits(setup, StrategyName.deepspeed_zero3_offload, f"{reason}{alternative}")
    yield replace(offloaded, min_devices=devices) if offloaded else None


def _choose_if_fits(setup: TrainingSetup, strategy: StrategyName, reason: str) -> StrategyChoice | None:
    return StrategyChoice(strategy, reason) if setup.can_fit(strategy) else None


def _describe_ddp(setup: TrainingSetup) -> str:
    sent = format_bytes(setup.bytes_per_value.gradient * setup.parameters.trainable)
    if setup.parameters.trainable < MOSTLY_FROZEN_SHARE * setup.parameters.total:
        return f"frozen weights are copied to each device and not sent; a step sums {sent} of gradients"
    return f"the model and its optimizer fit on each device; a step sums {sent} of gradients and sends nothing else"


def _choose_within_node(setup: TrainingSetup) -> StrategyChoice | None:
    return _choose_if_fits(
        setup, StrategyName.fsdp2, f"{_describe_copy_size(setup)}, so the devices of the node share one"
    )


def _choose_across_nodes(setup: TrainingSetup) -> StrategyChoice | None:
    """Choose between HSDP, with one copy in each node, and ZeRO-3 over all devices.

    HSDP is preferred if a copy fits in a node. ZeRO-3 wins if the all-reduce of HSDP's gradients, at the end of a step,
    waits longer for the network than the weight gathers of ZeRO-3, which are spread over the step.
    """
    size = _describe_copy_size(setup)
    within_node, across_nodes = (
        _choose_if_fits(setup, StrategyName.hsdp, f"{size}, so the devices of each node share one; only gradients cross the network"),
        _choose_if_fits(setup, StrategyName.deepspeed_zero3, f"{size}, so all {setup.world_size} devices share one"),
    )  # fmt: skip
    if within_node is None and across_nodes is not None:
        node_needs = format_bytes(setup.estimate_memory(StrategyName.hsdp).total)
        return replace(across_nodes, reason=f"{across_nodes.reason}, for within a node each would need {node_needs}")
    if within_node is None or across_nodes is None:
        return within_node
    efficiencies = [
        timing.efficiency
        for strategy in (StrategyName.hsdp, StrategyName.deepspeed_zero3)
        if (timing := setup.simulate_step(strategy))
    ]
    if not efficiencies:
        return within_node
    threshold = f"ZeRO-3 hides its own from {estimate_break_even(setup):,.0f} tokens per micro-batch on, here {setup.micro_batch.tokens:,}"
    comparison = f"at {setup.fabric.name} HSDP keeps {efficiencies[0]:.0%} of the devices' speed and ZeRO-3 {efficiencies[1]:.0%}; {threshold}"
    best = (
        across_nodes
        if efficiencies[1] > efficiencies[0] + MIN_SPEED_GAIN
        or (not setup.can_fit(StrategyName.hsdp, COMFORTABLE_SHARE) and efficiencies[1] > efficiencies[0])
        else within_node
    )
    return replace(best, reason=f"{best.reason} ({comparison})")


def estimate_break_even(setup: TrainingSetup) -> float | None:
    """Estimate the tokens of a micro-batch above which computing hides ZeRO-3's traffic; None if no device speed is known."""
    timing = setup.simulate_step(StrategyName.deepspeed_zero3)
    return None if timing is None else compute_break_even_tokens(timing, setup.micro_batch.tokens)


def _describe_copy_size(setup: TrainingSetup) -> str:
    return f"a whole copy needs {format_bytes(setup.estimate_memory(StrategyName.ddp).total)} on a device"


def find_min_devices(setup: TrainingSetup) -> int | None:
    """Find the smallest number of devices, in full nodes, on which ZeRO-3 fits; None if a micro-batch alone is too large."""
    for num_devices in range(setup.devices_per_node, MAX_DEVICES + 1, setup.devices_per_node):
        if setup.can_fit(StrategyName.deepspeed_zero3, world_size=num_devices):
            return num_devices
    return None
