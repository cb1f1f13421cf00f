"""Simulation of the communication of a training step: bytes between devices, and the part that computing hides.

M is the model in bfloat16, g the number of devices of a node, n the number of all devices. An all-gather or
reduce-scatter of S bytes over n devices sends (n-1)/n * S to each device: (g-1)/g * S from its own node, and
(1 - g/n) * S into each of the n/g nodes, over all its ports. An all-reduce is both, one after the other. Per micro-batch
ZeRO-3 gathers the weights twice and scatters the gradients once: 3M, or 4M if gradients are summed in float32. This does
not depend on n ("ZeRO", arXiv 1910.02054, section 7). HSDP does the same inside a node and sums gradients between the
nodes once per optimizer step. ZeRO++ quantises, and keeps a copy of the weights in each node (arXiv 2306.10209; lossy,
for comparison only).

Each strategy is a list of `Collective` operations on a layer. The simulation runs them on two links, inside the node and
between nodes, in parallel to the computing of the layers. Nothing here was measured on a network.
`benchmarks/scaling.py` compares it with published results and counts the bytes of real processes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

OVERLAP_SHARE = (
    0.9  # share of the computing time that can overlap with communication, assumed in `compute_break_even_tokens`
)
NUM_PREFETCHED_LAYERS = 2  # layers that are gathered ahead of the current one


@dataclass(frozen=True, slots=True)
class Fabric:
    """Links of a cluster.

    Attributes:
        inter_node_bandwidth: bytes/s into a node from other nodes, all its ports together.
        intra_node_bandwidth: bytes/s into a device from its own node. 370 GB/s is assumed: what NCCL reaches
            of the 450 GB/s of NVLink 4.
        latency: seconds of one hop of a ring, assumed.
    """

    name: str
    inter_node_bandwidth: float
    intra_node_bandwidth: float = 370e9
    latency: float = 4e-6

    @classmethod
    def from_gigabits(cls, gigabits: float) -> Fabric:
        """Make a fabric from the network bandwidth of a node, in Gb/s."""
        return cls(f"{gigabits:g} Gb/s per node", gigabits * 1e9 / 8)


FABRICS = (
    Fabric("400 Gb/s per GPU", 8 * 400e9 / 8),
    Fabric("100 Gb/s per GPU", 8 * 100e9 / 8),
    Fabric("400 Gb/s per node", 400e9 / 8),
    Fabric("48 Gb/s Ethernet", 48e9 / 8),
)


class CommunicationScheme(StrEnum):
    """Communication pattern of a strategy."""

    ddp = "DDP"
    zero2 = "ZeRO-2"
    zero3 = "ZeRO-3"  # FSDP2 over all devices sends the same
    hsdp = "HSDP"
    hpz = "ZeRO++ hpZ"  # each node has the weights for the backward pass
    zeropp = "ZeRO++"  # the same, with weights sent as int8 and gradients as int4


class CollectiveScope(StrEnum):
    """Group of devices that takes part in a collective."""

    all_devices = "all"  # all devices
    within_node = "node"  # devices of one node
    across_nodes = "between"  # devices with the same local rank, one in each node


class StepPhase(StrEnum):
    """Time of a collective within an optimizer step."""

    before_forward = "forward"  # before the layer's forward pass, in every micro-batch
    before_backward = "backward"  # before its backward pass, in every micro-batch
    after_backward = "gradients"  # after its backward pass, in every micro-batch
    after_last_backward = "last"  # after its backward pass in the last micro-batch
    after_update = "update"  # after the optimizer's update


@dataclass(frozen=True, slots=True)
class Collective:
    """Collective operation on one layer.

    Attributes:
        bytes_per_parameter: bytes that are sent for each parameter.
        trainable_only: True if it sends the trainable parameters only.
        num_passes: 1 for an all-gather or a reduce-scatter, 2 for an all-reduce.
    """

    phase: StepPhase
    scope: CollectiveScope
    bytes_per_parameter: float
    trainable_only: bool = False
    num_passes: int = 1


@dataclass(frozen=True, slots=True)
class Cluster:
    """Number of devices, and the links between them."""

    num_devices: int
    fabric: Fabric
    devices_per_node: int = 8

    @property
    def num_local_devices(self) -> int:
        """Number of devices of one node."""
        return min(self.num_devices, self.devices_per_node)

    @property
    def num_nodes(self) -> int:
        """Number of full nodes, at least 1."""
        return max(1, self.num_devices // self.devices_per_node)


@dataclass(frozen=True, slots=True)
class LayerCost:
    """Cost of one layer, the unit that is gathered at once.

    Attributes:
        parameters: number of parameters.
        trainable: number of trainable parameters.
        forward_seconds: seconds of the forward pass in one micro-batch.
        backward_seconds: seconds of the backward pass in one micro-batch, with the recomputed forward pass. If it is 0 and
            nothing is trainable, no gradient passes through the layer, and its weights are not gathered a second time.
    """

    parameters: float
    trainable: float
    forward_seconds: float
    backward_seconds: float

    @property
    def has_backward(self) -> bool:
        """True if gradients pass through the layer."""
        return self.backward_seconds > 0 or self.trainable > 0


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes that are sent in an optimizer step."""

    intra_node_bytes: float  # into a device from its own node
    inter_node_bytes: float  # into a node from others

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.intra_node_bytes + other.intra_node_bytes, self.inter_node_bytes + other.inter_node_bytes)


