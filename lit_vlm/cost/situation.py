"""Training setup from which the strategy and the level of activation checkpointing are chosen."""

from __future__ import annotations

from dataclasses import dataclass, replace

from lit_vlm.config.schema import ActivationCheckpointing as Level
from lit_vlm.config.schema import Strategy
from lit_vlm.cost.communication import Cluster, Fabric, Layer, Scheme, Timing, Widths, simulate
from lit_vlm.cost.devices import Device
from lit_vlm.cost.layers import layers_of
from lit_vlm.cost.memory import Load, Memory, Parameters, Sharding, Training, memory_of
from lit_vlm.cost.shape import Shape

SHARDINGS = {
    Strategy.single: Sharding.single,
    Strategy.ddp: Sharding.ddp,
    Strategy.deepspeed_zero2: Sharding.zero2,
    Strategy.deepspeed_zero3: Sharding.zero3,
    Strategy.deepspeed_zero3_offload: Sharding.offload,
    Strategy.fsdp2: Sharding.fsdp2,
    Strategy.hsdp: Sharding.hsdp,
}
SCHEMES = {
    Strategy.ddp: Scheme.ddp,
    Strategy.deepspeed_zero2: Scheme.zero2,
    Strategy.deepspeed_zero3: Scheme.zero3,
    Strategy.deepspeed_zero3_offload: Scheme.zero3,
    Strategy.fsdp2: Scheme.zero3,
    Strategy.hsdp: Scheme.hsdp,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
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

    shape: Shape
    parameters: Parameters
    training: Training
    load: Load
    world_size: int
    devices_per_node: int
    device: Device | None
    fabric: Fabric
    utilisation: float = 0.4
    shard_size: int | None = None
    k: int = 1
    levels: tuple[Level, ...] = ()

    @property
    def allowed(self) -> tuple[Level, ...]:
        """Levels of activation checkpointing to choose from."""
        return self.levels or (self.training.checkpointing,)

    def at(self, level: Level) -> Situation:
        """Return the setup with one level of activation checkpointing and no choice of others."""
        return replace(self, training=replace(self.training, checkpointing=level), levels=())

    @property
    def nodes(self) -> int:
        """Number of full nodes, at least 1."""
        return max(1, self.world_size // self.devices_per_node)

    def memory(self, strategy: Strategy, world_size: int | None = None) -> Memory:
        """Estimate the memory of one device."""
        num_devices = world_size or self.world_size
        sharding_devices = (
            min(self.shard_size or self.devices_per_node, num_devices) if strategy is Strategy.hsdp else num_devices
        )
        return memory_of(self.shape, self.parameters, self.training, self.load, SHARDINGS[strategy], sharding_devices)

    def fits(self, strategy: Strategy, room: float = 1.0, world_size: int | None = None) -> bool:
        """Return True if the estimate is at most the share `max_share` of the device's memory."""
        return self.device is None or self.memory(strategy, world_size).total <= room * self.device.memory

    def timing(self, strategy: Strategy) -> Timing | None:
        """Simulate an optimizer step; None if nothing is sent or if no device speed is known."""
        if strategy not in SCHEMES or self.device is None or self.world_size == 1:
            return None
        layers = self._layers(self.device)
        per_node = self.shard_size if strategy is Strategy.hsdp and self.shard_size else self.devices_per_node
        cluster = Cluster(self.world_size, self.fabric, min(per_node, self.world_size))
        return simulate(SCHEMES[strategy], layers, cluster, k=self.k, widths=self.widths)

    def seconds(self, strategy: Strategy) -> float:
        """Estimate the seconds of an optimizer step, without the transfers of offload."""
        if self.device is None:
            return 0.0
        timing = self.timing(strategy)
        return (
            timing.total
            if timing
            else self.k * sum(layer.forward + layer.backward for layer in self._layers(self.device))
        )

    def _layers(self, device: Device) -> list[Layer]:
        flops_per_second = device.peak * self.utilisation
        return layers_of(self.shape, self.parameters, self.training, self.load, flops_per_second)

    @property
    def widths(self) -> Widths:
        """Bytes of a weight and of a gradient when they are sent, from the precision."""
        precision = self.training.precision
        return Widths(weight=precision.compute, gradient=precision.weight)
