"""Resolves trainer.strategy=auto and stage.activation_checkpointing=auto before training.

The choice is that of task=preflight, with the memory of the device of this machine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from lit_vlm.config.schema import ActivationCheckpointing as Level
from lit_vlm.config.schema import RunConfig, Strategy
from lit_vlm.cost import DEVICES, Device, Shape
from lit_vlm.engine.preflight.model import outline, parameters_of, training_of
from lit_vlm.engine.preflight.numbers import plan_facts
from lit_vlm.engine.preflight.strategy import Decision, decided, on_a_cpu, situation_of
from lit_vlm.stages import Stage
from lit_vlm.tasks.stage_data import StageData
from lit_vlm.tasks.terminal import say

GB = 10**9


def settle_strategy(data: StageData, make_stage: Callable[[], Stage]) -> RunConfig:
    """Return the config with a strategy and an activation checkpointing level in place of `auto`; report each with its reason.

    Args:
        make_stage: returns a stage whose model can be built on torch's `meta` device; only its sizes are used.
    """
    config = data.run.config
    is_auto_strategy = config.trainer.strategy is Strategy.auto
    is_auto_level = config.stage.activation_checkpointing is Level.auto
    if not is_auto_strategy and not is_auto_level:
        return config
    device = device_here(config)
    decision = on_a_cpu(config) if device is None else _by_sizes(config, data, make_stage, device)
    if is_auto_strategy and decision.strategy is not Strategy.single:
        say(f"strategy: {decision.strategy.value}: {decision.reason}")
    if is_auto_level:
        say(f"activation checkpointing: {decision.level.value}: {decision.level_reason}")
    return replace(
        config,
        trainer=replace(config.trainer, strategy=decision.strategy),
        stage=replace(config.stage, activation_checkpointing=decision.level),
    )


def _by_sizes(config: RunConfig, data: StageData, make_stage: Callable[[], Stage], device: Device) -> Decision:
    plan = data.datamodule.make_plan(config.trainer.devices * config.trainer.num_nodes)
    meta_stage = outline(make_stage(), data.blueprint)
    assert meta_stage.model is not None
    parameters = parameters_of(meta_stage, config.stage)
    shape = Shape.from_config(meta_stage.model.config.to_dict())
    facts = plan_facts(plan, plan.num_steps)
    return decided(config, situation_of(config, shape, parameters, training_of(config, parameters), facts, device))


def device_here(config: RunConfig) -> Device | None:
    """Return this machine's device: its own memory, and the speed of `preflight.device`; None on a CPU.

    Memory is rounded down to whole GB: devices of one kind may differ by some MB, and all ranks must make the same choice
    (`engine/agreement.py` compares it).
    """
    if config.trainer.accelerator == "cpu" or not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return replace(
        DEVICES[config.preflight.device], name=properties.name, memory=properties.total_memory // GB * float(GB)
    )