@dataclass(frozen=True, slots=True)
class StepTiming:
    """Timing of an optimizer step, in seconds.

    Attributes:
        compute_seconds: time of computing alone.
        communication_seconds: time that the busier of the two links is in use.
        total_seconds: time of the step. The difference to `compute_seconds` is communication that computing does not hide.
        traffic: bytes that are sent.
    """

    compute_seconds: float
    communication_seconds: float
    total_seconds: float
    traffic: Traffic

    @property
    def exposed_seconds(self) -> float:
        """Seconds of communication that computing does not hide."""
        return self.total_seconds - self.compute_seconds

    @property
    def efficiency(self) -> float:
        """Speed as a share of the speed without any communication, 0 to 1."""
        return self.compute_seconds / self.total_seconds if self.total_seconds else 1.0


@dataclass(frozen=True, slots=True)
class BytesPerValue:
    """Bytes of one value when it is sent."""

    weight: float = 2.0
    gradient: float = 4.0  # summed in float32, as `bf16-mixed` does here; 2 in bfloat16


def get_collectives(
    scheme: CommunicationScheme, bytes_per_value: BytesPerValue = BytesPerValue()
) -> tuple[Collective, ...]:
    """Get the collectives that a scheme runs on each layer."""
    weight_bytes, gradient_bytes = bytes_per_value.weight, bytes_per_value.gradient
    gather = Collective(StepPhase.before_forward, CollectiveScope.all_devices, weight_bytes)
    gather_again = Collective(StepPhase.before_backward, CollectiveScope.all_devices, weight_bytes)
    scatter = Collective(StepPhase.after_backward, CollectiveScope.all_devices, gradient_bytes, trainable_only=True)
    match scheme:
        case CommunicationScheme.ddp:
            return (
                Collective(
                    StepPhase.after_last_backward,
                    CollectiveScope.all_devices,
                    gradient_bytes,
                    trainable_only=True,
                    num_passes=2,
                ),
            )
        case CommunicationScheme.zero2:  # DeepSpeed reduces full buckets and keeps a part: an all-reduce
            all_reduce = Collective(
                StepPhase.after_backward, CollectiveScope.all_devices, gradient_bytes, trainable_only=True, num_passes=2
            )
            return (
                all_reduce,
                Collective(StepPhase.after_update, CollectiveScope.all_devices, weight_bytes, trainable_only=True),
            )
        case CommunicationScheme.zero3:
            return (gather, gather_again, scatter)
        case CommunicationScheme.hsdp:
            return (
                Collective(StepPhase.before_forward, CollectiveScope.within_node, weight_bytes),
                Collective(StepPhase.before_backward, CollectiveScope.within_node, weight_bytes),
                Collective(StepPhase.after_backward, CollectiveScope.within_node, gradient_bytes, trainable_only=True),
                Collective(
                    StepPhase.after_last_backward,
                    CollectiveScope.across_nodes,
                    gradient_bytes,
                    trainable_only=True,
                    num_passes=2,
                ),
            )
        case CommunicationScheme.hpz:
            return (gather, Collective(StepPhase.before_backward, CollectiveScope.within_node, weight_bytes), scatter)
        case (
            CommunicationScheme.zeropp
        ):  # gradients are exchanged inside the node first, then between nodes, 4 bits each time
            return (
                Collective(StepPhase.before_forward, CollectiveScope.all_devices, 1.0),
                Collective(StepPhase.before_backward, CollectiveScope.within_node, weight_bytes),
                Collective(StepPhase.after_backward, CollectiveScope.within_node, 0.5, trainable_only=True),
                Collective(StepPhase.after_backward, CollectiveScope.all_devices, 0.5, trainable_only=True),
            )


