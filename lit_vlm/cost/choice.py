"""Chooses the strategy and the level of activation checkpointing of a stage: the fastest of those that fit in memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from lit_vlm.config.schema import ActivationCheckpointing as Level
from lit_vlm.config.schema import Strategy
from lit_vlm.cost.communication import break_even
from lit_vlm.cost.memory import Load
from lit_vlm.cost.situation import Situation
from lit_vlm.types import counted

ROOM = 0.9  # maximum share of a device's memory that an estimate may use without risk
MOSTLY_FROZEN = 0.1  # below this share of trainable weights the cost of the frozen weights dominates
WORTH = 0.02  # share of the devices' speed: for a smaller gain, prefer the strategy with less network traffic
HALVINGS = 8  # maximum halvings of a micro-batch that does not fit with any strategy
ON_CPU = "the trainer is on a CPU, whose memory nothing is compared with"
MOST_DEVICES = 4096  # upper limit of the search for a sufficient number


@dataclass(frozen=True, slots=True)
class Choice:
    """Chosen strategy, with the reason.

    Attributes:
        fits: True if it fits on the devices, by the estimate.
        min_devices: smallest number of devices that would be enough without offload, if these are too few; None: no number
            is enough.
        level: level of activation checkpointing.
    """

    strategy: Strategy
    reason: str
    fits: bool = True
    devices: int | None = None
    level: Level = Level.none


def choose(situation: Situation) -> Choice:
    """Choose the strategy and the level of activation checkpointing of a stage, among the allowed levels.

    For each level the order is: DDP first, which sends the gradients of the trainable weights once per optimizer step and
    nothing else. If a full copy does not fit, the model is sharded inside a node or over all nodes, whichever waits less
    for the network, and at last offloaded to host memory. Of the results that fit on the devices, the fastest is chosen.
    If the micro-batch is too large for all of them, the choice is made for a smaller micro-batch, with the level that
    saves most memory.
    """
    if choice := _fastest(situation):
        return choice
    smallest = situation.at(situation.allowed[-1])
    for halved in range(1, HALVINGS):
        smaller = _with_load(smallest, 0.5**halved)
        if choice := _fastest(smaller):
            sizes = (
                f"micro-batches of {smaller.load.tokens:,} tokens would fit, those of {situation.load.tokens:,} do not"
            )
            return replace(choice, reason=f"{choice.reason}; {sizes}", fits=False)
    need = smallest.memory(Strategy.deepspeed_zero3_offload).total
    reason = f"nothing fits: a device needs {_size(need)} at the least"
    return Choice(Strategy.deepspeed_zero3_offload, reason, fits=False, level=situation.allowed[-1])


def _fastest(of: Situation) -> Choice | None:
    """Choose the fastest strategy and level that fit; offload only if nothing else fits at any level. None if nothing fits."""
    choices = [
        replace(choice, level=level)
        for level in of.allowed
        if (choice := next((choice for choice in _in_order(of.at(level)) if choice is not None), None))
    ]
    on_devices = [choice for choice in choices if choice.strategy is not Strategy.deepspeed_zero3_offload]
    return min(on_devices or choices, key=lambda choice: of.at(choice.level).seconds(choice.strategy), default=None)


def level_for(of: Situation, strategy: Strategy) -> Level:
    """Choose the first allowed level that fits with a strategy; if none fits, the one that saves most memory."""
    return next((level for level in of.allowed if of.at(level).fits(strategy)), of.allowed[-1])


def why_level(of: Situation, strategy: Strategy, level: Level) -> str:
    """Describe the estimated bytes with a level, the device's memory, and the bytes with the previous level."""
    if of.device is None:
        return ON_CPU
    need, name = of.at(level).memory(strategy).total, of.device.name
    text = f"a device needs about {_size(need)} of the {_size(of.device.memory)} of {name}"
    if level is of.allowed[0]:
        return text
    previous = of.allowed[of.allowed.index(level) - 1]
    return f"{text}; with {previous.value} it would need {_size(of.at(previous).memory(strategy).total)}"


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
    reason = f"the states do not fit on {counted(of.world_size, 'device')}, so the host's memory holds them, slowly"
    alternative = f"; {devices} devices would do without" if devices else ""
    offloaded = _if_fits(of, Strategy.deepspeed_zero3_offload, f"{reason}{alternative}")
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
    """Choose between HSDP, with one copy in each node, and ZeRO-3 over all devices.

    HSDP is preferred if a copy fits in a node. ZeRO-3 wins if the all-reduce of HSDP's gradients, at the end of a step,
    waits longer for the network than the weight gathers of ZeRO-3, which are spread over the step.
    """
    within_node, across_nodes = (
        _if_fits(of, Strategy.hsdp, f"{_too_large(of)}, so the devices of each node share one; only gradients cross the network"),
        _if_fits(of, Strategy.deepspeed_zero3, f"{_too_large(of)}, so all {of.world_size} devices share one"),
    )  # fmt: skip
    if within_node is None and across_nodes is not None:
        node_needs = _size(of.memory(Strategy.hsdp).total)
        return replace(across_nodes, reason=f"{across_nodes.reason}, for within a node each would need {node_needs}")
    if within_node is None or across_nodes is None:
        return within_node
    efficiencies = [
        timing.share for strategy in (Strategy.hsdp, Strategy.deepspeed_zero3) if (timing := of.timing(strategy))
    ]
    if not efficiencies:
        return within_node
    threshold = f"ZeRO-3 hides its own from {break_even_of(of):,.0f} tokens per micro-batch on, here {of.load.tokens:,}"
    comparison = f"at {of.fabric.name} HSDP keeps {efficiencies[0]:.0%} of the devices' speed and ZeRO-3 {efficiencies[1]:.0%}; {threshold}"
    best = (
        across_nodes
        if efficiencies[1] > efficiencies[0] + WORTH
        or (not of.fits(Strategy.hsdp, ROOM) and efficiencies[1] > efficiencies[0])
        else within_node
    )
    return replace(best, reason=f"{best.reason} ({comparison})")


def break_even_of(of: Situation) -> float | None:
    """Estimate the tokens of a micro-batch above which computing hides ZeRO-3's traffic; None if no device speed is known."""
    timing = of.timing(Strategy.deepspeed_zero3)
    return None if timing is None else break_even(timing, of.load.tokens)


def _too_large(of: Situation) -> str:
    return f"a whole copy needs {_size(of.memory(Strategy.ddp).total)} on a device"


def devices_that_would_do(of: Situation) -> int | None:
    """Find the smallest number of devices, in full nodes, on which ZeRO-3 fits; None if a micro-batch alone is too large."""
    for num_devices in range(of.devices_per_node, MOST_DEVICES + 1, of.devices_per_node):
        if of.fits(Strategy.deepspeed_zero3, world_size=num_devices):
            return num_devices
    return None


def _size(number: float) -> str:
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if number >= unit:
            return f"{number / unit:,.0f} {name}" if number >= 10 * unit else f"{number / unit:.1f} {name}"
    return f"{number / 1e3:.1f} kB"
