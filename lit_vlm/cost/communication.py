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

HIDES = 0.9  # share of the computing time that can overlap with communication, assumed in `compute_break_even_tokens`
PREFETCH = 2  # layers that are gathered ahead of the current one


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
    outside: float
    inside: float = 370e9
    latency: float = 4e-6

    @classmethod
    def of_node(cls, gigabits: float) -> Fabric:
        """Make a fabric from the network bandwidth of a node, in Gb/s."""
        return cls(f"{gigabits:g} Gb/s per node", gigabits * 1e9 / 8)


FABRICS = (
    Fabric("400 Gb/s per GPU", 8 * 400e9 / 8),
    Fabric("100 Gb/s per GPU", 8 * 100e9 / 8),
    Fabric("400 Gb/s per node", 400e9 / 8),
    Fabric("48 Gb/s Ethernet", 48e9 / 8),
)


class Scheme(StrEnum):
    """Communication pattern of a strategy."""

    ddp = "DDP"
    zero2 = "ZeRO-2"
    zero3 = "ZeRO-3"  # FSDP2 over all devices sends the same
    hsdp = "HSDP"
    hpz = "ZeRO++ hpZ"  # each node has the weights for the backward pass
    zeropp = "ZeRO++"  # the same, with weights sent as int8 and gradients as int4


class Scope(StrEnum):
    """Group of devices that takes part in a collective."""

    all = "all"  # all devices
    node = "node"  # devices of one node
    between = "between"  # devices with the same local rank, one in each node


class Phase(StrEnum):
    """Time of a collective within an optimizer step."""

    forward = "forward"  # before the layer's forward pass, in every micro-batch
    backward = "backward"  # before its backward pass, in every micro-batch
    gradients = "gradients"  # after its backward pass, in every micro-batch
    last = "last"  # after its backward pass in the last micro-batch
    update = "update"  # after the optimizer's update


@dataclass(frozen=True, slots=True)
class Operation:
    """Collective operation on one layer.

    Attributes:
        bytes_per_parameter: bytes that are sent for each parameter.
        trainable_only: True if it sends the trainable parameters only.
        num_passes: 1 for an all-gather or a reduce-scatter, 2 for an all-reduce.
    """

    phase: Phase
    scope: Scope
    size: float
    trained: bool = False
    passes: int = 1


