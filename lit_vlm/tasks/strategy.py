"""Resolves trainer.strategy=auto and stage.activation_checkpointing=auto before training.

The choice is that of task=preflight, with the memory of the device of this machine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from lit_vlm.config.schema import ActivationCheckpointing as Level
from lit_vlm.config.schema import RunConfig, StrategyName
from lit_vlm.cost import DEVICES, Device, ModelShape
from lit_vlm.reports.preflight.estimates import (
    StrategyDecision,
    count_parameters,
    describe_training,
    make_training_setup,
    prepare_meta_stage,
    select_cpu_strategy,
    select_strategy,
)
from lit_vlm.reports.preflight.statistics import summarize_plan
from lit_vlm.stages import Stage
from lit_vlm.tasks.prepare_data import StageData
from lit_vlm.tasks.terminal import say

GB = 10**9


def resolve_auto_strategy(data: StageData, make_stage: Callable[[], Stage]) -> RunConfig:
    """Return the config with a strategy and an activation checkpointing level in place of `auto`; report each with its reason.

    Args:
        make_stage: returns a stage whose model can be built on torch's `meta` device; only its sizes are used.
    """
    config = data.run.config
    is_auto_strategy = config.trainer.strategy is StrategyName.auto
    is_auto_level = config.stage.activation_checkpointing is Level.auto
    if not is_auto_strategy and not is_auto_level:
        return config
    device = detect_device(config)
    decision = select_cpu_strategy(config) if device is None else _choose_by_memory(config, data, make_stage, device)
    if is_auto_strategy and decision.strategy is not StrategyName.single:
        say(f"strategy: {decision.strategy.value}: {decision.reason}")
    if is_auto_level:
        say(f"activation checkpointing: {decision.level.value}: {decision.level_reason}")
    return replace(
        config,
        trainer=replace(config.trainer, strategy=decision.strategy),
        stage=replace(config.stage, activation_checkpointing=decision.level),
    )


def _choose_by_memory(
    config: RunConfig, data: StageData, make_stage: Callable[[], Stage], device: Device
) -> StrategyDecision:
    plan = data.datamodule.make_plan(config.trainer.devices * config.trainer.num_nodes)
    meta_stage = prepare_meta_stage(make_stage(), data.spec)
    assert meta_stage.model is not None
    parameters = count_parameters(meta_stage, config.stage)
    shape = ModelShape.from_config(meta_stage.model.config.to_dict())
    facts = summarize_plan(plan, plan.num_steps)
    return select_strategy(
        config, make_training_setup(config, shape, parameters, describe_training(config, parameters), facts, device)
    )


def detect_device(config: RunConfig) -> Device | None:
    """Return this machine's device: its own memory, and the speed of `preflight.device`; None on a CPU.

    Memory is rounded down to whole GB: devices of one kind may differ by some MB, and all ranks must make the same choice
    (`fault_tolerance/rank_check.py` compares it).
    """
    if config.trainer.accelerator == "cpu" or not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return replace(
        DEVICES[config.preflight.device], name=properties.name, memory_bytes=properties.total_memory // GB * float(GB)
    )
