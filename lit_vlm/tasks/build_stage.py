"""Makes a stage from its settings, measures it without weights, and resolves trainer.strategy=auto with that.

The choice is that of task=preflight (`cost/strategy.py`), with the memory of the device of this machine.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from lit_vlm.config.choices import ActivationCheckpointing as Level
from lit_vlm.config.choices import DeviceName, StrategyName
from lit_vlm.config.schema import PreflightConfig, StageConfig, TrainerConfig
from lit_vlm.cost import DEVICES, Device, MicroBatchSize, ModelShape, ParameterCounts
from lit_vlm.cost.strategy import StrategyDecision, make_training_setup, select_cpu_strategy, select_strategy
from lit_vlm.data.datamodule import DataModule
from lit_vlm.model.parts import get_part
from lit_vlm.model.skeleton import build_on_meta, list_frozen_matrices, list_matrices
from lit_vlm.model.spec import ModelSpec
from lit_vlm.reports.preflight.facts import PlanFacts
from lit_vlm.reports.preflight.statistics import summarize_plan
from lit_vlm.stages import STAGES, DPOStage, Stage
from lit_vlm.tasks.terminal import say
from lit_vlm.types import ModelPart

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


@dataclass(frozen=True, slots=True)
class MeasuredStage:
    """Stage whose model is on torch's `meta` device, its numbers of parameters and its config."""

    stage: Stage
    parameters: ParameterCounts
    model_config: dict[str, Any]


def resolve_auto_strategy(
    datamodule: DataModule,
    measure: Callable[[], MeasuredStage],
    *,
    stage: StageConfig,
    trainer: TrainerConfig,
    preflight: PreflightConfig,
) -> tuple[StageConfig, TrainerConfig]:
    """Return the settings with a strategy and an activation checkpointing level in place of `auto`; report each with its reason.

    Args:
        measure: measures the stage; called only if the memory of a device decides.
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
        decision = _choose_by_memory(datamodule, measure, device, stage=stage, trainer=trainer, preflight=preflight)
    if is_auto_strategy and decision.strategy is not StrategyName.single:
        say(f"strategy: {decision.strategy.value}: {decision.reason}")
    if is_auto_level:
        say(f"activation checkpointing: {decision.level.value}: {decision.level_reason}")
    return replace(stage, activation_checkpointing=decision.level), replace(trainer, strategy=decision.strategy)


def _choose_by_memory(
    datamodule: DataModule,
    measure: Callable[[], MeasuredStage],
    device: Device,
    *,
    stage: StageConfig,
    trainer: TrainerConfig,
    preflight: PreflightConfig,
) -> StrategyDecision:
    plan = datamodule.make_plan(trainer.devices * trainer.num_nodes)
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


def get_largest_micro_batch(plan: PlanFacts) -> MicroBatchSize:
    """Return the size of the plan's largest micro-batch."""
    return MicroBatchSize(round(plan.pack_tokens.most), round(plan.pack_tiles.most), plan.most_supervised)


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


def measure_stage(stage: Stage, spec: ModelSpec, config: StageConfig) -> MeasuredStage:
    """Build the stage's model on torch's `meta` device and count its parameters: shapes, adapters, frozen parts, no memory.

    A reference model from another folder is not loaded: it is as large as the model itself, and only its size matters.
    """
    if isinstance(stage, DPOStage):
        stage.config.reference = None
    model_config = copy.deepcopy(spec.config)
    model_config.text_config.vocab_size = max(model_config.text_config.vocab_size, len(spec.tokenizer))
    model = stage.model = build_on_meta(model_config)
    ids = spec.tokenizer.convert_tokens_to_ids
    stage._new_ids, stage._special_ids = ids(spec.new_tokens), ids(spec.special_tokens)
    with warnings.catch_warnings(action="ignore"):  # transformers' warnings about its own names
        stage._prepare_training()
    return MeasuredStage(stage, count_parameters(stage, config), model.config.to_dict())


def count_parameters(stage: Stage, config: StageConfig) -> ParameterCounts:
    """Count the parameters for the memory estimate: all, trainable, cast by autocast, frozen matrices, reference model."""
    model = stage.model
    assert model is not None
    autocast_parts = [part for part in ModelPart if part is not ModelPart.vision_tower or part in config.trainable]
    linear = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and get_part(f"{name}.") in autocast_parts
    ]
    cast = {id(p): p for _, module in linear for p in module.parameters(recurse=False)}
    frozen = list_frozen_matrices(model)
    reference = _find_reference_model(stage, config)
    layers: Any = model.model.language_model.layers
    return ParameterCounts(
        total=sum(p.numel() for p in model.parameters()),
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        autocast=sum(p.numel() for p in cast.values()),
        autocast_frozen=sum(p.numel() for p in cast.values() if not p.requires_grad),
        frozen_matrices=sum(p.numel() for p in frozen),
        autocast_frozen_matrices=sum(p.numel() for p in frozen if id(p) in cast),
        reference=sum(p.numel() for p in reference.parameters()) if reference else 0,
        reference_matrices=sum(p.numel() for p in list_matrices(reference)) if reference else 0,
        largest_layer=max(sum(p.numel() for p in layers[0].parameters()), model.lm_head.weight.numel()),
    )


def _find_reference_model(stage: Stage, config: StageConfig) -> nn.Module | None:
    """Find the reference model of a preference stage that is held in memory in addition to the model.

    It is a copy without the vision tower, if both models share that; or the model of another folder, which is as large as
    this one. It is None under LoRA, or if the reference log-probabilities are cached.
    """
    if not config.has_reference_model:
        return None
    return stage.model if config.model_folders else getattr(stage, "reference", None)