@dataclass(frozen=True, slots=True)
class Cluster:
    """Number of devices, and the links between them."""

    devices: int
    fabric: Fabric
    per_node: int = 8

    @property
    def local(self) -> int:
        """Number of devices of one node."""
        return min(self.devices, self.per_node)

    @property
    def nodes(self) -> int:
        """Number of full nodes, at least 1."""
        return max(1, self.devices // self.per_node)


@dataclass(frozen=True, slots=True)
class Layer:
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
    forward: float
    backward: float

    @property
    def crossed(self) -> bool:
        """True if gradients pass through the layer."""
        return self.backward > 0 or self.trainable > 0


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes that are sent in an optimizer step."""

    inside: float  # into a device from its own node
    outside: float  # into a node from others

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.inside + other.inside, self.outside + other.outside)


@dataclass(frozen=True, slots=True)
class Timing:
    """Timing of an optimizer step, in seconds.

    Attributes:
        compute_seconds: time of computing alone.
        communication_seconds: time that the busier of the two links is in use.
        total_seconds: time of the step. The difference to `compute_seconds` is communication that computing does not hide.
        traffic: bytes that are sent.
    """

    compute: float
    communication: float
    total: float
    traffic: Traffic

    @property
    def exposed(self) -> float:
        """Seconds of communication that computing does not hide."""
        return self.total - self.compute

    @property
    def share(self) -> float:
        """Speed as a share of the speed without any communication, 0 to 1."""
        return self.compute / self.total if self.total else 1.0


@dataclass(frozen=True, slots=True)
class Widths:
    """Bytes of one value when it is sent."""

    weight: float = 2.0
    gradient: float = 4.0  # summed in float32, as `bf16-mixed` does here; 2 in bfloat16


def operations(scheme: Scheme, widths: Widths = Widths()) -> tuple[Operation, ...]:
    """Get the collectives that a scheme runs on each layer."""
    weight_bytes, gradient_bytes = widths.weight, widths.gradient
    gather = Operation(Phase.forward, Scope.all, weight_bytes)
    gather_again = Operation(Phase.backward, Scope.all, weight_bytes)
    scatter = Operation(Phase.gradients, Scope.all, gradient_bytes, trained=True)
    match scheme:
        case Scheme.ddp:
            return (Operation(Phase.last, Scope.all, gradient_bytes, trained=True, passes=2),)
        case Scheme.zero2:  # DeepSpeed reduces full buckets and keeps a part: an all-reduce
            all_reduce = Operation(Phase.gradients, Scope.all, gradient_bytes, trained=True, passes=2)
            return (all_reduce, Operation(Phase.update, Scope.all, weight_bytes, trained=True))
        case Scheme.zero3:
            return (gather, gather_again, scatter)
        case Scheme.hsdp:
            return (
                Operation(Phase.forward, Scope.node, weight_bytes),
                Operation(Phase.backward, Scope.node, weight_bytes),
                Operation(Phase.gradients, Scope.node, gradient_bytes, trained=True),
                Operation(Phase.last, Scope.between, gradient_bytes, trained=True, passes=2),
            )
        case Scheme.hpz:
            return (gather, Operation(Phase.backward, Scope.node, weight_bytes), scatter)
        case Scheme.zeropp:  # gradients are exchanged inside the node first, then between nodes, 4 bits each time
            return (
                Operation(Phase.forward, Scope.all, 1.0),
                Operation(Phase.backward, Scope.node, weight_bytes),
                Operation(Phase.gradients, Scope.node, 0.5, trained=True),
                Operation(Phase.gradients, Scope.all, 0.5, trained=True),
            )


def traffic_of(operation: Operation, layer: Layer, cluster: Cluster) -> Traffic:
    """Compute the bytes that one collective sends for one layer."""
    if operation.phase is Phase.backward and not layer.crossed:
        return Traffic(0.0, 0.0)
    size = operation.size * operation.passes * (layer.trainable if operation.trained else layer.parameters)
    inside = (cluster.local - 1) / cluster.local * size
    outside = (cluster.nodes - 1) / cluster.nodes * size
    if operation.scope is Scope.node:
        return Traffic(inside, 0.0)
    if operation.scope is Scope.between:  # each device sends its own part, so the node sends the full layer
        return Traffic(0.0, outside)
    return Traffic(inside, outside)


def seconds_of(operation: Operation, layer: Layer, cluster: Cluster) -> float:
    """Estimate the seconds of one collective on idle links: the slower link, plus the latency of all hops."""
    traffic = traffic_of(operation, layer, cluster)
    if not (traffic.inside or traffic.outside):
        return 0.0
    fabric = cluster.fabric
    seconds = max(traffic.inside / fabric.inside, traffic.outside / fabric.outside)
    return seconds + fabric.latency * hops_of(operation, cluster)


def hops_of(operation: Operation, cluster: Cluster) -> int:
    """Count the sequential hops of a collective.

    An all-gather or reduce-scatter goes around a ring of all devices. An all-reduce goes through a node and then up and
    down a tree of nodes, if that is shorter
    (NCCL since 2.4, developer.nvidia.com/blog/massively-scale-deep-learning-training-nccl-2-4).
    """
    inside = cluster.local - 1 if operation.scope is not Scope.between else 0
    ring = {Scope.all: cluster.devices, Scope.node: cluster.local, Scope.between: cluster.nodes}[operation.scope] - 1
    if operation.passes == 1 or operation.scope is Scope.node:
        return operation.passes * ring
    return operation.passes * min(ring, inside + math.ceil(math.log2(cluster.nodes)))


def traffic(
    scheme: Scheme, layers: Sequence[Layer], cluster: Cluster, *, k: int = 1, widths: Widths = Widths()
) -> Traffic:
    """Compute the bytes that an optimizer step of `num_micro_batches` micro-batches sends."""
    total = Traffic(0.0, 0.0)
    for collective in operations(scheme, widths):
        repeats = k if collective.phase in (Phase.forward, Phase.backward, Phase.gradients) else 1
        for layer in layers:
            layer_traffic = traffic_of(collective, layer, cluster)
            total += Traffic(repeats * layer_traffic.inside, repeats * layer_traffic.outside)
    return total


def simulate(
    scheme: Scheme,
    layers: Sequence[Layer],
    cluster: Cluster,
    *,
    k: int = 1,
    widths: Widths = Widths(),
    prefetch: int = PREFETCH,
) -> Timing:
    """Simulate an optimizer step of `num_micro_batches` micro-batches, event by event.

    A collective waits for its data and for its links, which serve requests in order. A layer waits for its weights. At
    most `prefetch` layers are gathered ahead. The time of the optimizer itself is not included.
    """
    step = _Step(scheme, cluster, widths, prefetch)
    for micro in range(k):
        step.forward(layers)
        step.backward(layers, last=micro == k - 1)
    step.update(layers)
    moved = traffic(scheme, layers, cluster, k=k, widths=widths)
    compute = k * sum(layer.forward + layer.backward for layer in layers)
    return Timing(compute, max(step.busy.values()), step.end, moved)


def break_even(timing: Timing, tokens: float) -> float:
    """Compute the tokens per device and micro-batch above which computing hides the communication.

    Args:
        timing: timing with micro-batches of `tokens` tokens each. Computing grows with the tokens, communication does not.
    """
    return tokens * timing.communication / (HIDES * timing.compute)


class _Step:
    """Simulated clocks of one device: its compute stream and its two links."""

    def __init__(self, scheme: Scheme, cluster: Cluster, widths: Widths, prefetch: int) -> None:
        self.operations = operations(scheme, widths)
        self.cluster, self.prefetch = cluster, prefetch
        self.computed = 0.0  # time at which the compute stream is free
        self.free = {"inside": 0.0, "outside": 0.0}  # time at which each link is free
        self.busy = {"inside": 0.0, "outside": 0.0}  # seconds that each link was in use
        self.arrived = 0.0  # time at which the last collective is done

    @property
    def end(self) -> float:
        """Time at which all computing and all collectives are done."""
        return max(self.computed, self.arrived)

    def forward(self, layers: Sequence[Layer]) -> None:
        self._compute(layers, Phase.forward, [layer.forward for layer in layers], [])

    def backward(self, layers: Sequence[Layer], *, last: bool) -> None:
        reversed_layers = list(reversed(layers))
        after = [Phase.gradients, Phase.last] if last else [Phase.gradients]
        self._compute(reversed_layers, Phase.backward, [layer.backward for layer in reversed_layers], after)

    def update(self, layers: Sequence[Layer]) -> None:
        begin = self.end
        for layer in layers:
            self._send(Phase.update, layer, begin)

    def _compute(self, layers: Sequence[Layer], before: Phase, seconds: Sequence[float], after: list[Phase]) -> None:
        """Run the layers in order: gather ahead, compute, then run the collectives that follow each layer."""
        start_times = [self.computed]  # start times of the earlier layers
        ready: list[float] = []
        for number, layer in enumerate(layers):
            for ahead in range(len(ready), min(number + self.prefetch + 1, len(layers))):
                ready.append(self._send(before, layers[ahead], start_times[max(0, ahead - self.prefetch)]))
            start = max(self.computed, ready[number])
            start_times.append(start)
            self.computed = start + seconds[number]
            done = self.computed
            for phase in after:
                done = self._send(phase, layer, done)

    def _send(self, phase: Phase, layer: Layer, ready: float) -> float:
        """Run the layer's collectives of this phase in sequence. Returns the time at which the last one is done."""
        for collective in self._of(phase):
            seconds = seconds_of(collective, layer, self.cluster)
            if not seconds:
                continue
            links = self._links(collective.scope)
            start = max(ready, *(self.free[link] for link in links))
            ready = start + seconds
            for link in links:
                self.free[link] = ready
                self.busy[link] += seconds
            self.arrived = max(self.arrived, ready)
        return ready

    def _of(self, phase: Phase) -> Iterator[Operation]:
        return (collective for collective in self.operations if collective.phase is phase)

    def _links(self, scope: Scope) -> tuple[str, ...]:
        if scope is Scope.node or self.cluster.nodes == 1:
            return ("inside",)
        return ("outside",) if scope is Scope.between else ("inside", "outside")
