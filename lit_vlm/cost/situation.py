"""What a strategy and a level of activation checkpointing are chosen by."""

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
    """What a choice follows from.

    Attributes:
        load: the largest micro-batch of a device.
        device: its memory and peak. None: not compared, as on a CPU; everything counts as fitting.
        utilisation: share of the peak that training is assumed to reach.
        shard_size: of `hsdp`: devices that share one copy of the model; None: those of a node.
        k: micro-batches of a device in an optimizer step.
        levels: of activation checkpointing that may be chosen, the fastest first; none: that of `training`.
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
        return self.levels or (self.training.checkpointing,)

    def at(self, level: Level) -> Situation:
        """With that level and no other."""
        return replace(self, training=replace(self.training, checkpointing=level), levels=())

    @property
    def nodes(self) -> int:
        return max(1, self.world_size // self.devices_per_node)

    def memory(self, strategy: Strategy, world_size: int | None = None) -> Memory:
        """The estimate for one device."""
        world = world_size or self.world_size
        group = min(self.shard_size or self.devices_per_node, world) if strategy is Strategy.hsdp else world
        return memory_of(self.shape, self.parameters, self.training, self.load, SHARDINGS[strategy], group)

    def fits(self, strategy: Strategy, room: float = 1.0, world_size: int | None = None) -> bool:
        return self.device is None or self.memory(strategy, world_size).total <= room * self.device.memory

    def timing(self, strategy: Strategy) -> Timing | None:
        """Of an optimizer step, simulated; None where nothing is sent, or no device's speed is known."""
        if strategy not in SCHEMES or self.device is None or self.world_size == 1:
            return None
        layers = self._layers(self.device)
        per_node = self.shard_size if strategy is Strategy.hsdp and self.shard_size else self.devices_per_node
        cluster = Cluster(self.world_size, self.fabric, min(per_node, self.world_size))
        return simulate(SCHEMES[strategy], layers, cluster, k=self.k, widths=self.widths)

    def seconds(self, strategy: Strategy) -> float:
        """Of an optimizer step; without what offloading moves."""
        if self.device is None:
            return 0.0
        timing = self.timing(strategy)
        return timing.total if timing else self.k * sum(of.forward + of.backward for of in self._layers(self.device))

    def _layers(self, device: Device) -> list[Layer]:
        rate = device.peak * self.utilisation
        return layers_of(self.shape, self.parameters, self.training, self.load, rate)

    @property
    def widths(self) -> Widths:
        precision = self.training.precision
        return Widths(weight=precision.compute, gradient=precision.weight)
