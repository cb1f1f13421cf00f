"""Model initialisation of a stage: from parts, a whole model's folder, a Lightning checkpoint, or a built model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import nn

from lit_vlm.anyres import ImageSettings, ModelClass, Tiling
from lit_vlm.config.choices import ActivationCheckpointing as Level
from lit_vlm.config.schema import ModelConfig
from lit_vlm.model.activation_checkpointing import has_checkpointed_layers
from lit_vlm.model.build import build_model
from lit_vlm.model.classes import CONFIG_CLASSES
from lit_vlm.model.packed_forward import use_flat_forward
from lit_vlm.model.parts import get_part
from lit_vlm.model.skeleton import build_model_class
from lit_vlm.model.spec import ModelSpec, load_model_spec
from lit_vlm.types import ModelPart, UserError

if TYPE_CHECKING:
    from lit_vlm.model.classes import VisionLanguageModel

ResolvedModel: TypeAlias = "ModelSpec | VisionLanguageModel | dict[str, Any]"
ModelLike: TypeAlias = "ResolvedModel | str | Path"


@dataclass(slots=True)
class ModelInit:
    """Initialised model, with the ids of tokens that this run adds and of all control tokens."""

    model: VisionLanguageModel
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
        config_class = CONFIG_CLASSES[ModelClass(source["config"]["model_type"])]
        model = build_model_class(config_class.from_dict(source["config"])).to(dtype)
        model.generation_config.eos_token_id = source["stops"]
        use_flat_forward(model, _parse_image_settings(source["images"]))
        return ModelInit(model, source["row_ids"], source["row_ids"])
    if not hasattr(source.model, "image_settings"):
        raise UserError("Give a model that lit_vlm built, or the folder it was saved to.")
    return ModelInit(source)


def describe_model(model: VisionLanguageModel, row_ids: list[int]) -> dict[str, Any]:
    """Describe the model for a Lightning checkpoint, beside its weights, in plain containers.

    Args:
        row_ids: tokens whose rows train although the vocabulary's tables do not.
    """
    settings = model.model.image_settings
    return {
        "config": model.config.to_dict(),
        "images": asdict(settings) | {"tiling": settings.tiling.value, "model_class": settings.model_class.value},
        "row_ids": list(row_ids),
        "stops": model.generation_config.eos_token_id,
    }


def _parse_image_settings(values: dict[str, Any]) -> ImageSettings:
    pinpoints = tuple(tuple(pair) for pair in values["grid_pinpoints"])
    lists = {key: tuple(values[key]) for key in ("mean", "std")}
    choices: dict[str, Any] = {"tiling": Tiling(values["tiling"])}
    if "model_class" in values:  # a checkpoint of before has OneVision's class
        choices["model_class"] = ModelClass(values["model_class"])
    return ImageSettings(**{**values, **lists, **choices, "grid_pinpoints": pinpoints})


def require_images(index: Any, trainable: Sequence[ModelPart]) -> None:
    """Raise UserError when the vision side trains and no sample of the index has an image. None: no check."""
    vision_parts = [part.value for part in trainable if part is not ModelPart.language_model]
    if index is not None and vision_parts and not index.tiles.any():
        raise UserError(
            f"No sample has an image, and the stage trains {', '.join(vision_parts)}, which would learn nothing. "
            "Add a source with images, or set stage.trainable=[language_model]."
        )


def require_activation_checkpointing(model: nn.Module, level: Level) -> None:
    """Raise UserError when activation checkpointing is set and no layer is checkpointed."""
    if level is not Level.none and not has_checkpointed_layers(model):
        raise UserError(
            f"stage.activation_checkpointing={level.value} has no effect on this model: transformers checkpoints none "
            "of its layers. Set stage.activation_checkpointing=none."
        )


def require_bf16(precision: str) -> None:
    """Raise UserError unless autocast reads frozen matrices in bfloat16, the type in which they are stored."""
    if precision != "bf16-mixed":
        raise UserError(
            f"The stage holds frozen weights in bfloat16, and the trainer's precision is {precision}. Give the trainer "
            "precision='bf16-mixed', or make the stage without frozen_dtype."
        )


def require_gradients(
    model: nn.Module, trainable: Sequence[ModelPart], sums: dict[str, float], *, with_images: bool = True
) -> None:
    """Check that every trainable parameter has a gradient, every trainable part a non-zero one, and no other parameter one.

    Args:
        sums: as returned by `compute_gradient_sums`.
        with_images: False when no sample of the step has an image; the vision side's gradients are correctly zero then.

    Raises:
        UserError: with the names of the parameters; the run would train something else than its settings say.
    """
    norms = dict.fromkeys(trainable, 0.0)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    missing, unwanted = [n for n in trained if n not in sums], sorted(sums.keys() - set(trained))
    for name in trained:
        norms[get_part(name)] = norms.get(get_part(name), 0.0) + sums.get(name, 0.0)
    checked = norms if with_images else {ModelPart.language_model: norms.get(ModelPart.language_model, 1.0)}
    zero_parts = [part.value for part, norm in checked.items() if norm == 0.0]
    if missing or unwanted or zero_parts:
        raise UserError(
            "The first step's gradients do not match what should train: "
            f"without a gradient {missing[:5] or 'none'}, unwanted {unwanted[:5] or 'none'}, parts with zero gradient {zero_parts or 'none'}. "
            "Check stage.trainable, and that the answers of this step depend on those parts."
        )


def compute_gradient_sums(model: nn.Module, strategy: Any) -> dict[str, float]:
    """Compute the sum of magnitudes of each existing gradient.

    A strategy that shards gradients has its own method for it.
    """
    if hasattr(strategy, "gradient_sums"):
        return strategy.gradient_sums(model)
    gradients = ((name, parameter.grad) for name, parameter in model.named_parameters())
    return {name: float(gradient.float().abs().sum()) for name, gradient in gradients if gradient is not None}
