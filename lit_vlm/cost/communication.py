"""What a training step sends between devices, and how much of it computing hides: an event simulation on paper.

M is the model in bfloat16, g the devices of a node, n all devices. An all-gather or reduce-scatter of S bytes over n
devices brings (n-1)/n * S to each of them: (g-1)/g * S from its own node, and into each of the n/g nodes, from outside
and over all its ports, (1 - g/n) * S. An all-reduce is both, one after the other. Per micro-step ZeRO-3 gathers the
weights twice and scatters the gradients once: 3M, or 4M where gradients are summed in float32, whatever n is ("ZeRO",
arXiv 1910.02054, section 7); HSDP does so inside a node and sums between the nodes once per optimizer step; ZeRO++
quantises and keeps a copy of the weights in each node (arXiv 2306.10209, lossy, for comparison only).

Each strategy is a list of `Operation`s on a layer. The simulation runs them on two links, that inside the node and that
out of it, against the layers' computing. Nothing here was measured on a network; `benchmarks/scaling.py` compares it with
published rows and counts the bytes of real processes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

HIDES = 0.9  # share of its computing that a step is taken to hide communication behind, in `break_even`
PREFETCH = 2  # layers that are gathered ahead of the one that computes


@dataclass(frozen=True, slots=True)
class Fabric:
    """The links of a cluster.

    Attributes:
        outside: bytes/s into a node from others, all its ports together.
        inside: bytes/s into a device from its own node. 370 GB/s: what NCCL reaches of NVLink 4's 450 GB/s, assumed.
        latency: seconds of one hop of a ring, assumed.
    """

    name: str
    outside: float
    inside: float = 370e9
    latency: float = 4e-6

    @classmethod
    def of_node(cls, gigabits: float) -> Fabric:
        """So many Gb/s into a node."""
        return cls(f"{gigabits:g} Gb/s per node", gigabits * 1e9 / 8)


FABRICS = (
    Fabric("400 Gb/s per GPU", 8 * 400e9 / 8),
    Fabric("100 Gb/s per GPU", 8 * 100e9 / 8),
    Fabric("400 Gb/s per node", 400e9 / 8),
    Fabric("48 Gb/s Ethernet", 48e9 / 8),
)


class Scheme(StrEnum):
    """How the devices share the work, as far as the links see it."""

    ddp = "DDP"
    zero2 = "ZeRO-2"
    zero3 = "ZeRO-3"  # FSDP2 over all devices moves the same
    hsdp = "HSDP"
    hpz = "ZeRO++ hpZ"  # weights for the backward pass lie in each node
    zeropp = "ZeRO++"  # and weights travel as int8, gradients as int4


class Scope(StrEnum):
    """Between which devices."""

    all = "all"  # every device
    node = "node"  # those of a node
    between = "between"  # those of the same place in each node


class Phase(StrEnum):
    forward = "forward"  # before the layer's forward pass, in every micro-step
    backward = "backward"  # before its backward pass, in every micro-step
    gradients = "gradients"  # after its backward pass, in every micro-step
    last = "last"  # after its backward pass in the last micro-step
    update = "update"  # after the optimizer's update


@dataclass(frozen=True, slots=True)
class Operation:
    """A collective on one layer.

    Attributes:
        size: bytes for each parameter that it is about.
        trained: about the parameters that train only.
        passes: 1 for an all-gather or a reduce-scatter, 2 for an all-reduce.
    """

    phase: Phase
    scope: Scope
    size: float
    trained: bool = False
    passes: int = 1


@dataclass(frozen=True, slots=True)
class Cluster:
    """How many devices, and what joins them."""

    devices: int
    fabric: Fabric
    per_node: int = 8

    @property
    def local(self) -> int:
        return min(self.devices, self.per_node)

    @property
    def nodes(self) -> int:
        return max(1, self.devices // self.per_node)


@dataclass(frozen=True, slots=True)
class Layer:
    """What is gathered at once.

    Attributes:
        parameters: number; `trainable` of them train.
        forward, backward: seconds of computing in one micro-step, recomputing included. No backward and nothing that
            trains: no gradient crosses it, and its weights are not gathered a second time.
    """

    parameters: float
    trainable: float
    forward: float
    backward: float

    @property
    def crossed(self) -> bool:
        return self.backward > 0 or self.trainable > 0


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes of an optimizer step."""

    inside: float  # into a device from its own node
    outside: float  # into a node from others

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.inside + other.inside, self.outside + other.outside)


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of an optimizer step.

    Attributes:
        compute: of computing alone.
        communication: that the busier of the two links is in use.
        total: of the step; what it has more than `compute` is communication that nothing hides.
    """

    compute: float
    communication: float
    total: float
    traffic: Traffic

    @property
    def exposed(self) -> float:
        return self.total - self.compute

    @property
    def share(self) -> float:
        """Of the speed that the devices would have if nothing had to be sent."""
        return self.compute / self.total if self.total else 1.0


@dataclass(frozen=True, slots=True)
class Widths:
    """Bytes per value as it is sent."""

    weight: float = 2.0
    gradient: float = 4.0  # summed in float32, as this project's `bf16-mixed` does; 2 where in bfloat16


def operations(scheme: Scheme, widths: Widths = Widths()) -> tuple[Operation, ...]:
    """What happens to a layer."""
    weight, full = widths.weight, widths.gradient
    gather = Operation(Phase.forward, Scope.all, weight)
    again = Operation(Phase.backward, Scope.all, weight)
    scatter = Operation(Phase.gradients, Scope.all, full, trained=True)
    match scheme:
        case Scheme.ddp:
            return (Operation(Phase.last, Scope.all, full, trained=True, passes=2),)
        case Scheme.zero2:  # DeepSpeed sums whole buckets and keeps a part of them: an all-reduce
            summed = Operation(Phase.gradients, Scope.all, full, trained=True, passes=2)
            return (summed, Operation(Phase.update, Scope.all, weight, trained=True))
        case Scheme.zero3:
            return (gather, again, scatter)
        case Scheme.hsdp:
            return (
                Operation(Phase.forward, Scope.node, weight),
                Operation(Phase.backward, Scope.node, weight),
                Operation(Phase.gradients, Scope.node, full, trained=True),
                Operation(Phase.last, Scope.between, full, trained=True, passes=2),
            )
        case Scheme.hpz:
            return (gather, Operation(Phase.backward, Scope.node, weight), scatter)
        case Scheme.zeropp:  # gradients are exchanged inside the node first, then between nodes, 4 bits each time
            return (
                Operation(Phase.forward, Scope.all, 1.0),
                Operation(Phase.backward, Scope.node, weight),
                Operation(Phase.gradients, Scope.node, 0.5, trained=True),
                Operation(Phase.gradients, Scope.all, 0.5, trained=True),
            )


def traffic_of(operation: Operation, layer: Layer, cluster: Cluster) -> Traffic:
    """Bytes of one operation on one layer."""
    if operation.phase is Phase.backward and not layer.crossed:
        return Traffic(0.0, 0.0)
    size = operation.size * operation.passes * (layer.trainable if operation.trained else layer.parameters)
    inside = (cluster.local - 1) / cluster.local * size
    outside = (cluster.nodes - 1) / cluster.nodes * size
    if operation.scope is Scope.node:
        return Traffic(inside, 0.0)
    if operation.scope is Scope.between:  # each device its own part of the layer: the node all of it
        return Traffic(0.0, outside)
    return Traffic(inside, outside)


def seconds_of(operation: Operation, layer: Layer, cluster: Cluster) -> float:
    """How long it takes on free links: the slower of the two, and the hops."""
    traffic = traffic_of(operation, layer, cluster)
    if not (traffic.inside or traffic.outside):
        return 0.0
    fabric = cluster.fabric
    seconds = max(traffic.inside / fabric.inside, traffic.outside / fabric.outside)
    return seconds + fabric.latency * hops_of(operation, cluster)


def hops_of(operation: Operation, cluster: Cluster) -> int:
    """One after the other: around a ring of all devices for a gather or a scatter; for a sum along a node and up and down
    a tree of nodes, where that is shorter (NCCL since 2.4, developer.nvidia.com/blog/massively-scale-deep-learning-training-nccl-2-4).
    """
    inside = cluster.local - 1 if operation.scope is not Scope.between else 0
    ring = {Scope.all: cluster.devices, Scope.node: cluster.local, Scope.between: cluster.nodes}[operation.scope] - 1
    if operation.passes == 1 or operation.scope is Scope.node:
        return operation.passes * ring
    return operation.passes * min(ring, inside + math.ceil(math.log2(cluster.nodes)))


def traffic(
    scheme: Scheme, layers: Sequence[Layer], cluster: Cluster, *, k: int = 1, widths: Widths = Widths()
) -> Traffic:
    """Bytes of an optimizer step of k micro-steps."""
    total = Traffic(0.0, 0.0)
    for operation in operations(scheme, widths):
        times = k if operation.phase in (Phase.forward, Phase.backward, Phase.gradients) else 1
        for layer in layers:
            one = traffic_of(operation, layer, cluster)
            total += Traffic(times * one.inside, times * one.outside)
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
    """An optimizer step of k micro-steps, event by event.

    An operation waits for what it is about and for its links, in the order in which they are asked for; a layer waits for
    its weights; at most `prefetch` layers are gathered ahead. The optimizer's own time is left out.
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
    """Tokens per device and micro-step from which on computing hides the communication.

    Args:
        timing: of micro-steps of `tokens` tokens each; computing grows with them, communication does not.
    """
    return tokens * timing.communication / (HIDES * timing.compute)


