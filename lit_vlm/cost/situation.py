"""Training setup from which the strategy and the level of activation checkpointing are chosen."""

from __future__ import annotations

from dataclasses import dataclass, replace

from lit_vlm.config.schema import ActivationCheckpointing as Level
from lit_vlm.config.schema import StrategyName
from lit_vlm.cost.communication import (
    BytesPerValue,
    Cluster,
    CommunicationScheme,
    Fabric,
    LayerCost,
    StepTiming,
    simulate_step,
)
from lit_vlm.cost.devices import Device
from lit_vlm.cost.layers import build_layer_costs
from lit_vlm.cost.memory import (
    MemoryEstimate,
    MicroBatchSize,
    ParameterCounts,
    Sharding,
    TrainingOptions,
    estimate_memory,
)
from lit_vlm.cost.shape import ModelShape

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
