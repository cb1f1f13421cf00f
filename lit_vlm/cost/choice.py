"""Which strategy a stage should use, and why: what fits on the devices, and of that what waits least for the network."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from lit_vlm.config.schema import Strategy
from lit_vlm.cost.communication import Cluster, Fabric, Scheme, Timing, Widths, break_even, simulate
from lit_vlm.cost.devices import Device
from lit_vlm.cost.layers import layers_of
from lit_vlm.cost.memory import Load, Memory, Parameters, Sharding, Training, memory_of
from lit_vlm.cost.shape import Shape

ROOM = 0.9  # share of a device's memory that an estimate may fill and still count as comfortable
MOSTLY_FROZEN = 0.1  # below this share of trainable weights a stage's frozen ones are what counts
WORTH = 0.02  # of the devices' speed: by less, the strategy that leaves the network alone is the better
HALVINGS = 8  # of a micro-batch that is too large for everything
MOST_DEVICES = 4096  # that are looked through for a number that would do

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
        rate = self.device.peak * self.utilisation
        layers = layers_of(self.shape, self.parameters, self.training, self.load, rate)
        per_node = self.shard_size if strategy is Strategy.hsdp and self.shard_size else self.devices_per_node
        cluster = Cluster(self.world_size, self.fabric, min(per_node, self.world_size))
        return simulate(SCHEMES[strategy], layers, cluster, k=self.k, widths=self.widths)

    @property
    def widths(self) -> Widths:
        precision = self.training.precision
        return Widths(weight=precision.compute, gradient=precision.weight)


@dataclass(frozen=True, slots=True)
class Choice:
    """A strategy and why.

    Attributes:
        fits: on the devices, by the estimate.
        devices: fewest that would do with everything on them, where these do not; None: no number would.
    """

    strategy: Strategy
    reason: str
    fits: bool = True
    devices: int | None = None


def choose(situation: Situation) -> Choice:
    """The strategy for a stage.

    Copies of the whole model are first: they send the gradients of what trains, once per optimizer step, and nothing else.
    Where a copy does not fit, it is shared out inside a node, or over all nodes, whichever waits less for the network,
    then with the host's memory. Where a micro-batch is too large for all of these, the choice is that for a smaller one.
    """
    for halved in range(HALVINGS):
        smaller = _with_load(situation, 0.5**halved)
        choice = next((choice for choice in _in_order(smaller) if choice is not None), None)
        if choice is not None and not halved:
            return choice
        if choice is not None:
            tokens = (
                f"micro-batches of {smaller.load.tokens:,} tokens would fit, those of {situation.load.tokens:,} do not"
            )
            return Choice(choice.strategy, f"{choice.reason}; {tokens}", fits=False, devices=choice.devices)
    need = situation.memory(Strategy.deepspeed_zero3_offload).total
    return Choice(
        Strategy.deepspeed_zero3_offload, f"nothing fits: a device needs {_size(need)} at the least", fits=False
    )


def _with_load(of: Situation, share: float) -> Situation:
    load = Load(round(of.load.tokens * share), round(of.load.tiles * share), round(of.load.supervised * share))
    return replace(of, load=load)


def _in_order(of: Situation) -> Iterator[Choice | None]:
    if of.world_size == 1:
        yield _if_fits(of, Strategy.single, "one device holds the model and its optimizer")
    else:
        yield _if_fits(of, Strategy.ddp, _why_copies(of))
        yield _inside_a_node(of) if of.nodes == 1 else _over_nodes(of)
    devices = devices_that_would_do(of)
    what = f"the states do not fit on {of.world_size} device{'s' if of.world_size > 1 else ''}, so the host's memory holds them, slowly"
    instead = f"; {devices} devices would do without" if devices else ""
    offloaded = _if_fits(of, Strategy.deepspeed_zero3_offload, f"{what}{instead}")
    yield replace(offloaded, devices=devices) if offloaded else None


def _if_fits(of: Situation, strategy: Strategy, reason: str) -> Choice | None:
    return Choice(strategy, reason) if of.fits(strategy) else None


def _why_copies(of: Situation) -> str:
    sent = _size(of.widths.gradient * of.parameters.trainable)
    if of.parameters.trainable < MOSTLY_FROZEN * of.parameters.total:
        return f"frozen weights are copied to each device and not sent; a step sums {sent} of gradients"
    return f"the model and its optimizer fit on each device; a step sums {sent} of gradients and sends nothing else"


def _inside_a_node(of: Situation) -> Choice | None:
    return _if_fits(of, Strategy.fsdp2, f"{_too_large(of)}, so the devices of the node share one")


def _over_nodes(of: Situation) -> Choice | None:
    """A copy in each node where there is room for it, unless the sum of its gradients at the end of a step is waited for
    longer than weights that come from everywhere, but all along the step."""
    node, everywhere = (
        _if_fits(of, Strategy.hsdp, f"{_too_large(of)}, so the devices of each node share one; only gradients cross the network"),
        _if_fits(of, Strategy.deepspeed_zero3, f"{_too_large(of)}, so all {of.world_size} devices share one"),
    )  # fmt: skip
    if node is None and everywhere is not None:
        node_needs = _size(of.memory(Strategy.hsdp).total)
        return replace(everywhere, reason=f"{everywhere.reason}, for within a node each would need {node_needs}")
    if node is None or everywhere is None:
        return node
    shares = [timing.share for strategy in (Strategy.hsdp, Strategy.deepspeed_zero3) if (timing := of.timing(strategy))]
    if not shares:
        return node
    even = f"ZeRO-3 hides its own from {break_even_of(of):,.0f} tokens per micro-batch on, here {of.load.tokens:,}"
    waits = f"at {of.fabric.name} HSDP keeps {shares[0]:.0%} of the devices' speed and ZeRO-3 {shares[1]:.0%}; {even}"
    best = (
        everywhere
        if shares[1] > shares[0] + WORTH or (not of.fits(Strategy.hsdp, ROOM) and shares[1] > shares[0])
        else node
    )
    return replace(best, reason=f"{best.reason} ({waits})")


def break_even_of(of: Situation) -> float | None:
    """Tokens of a micro-batch from which on ZeRO-3's traffic is hidden; None where no speed is known."""
    timing = of.timing(Strategy.deepspeed_zero3)
    return None if timing is None else break_even(timing, of.load.tokens)


def _too_large(of: Situation) -> str:
    return f"a whole copy needs {_size(of.memory(Strategy.ddp).total)} on a device"


def devices_that_would_do(of: Situation) -> int | None:
    """Fewest devices, in whole nodes, on which ZeRO-3 fits; None: a micro-batch alone is too much."""
    for world in range(of.devices_per_node, MOST_DEVICES + 1, of.devices_per_node):
        if of.fits(Strategy.deepspeed_zero3, world_size=world):
            return world
    return None


def _size(number: float) -> str:
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if number >= unit:
            return f"{number / unit:,.0f} {name}" if number >= 10 * unit else f"{number / unit:.1f} {name}"
    return f"{number / 1e3:.1f} kB"