class _Step:
    """The clock of one device's stream of computing and of its two links."""

    def __init__(self, scheme: Scheme, cluster: Cluster, widths: Widths, prefetch: int) -> None:
        self.operations = operations(scheme, widths)
        self.cluster, self.prefetch = cluster, prefetch
        self.computed = 0.0  # when the stream of computing is free
        self.free = {"inside": 0.0, "outside": 0.0}  # when a link is
        self.busy = {"inside": 0.0, "outside": 0.0}  # seconds that it was
        self.arrived = 0.0  # when the last of them is done

    @property
    def end(self) -> float:
        return max(self.computed, self.arrived)

    def forward(self, layers: Sequence[Layer]) -> None:
        self._compute(layers, Phase.forward, [layer.forward for layer in layers], [])

    def backward(self, layers: Sequence[Layer], *, last: bool) -> None:
        back = list(reversed(layers))
        after = [Phase.gradients, Phase.last] if last else [Phase.gradients]
        self._compute(back, Phase.backward, [layer.backward for layer in back], after)

    def update(self, layers: Sequence[Layer]) -> None:
        begin = self.end
        for layer in layers:
            self._send(Phase.update, layer, begin)

    def _compute(self, layers: Sequence[Layer], before: Phase, seconds: Sequence[float], after: list[Phase]) -> None:
        """Layers in order: gathered ahead, computed, and what follows of each sent on."""
        begun = [self.computed]  # when the layers before were begun
        ready: list[float] = []
        for number, layer in enumerate(layers):
            for ahead in range(len(ready), min(number + self.prefetch + 1, len(layers))):
                ready.append(self._send(before, layers[ahead], begun[max(0, ahead - self.prefetch)]))
            start = max(self.computed, ready[number])
            begun.append(start)
            self.computed = start + seconds[number]
            done = self.computed
            for phase in after:
                done = self._send(phase, layer, done)

    def _send(self, phase: Phase, layer: Layer, ready: float) -> float:
        """Runs the layer's operations of this phase one after the other; when the last is done."""
        for operation in self._of(phase):
            seconds = seconds_of(operation, layer, self.cluster)
            if not seconds:
                continue
            links = self._links(operation.scope)
            start = max(ready, *(self.free[link] for link in links))
            ready = start + seconds
            for link in links:
                self.free[link] = ready
                self.busy[link] += seconds
            self.arrived = max(self.arrived, ready)
        return ready

    def _of(self, phase: Phase) -> Iterator[Operation]:
        return (operation for operation in self.operations if operation.phase is phase)

    def _links(self, scope: Scope) -> tuple[str, ...]:
        if scope is Scope.node or self.cluster.nodes == 1:
            return ("inside",)
        return ("outside",) if scope is Scope.between else ("inside", "outside")