def compute_collective_traffic(collective: Collective, layer: LayerCost, cluster: Cluster) -> Traffic:
    """Compute the bytes that one collective sends for one layer."""
    if collective.phase is StepPhase.before_backward and not layer.has_backward:
        return Traffic(0.0, 0.0)
    size = (
        collective.bytes_per_parameter
        * collective.num_passes
        * (layer.trainable if collective.trainable_only else layer.parameters)
    )
    inside = (cluster.num_local_devices - 1) / cluster.num_local_devices * size
    outside = (cluster.num_nodes - 1) / cluster.num_nodes * size
    if collective.scope is CollectiveScope.within_node:
        return Traffic(inside, 0.0)
    if (
        collective.scope is CollectiveScope.across_nodes
    ):  # each device sends its own part, so the node sends the full layer
        return Traffic(0.0, outside)
    return Traffic(inside, outside)


def estimate_collective_seconds(collective: Collective, layer: LayerCost, cluster: Cluster) -> float:
    """Estimate the seconds of one collective on idle links: the slower link, plus the latency of all hops."""
    traffic = compute_collective_traffic(collective, layer, cluster)
    if not (traffic.intra_node_bytes or traffic.inter_node_bytes):
        return 0.0
    fabric = cluster.fabric
    seconds = max(
        traffic.intra_node_bytes / fabric.intra_node_bandwidth, traffic.inter_node_bytes / fabric.inter_node_bandwidth
    )
    return seconds + fabric.latency * count_hops(collective, cluster)


def count_hops(collective: Collective, cluster: Cluster) -> int:
    """Count the sequential hops of a collective.

    An all-gather or reduce-scatter goes around a ring of all devices. An all-reduce goes through a node and then up and
    down a tree of nodes, if that is shorter
    (NCCL since 2.4, developer.nvidia.com/blog/massively-scale-deep-learning-training-nccl-2-4).
    """
    inside = cluster.num_local_devices - 1 if collective.scope is not CollectiveScope.across_nodes else 0
    ring = {
        CollectiveScope.all_devices: cluster.num_devices,
        CollectiveScope.within_node: cluster.num_local_devices,
        CollectiveScope.across_nodes: cluster.num_nodes,
    }[collective.scope] - 1
    if collective.num_passes == 1 or collective.scope is CollectiveScope.within_node:
        return collective.num_passes * ring
    return collective.num_passes * min(ring, inside + math.ceil(math.log2(cluster.num_nodes)))


def compute_step_traffic(
    scheme: CommunicationScheme,
    layers: Sequence[LayerCost],
    cluster: Cluster,
    *,
    num_micro_batches: int = 1,
    bytes_per_value: BytesPerValue = BytesPerValue(),
) -> Traffic:
    """Compute the bytes that an optimizer step of `num_micro_batches` micro-batches sends."""
    total = Traffic(0.0, 0.0)
    for collective in get_collectives(scheme, bytes_per_value):
        repeats = (
            num_micro_batches
            if collective.phase in (StepPhase.before_forward, StepPhase.before_backward, StepPhase.after_backward)
            else 1
        )
        for layer in layers:
            layer_traffic = compute_collective_traffic(collective, layer, cluster)
            total += Traffic(repeats * layer_traffic.intra_node_bytes, repeats * layer_traffic.inter_node_bytes)
    return total


def simulate_step(
    scheme: CommunicationScheme,
    layers: Sequence[LayerCost],
    cluster: Cluster,
    *,
    num_micro_batches: int = 1,
    bytes_per_value: BytesPerValue = BytesPerValue(),
    prefetch: int = NUM_PREFETCHED_LAYERS,
) -> StepTiming:
    """Simulate an optimizer step of `num_micro_batches` micro-batches, event by event.

    A collective waits for its data and for its links, which serve requests in order. A layer waits for its weights. At
    most `prefetch` layers are gathered ahead. The time of the optimizer itself is not included.
    """
    step = _StepSimulation(scheme, cluster, bytes_per_value, prefetch)
    for micro in range(num_micro_batches):
        step.forward(layers)
        step.backward(layers, last=micro == num_micro_batches - 1)
    step.update(layers)
    moved = compute_step_traffic(
        scheme, layers, cluster, num_micro_batches=num_micro_batches, bytes_per_value=bytes_per_value
    )
    compute = num_micro_batches * sum(layer.forward_seconds + layer.backward_seconds for layer in layers)
    return StepTiming(compute, max(step.link_busy_seconds.values()), step.end_time, moved)


