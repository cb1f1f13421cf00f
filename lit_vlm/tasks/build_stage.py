"""Makes a stage from its settings, and resolves trainer.strategy=auto with what its model measures.

The choice is that of task=preflight (`cost/strategy.py`), with the memory of the device of this machine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from lit_vlm.config.choices import ActivationCheckpointing as Level
from lit_vlm.config.choices import DeviceName, StrategyName
from lit_vlm.config.schema import StageConfig, TrainerConfig
from lit_vlm.config.task_settings import PreflightConfig
from lit_vlm.cost import DEVICES, Device, ModelShape
from lit_vlm.cost.strategy import StrategyDecision, make_training_setup, select_cpu_strategy, select_strategy
from lit_vlm.data.training_data import TrainingData
from lit_vlm.model.spec import ModelSpec
from lit_vlm.reports.preflight.statistics import summarize_plan
from lit_vlm.stages import STAGES, Stage
from lit_vlm.tasks.measure_model import MeasuredModel, get_largest_micro_batch
from lit_vlm.tasks.terminal import say

GB = 10**9


def make_stage(spec: ModelSpec, config: StageConfig, *, precision: str, tiling: str, seed: int) -> Stage:
    """Make the stage of these settings: its class, options, precision of trainable and frozen weights. Reads no weights.

    Args:
        precision: trainer.precision.
        tiling: data.tiling.
    """
    dtype = "bfloat16" if precision == "bf16-true" else "float32"
    frozen_dtype = "bfloat16" if precision == "bf16-mixed" else None
    return STAGES[config.name.value](spec, config, tiling=tiling, dtype=dtype, frozen_dtype=frozen_dtype, seed=seed)


def resolve_auto_strategy(
    training_data: TrainingData,
    measure: Callable[[], MeasuredModel],
    *,
    stage: StageConfig,
    trainer: TrainerConfig,
    preflight: PreflightConfig,
) -> tuple[StageConfig, TrainerConfig]:
    """Return the settings with a strategy and an activation checkpointing level in place of `auto`; report each with its reason.

    Args:
        measure: measures the stage's model; called only if the memory of a device decides.
        preflight: assumed speed of device and network.
    """
    is_auto_strategy = trainer.strategy is StrategyName.auto
    is_auto_level = stage.activation_checkpointing is Level.auto
    if not is_auto_strategy and not is_auto_level:
        return stage, trainer
    device = detect_device(trainer.accelerator, preflight.device)
    if device is None:
        decision = select_cpu_strategy(trainer, stage.activation_checkpointing)
    else:
        decision = _choose_by_memory(training_data, measure, device, stage=stage, trainer=trainer, preflight=preflight)
    if is_auto_strategy and decision.strategy is not StrategyName.single:
        say(f"strategy: {decision.strategy.value}: {decision.reason}")
    if is_auto_level:
        say(f"activation checkpointing: {decision.level.value}: {decision.level_reason}")
    return replace(stage, activation_checkpointing=decision.level), replace(trainer, strategy=decision.strategy)


def _choose_by_memory(
    training_data: TrainingData,
    measure: Callable[[], MeasuredModel],
    device: Device,
    *,
    stage: StageConfig,
    trainer: TrainerConfig,
    preflight: PreflightConfig,
) -> StrategyDecision:
    plan = training_data.make_plan(trainer.devices * trainer.num_nodes)
    measured, facts = measure(), summarize_plan(plan, plan.num_steps)
    setup = make_training_setup(
        ModelShape.from_config(measured.model_config),
        measured.parameters,
        get_largest_micro_batch(facts),
        world_size=facts.world_size,
        num_micro_batches=facts.k,
        stage=stage,
        trainer=trainer,
        preflight=preflight,
        device=device,
    )
    return select_strategy(setup, trainer.strategy)


def detect_device(accelerator: str, assumed: DeviceName) -> Device | None:
    """Return this machine's device: its own memory, and the speed of the assumed device; None on a CPU.

    Memory is rounded down to whole GB: devices of one kind may differ by some MB, and all ranks must make the same choice
    (`fault_tolerance/rank_check.py` compares it).

    Args:
        accelerator: trainer.accelerator.
        assumed: preflight.device.
    """
    if accelerator == "cpu" or not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return replace(DEVICES[assumed], name=properties.name, memory_bytes=properties.total_memory // GB * float(GB))
