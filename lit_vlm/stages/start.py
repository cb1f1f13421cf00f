"""Model initialisation of a stage: from parts, a whole model's folder, a Lightning checkpoint, or a built model."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

from lit_vlm.anyres import ImageSettings, Tiling
from lit_vlm.config.schema import ModelConfig
from lit_vlm.model.build import Blueprint, build, draw_up
from lit_vlm.model.forward import use_flat_forward
from lit_vlm.types import UserError

Drawn: TypeAlias = Blueprint | LlavaOnevisionForConditionalGeneration | dict[str, Any]
ModelLike: TypeAlias = Drawn | str | Path


@dataclass(slots=True)
class Start:
    """Initialised model, with the ids of tokens that this run adds and of all control tokens."""

    model: LlavaOnevisionForConditionalGeneration
    new_ids: list[int] = field(default_factory=list)
    special_ids: list[int] = field(default_factory=list)


def drawn_up(given: ModelLike, tiling: Tiling) -> Drawn:
    """Resolve a folder or hub id to its ModelSpec; return anything else unchanged."""
    return draw_up(ModelConfig(special_tokens=[]), str(given), tiling) if isinstance(given, str | Path) else given


def start_from(given: Drawn, dtype: torch.dtype, seed: int) -> Start:
    """Initialise the model, unless it is built already.

    Args:
        source: a dict is the result of `describe_model`, without weights.
        dtype: of the weights.
        seed: for new parameters.

    Raises:
        UserError: the model was not built by this project.
    """
    if isinstance(given, Blueprint):
        ids = given.tokenizer.convert_tokens_to_ids
        return Start(build(given, dtype, seed), ids(given.new_tokens), ids(given.special_tokens))
    if isinstance(given, dict):  # a checkpoint: its own weights follow
        model = LlavaOnevisionForConditionalGeneration(LlavaOnevisionConfig.from_dict(given["config"])).to(dtype)
        model.generation_config.eos_token_id = given["stops"]
        use_flat_forward(model, _settings_from(given["images"]))
        return Start(model, given["row_ids"], given["row_ids"])
    if not hasattr(given.model, "image_settings"):
        raise UserError("Give a model that lit_vlm built, or the folder it was saved to.")
    return Start(given)


def described(model: LlavaOnevisionForConditionalGeneration, row_ids: list[int]) -> dict[str, Any]:
    """Describe the model for a Lightning checkpoint, beside its weights, in plain containers.

    Args:
        row_ids: tokens whose rows train although the vocabulary's tables do not.
    """
    settings = model.model.image_settings
    return {
        "config": model.config.to_dict(),
        "images": asdict(settings) | {"tiling": settings.tiling.value},
        "row_ids": list(row_ids),
        "stops": model.generation_config.eos_token_id,
    }


def _settings_from(values: dict[str, Any]) -> ImageSettings:
    pinpoints = tuple(tuple(pair) for pair in values["grid_pinpoints"])
    lists = {key: tuple(values[key]) for key in ("mean", "std")}
    return ImageSettings(**{**values, **lists, "grid_pinpoints": pinpoints, "tiling": Tiling(values["tiling"])})