def compute_break_even_tokens(timing: StepTiming, tokens: float) -> float:
    """Compute the tokens per device and micro-batch above which computing hides the communication.

    Args:
        timing: timing with micro-batches of `tokens` tokens each. Computing grows with the tokens, communication does not.
    """
    return tokens * timing.communication_seconds / (OVERLAP_SHARE * timing.compute_seconds)


class _StepSimulation:
    """Simulated clocks of one device: its compute stream and its two links."""

    def __init__(
        self, scheme: CommunicationScheme, cluster: Cluster, bytes_per_value: BytesPerValue, prefetch: int
    ) -> None:
        self.collectives = get_collectives(scheme, bytes_per_value)
        self.cluster, self.prefetch = cluster, prefetch
        self.compute_free_at = 0.0  # time at which the compute stream is free
        self.link_free_at = {"inside": 0.0, "outside": 0.0}  # time at which each link is free
        self.link_busy_seconds = {"inside": 0.0, "outside": 0.0}  # seconds that each link was in use
        self.last_arrival = 0.0  # time at which the last collective is done

    @property
    def end_time(self) -> float:
        """Time at which all computing and all collectives are done."""
        return max(self.compute_free_at, self.last_arrival)

    def forward(self, layers: Sequence[LayerCost]) -> None:
        self._run_layers(layers, StepPhase.before_forward, [layer.forward_seconds for layer in layers], [])

    def backward(self, layers: Sequence[LayerCost], *, last: bool) -> None:
        reversed_layers = list(reversed(layers))
        after = [StepPhase.after_backward, StepPhase.after_last_backward] if last else [StepPhase.after_backward]
        self._run_layers(
            reversed_layers, StepPhase.before_backward, [layer.backward_seconds for layer in reversed_layers], after
        )

    def update(self, layers: Sequence[LayerCost]) -> None:
        begin = self.end_time
        for layer in layers:
            self._run_collectives(StepPhase.after_update, layer, begin)

    def _run_layers(
        self, layers: Sequence[LayerCost], before: StepPhase, seconds: Sequence[float], after: list[StepPhase]
    ) -> None:
        """Run the layers in order: gather ahead, compute, then run the collectives that follow each layer."""
        start_times = [self.compute_free_at]  # start times of the earlier layers
        ready: list[float] = []
        for number, layer in enumerate(layers):
            for ahead in range(len(ready), min(number + self.prefetch + 1, len(layers))):
                ready.append(self._run_collectives(before, layers[ahead], start_times[max(0, ahead - self.prefetch)]))
            start = max(self.compute_free_at, ready[number])
            start_times.append(start)
            self.compute_free_at = start + seconds[number]
            done = self.compute_free_at
            for phase in after:
                done = self._run_collectives(phase, layer, done)

    def _run_collectives(self, phase: StepPhase, layer: LayerCost, ready: float) -> float:
        """Run the layer's collectives of this phase in sequence. Returns the time at which the last one is done."""
        for collective in self._select_collectives(phase):
            seconds = estimate_collective_seconds(collective, layer, self.cluster)
            if not seconds:
                continue
            links = self._get_links(collective.scope)
            start = max(ready, *(self.link_free_at[link] for link in links))
            ready = start + seconds
            for link in links:
                self.link_free_at[link] = ready
                self.link_busy_seconds[link] += seconds
            self.last_arrival = max(self.last_arrival, ready)
        return ready

    def _select_collectives(self, phase: StepPhase) -> Iterator[Collective]:
        return (collective for collective in self.collectives if collective.phase is phase)

    def _get_links(self, scope: CollectiveScope) -> tuple[str, ...]:
        if scope is CollectiveScope.within_node or self.cluster.num_nodes == 1:
            return ("inside",)
        return ("outside",) if scope is CollectiveScope.across_nodes else ("inside", "outside")
