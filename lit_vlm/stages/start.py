"""Model initialisation of a stage: from parts, a whole model's folder, a Lightning checkpoint, or a built model."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

from lit_vlm.anyres import ImageSettings, Tiling
from lit_vlm.config.schema import ModelConfig
from lit_vlm.model.build import ModelSpec, build_model, load_model_spec
from lit_vlm.model.forward import use_flat_forward
from lit_vlm.types import UserError

ResolvedModel: TypeAlias = ModelSpec | LlavaOnevisionForConditionalGeneration | dict[str, Any]
ModelLike: TypeAlias = ResolvedModel | str | Path


@dataclass(slots=True)
class ModelInit:
    """Initialised model, with the ids of tokens that this run adds and of all control tokens."""

    model: LlavaOnevisionForConditionalGeneration
    new_ids: list[int] = field(default_factory=list)
    special_ids: list[int] = field(default_factory=list)


def resolve_model(source: ModelLike, tiling: Tiling) -> ResolvedModel:
    """Resolve a folder or hub id to its ModelSpec; return anything else unchanged."""
    return (
        load_model_spec(ModelConfig(special_tokens=[]), str(source), tiling)
        if isinstance(source, str | Path)
        else source
    )


def init_model(source: ResolvedModel, dtype: torch.dtype, seed: int) -> ModelInit:
    """Initialise the model, unless it is built already.

    Args:
        source: a dict is the result of `describe_model`, without weights.
        dtype: of the weights.
        seed: for new parameters.

    Raises:
        UserError: the model was not built by this project.
    """
    if isinstance(source, ModelSpec):
        ids = source.tokenizer.convert_tokens_to_ids
        return ModelInit(build_model(source, dtype, seed), ids(source.new_tokens), ids(source.special_tokens))
    if isinstance(source, dict):  # a checkpoint: its own weights follow
        model = LlavaOnevisionForConditionalGeneration(LlavaOnevisionConfig.from_dict(source["config"])).to(dtype)
        model.generation_config.eos_token_id = source["stops"]
        use_flat_forward(model, _parse_image_settings(source["images"]))
        return ModelInit(model, source["row_ids"], source["row_ids"])
    if not hasattr(source.model, "image_settings"):
        raise UserError("Give a model that lit_vlm built, or the folder it was saved to.")
    return ModelInit(source)


def describe_model(model: LlavaOnevisionForConditionalGeneration, row_ids: list[int]) -> dict[str, Any]:
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


def _parse_image_settings(values: dict[str, Any]) -> ImageSettings:
    pinpoints = tuple(tuple(pair) for pair in values["grid_pinpoints"])
    lists = {key: tuple(values[key]) for key in ("mean", "std")}
    return ImageSettings(**{**values, **lists, "grid_pinpoints": pinpoints, "tiling": Tiling(values["tiling"])})
