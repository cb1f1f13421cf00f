"""Preparation of a model for training as a stage's settings say: frozen parts, LoRA adapters, trainable token rows.

It needs no weights: on torch's `meta` device the same code serves to count the parameters before a run.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

from lit_vlm.config.choices import ActivationCheckpointing as Level
from lit_vlm.config.schema import StageConfig
from lit_vlm.formatting import format_count
from lit_vlm.model.activation_checkpointing import enable_activation_checkpointing
from lit_vlm.model.lora import add_lora
from lit_vlm.model.parts import freeze_except, set_train_modes
from lit_vlm.model.vocabulary import TrainableTokens
from lit_vlm.types import ModelPart, UserError

if TYPE_CHECKING:
    from lit_vlm.model.classes import VisionLanguageModel


def prepare_parts(
    model: VisionLanguageModel,
    config: StageConfig,
    *,
    new_ids: list[int],
    special_ids: list[int],
    seed: int,
) -> dict[ModelPart, str]:
    """Freeze parts, add LoRA adapters and trainable token rows, enable activation checkpointing, set train modes.

    Args:
        new_ids: tokens that this run adds.
        special_ids: all control tokens.
        seed: of the adapters.

    Returns:
        How each part trains that does not train as a whole, as text for the user.
    """
    methods: dict[ModelPart, str] = {}
    trainable = [ModelPart(name) for name in config.trainable]
    freeze_except(model, trainable)
    for part in trainable:
        lora = config.get_lora(part)
        if lora is not None:
            add_lora(model, part, lora, seed)
            methods[part] = f"LoRA rank {lora.rank}"
    token_ids = get_trainable_token_ids(model, config, new_ids=new_ids, special_ids=special_ids)
    if token_ids:
        model.new_tokens = TrainableTokens(model, token_ids)
        lora_text = methods.get(ModelPart.language_model)
        methods[ModelPart.language_model] = (
            f"{lora_text + ', ' if lora_text else ''}rows of {format_count(len(token_ids), 'token')}"
        )
    enable_activation_checkpointing(model, config.checkpointing_level)
    set_train_modes(model, trainable, checkpointed=config.checkpointing_level is not Level.none)
    return methods


def get_trainable_token_ids(
    model: VisionLanguageModel, config: StageConfig, *, new_ids: list[int], special_ids: list[int]
) -> list[int]:
    """Get the tokens whose rows train although the vocabulary's tables are frozen.

    These are the tokens that this run adds. Under LoRA they are all control tokens, because the data that uses them
    may come now for the first time.
    """
    if model.get_input_embeddings().weight.requires_grad:
        return []
    if config.get_lora(ModelPart.language_model) is not None:
        return special_ids if config.TRAINS_SPECIAL_TOKENS else []
    return new_ids


def copy_reference_model(model: VisionLanguageModel, config: StageConfig) -> VisionLanguageModel | None:
    """Copy the model before it is prepared, as the reference model of a preference stage; None if the stage needs no copy.

    Under LoRA the model without its adapters is the reference. The copy has no vision tower if both models share it.
    """
    has_own = not config.has_reference_model or bool(config.model_folders)
    if has_own or any(config.get_lora(part) for part in ModelPart):
        return None
    tower = model.model.vision_tower
    if ModelPart.vision_tower in [ModelPart(name) for name in config.trainable]:
        return copy.deepcopy(model)
    model.model.vision_tower = None
    try:
        return copy.deepcopy(model)
    finally:
        model.model.vision_tower = tower


def disable_dropout(model: nn.Module) -> None:
    """Disable all dropout of a model."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def require_frozen_tower(trainable: Sequence[ModelPart]) -> None:
    """Raise UserError when the vision tower trains although its features are cached."""
    if ModelPart.vision_tower in trainable:
        raise UserError(
            "stage.cache_features=true keeps what the vision tower sees, and stage.trainable names it: it would see "
            "something else after each step. Leave one of them out."
        )
