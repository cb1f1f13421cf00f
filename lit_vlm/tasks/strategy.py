"""trainer.strategy=auto, before training: the choice that task=preflight makes, by the memory of the device that is there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from lit_vlm.config.schema import RunConfig, Strategy
from lit_vlm.cost import DEVICES, Choice, Device, Shape, choose
from lit_vlm.engine.preflight.model import outline, parameters_of, training_of
from lit_vlm.engine.preflight.numbers import plan_facts
from lit_vlm.engine.preflight.strategy import situation_of
from lit_vlm.stages import Stage
from lit_vlm.tasks.stage_data import StageData
from lit_vlm.tasks.terminal import say

GB = 10**9


def settle_strategy(data: StageData, make_stage: Callable[[], Stage]) -> RunConfig:
    """The settings with a strategy in place of `auto`. One line says which and why.

    Args:
        make_stage: gives a stage whose model can be drawn on torch's `meta` device, for its sizes.
    """
    config = data.run.config
    if config.trainer.strategy is not Strategy.auto:
        return config
    choice = _chosen(config, data, make_stage)
    if choice.strategy is not Strategy.single:
        say(f"strategy: {choice.strategy.value}: {choice.reason}")
    return replace(config, trainer=replace(config.trainer, strategy=choice.strategy))


def _chosen(config: RunConfig, data: StageData, make_stage: Callable[[], Stage]) -> Choice:
    """A CPU has memory that nothing is compared with: copies of the whole model, and nothing to count for them."""
    device, world = device_here(config), config.trainer.devices * config.trainer.num_nodes
    if device is None:
        return Choice(Strategy.ddp if world > 1 else Strategy.single, "the trainer is on a CPU")
    plan = data.datamodule.make_plan(world)
    drawn = outline(make_stage(), data.blueprint)
    assert drawn.model is not None
    parameters = parameters_of(drawn, config.stage)
    shape = Shape.from_config(drawn.model.config.to_dict())
    facts = plan_facts(plan, plan.num_steps)
    return choose(situation_of(config, shape, parameters, training_of(config, parameters), facts, device))


def device_here(config: RunConfig) -> Device | None:
    """The memory that is there, at the speed of `preflight.device`; None on a CPU. In whole GB, for devices of one kind may
    differ by some MB, and all ranks must come to the same choice (`engine/agreement.py` compares it)."""
    if config.trainer.accelerator == "cpu" or not torch.cuda.is_available():
        return None
    there = torch.cuda.get_device_properties(0)
    return replace(DEVICES[config.preflight.device], name=there.name, memory=there.total_memory // GB * float(GB))
