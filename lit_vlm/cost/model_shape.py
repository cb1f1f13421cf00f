"""Shape of a LLaVA-class model: the sizes that determine its cost."""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt
from typing import Any

from lit_vlm.model.projectors import PROJECTORS, Projector, get_projector

# Model types whose last layer is computed at loss positions only (`model/last_layer.py`).
MODELS_WITH_PRUNED_LAST_LAYER = ("qwen2", "qwen3", "llama", "mistral", "granite", "hyperclovax")


@dataclass(frozen=True, slots=True)
class TextShape:
    """Sizes of the language model."""

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    has_pruned_last_layer: bool = False

    @property
    def query_width(self) -> int:
        """Width of all query heads."""
        return self.num_attention_heads * self.head_dim

    @property
    def key_width(self) -> int:
        """Width of all key heads; the value heads have the same width."""
        return self.num_key_value_heads * self.head_dim

    @property
    def layer_parameters(self) -> int:
        """Number of weights in one layer's matrices: queries, keys, values, output, gate, up, down."""
        return (
            2 * self.hidden_size * (self.query_width + self.key_width) + 3 * self.hidden_size * self.intermediate_size
        )


@dataclass(frozen=True, slots=True)
class VisionShape:
    """Sizes of the vision tower."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    image_size: int
    num_patches: int  # of a tile
    num_positions: int  # of a tile in the tower: its patches, plus CLIP's class token

    @property
    def layer_parameters(self) -> int:
        """Number of weights in one layer's matrices."""
        return 4 * self.hidden_size**2 + 2 * self.hidden_size * self.intermediate_size


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of language model and vision tower, and the projector between them."""

    text: TextShape
    vision: VisionShape
    projector: Projector = PROJECTORS["mlp2x_gelu"]

    @property
    def projector_parameters(self) -> int:
        """Number of weights in the projector's matrices."""
        return self.projector.count_parameters(self.vision.hidden_size, self.text.hidden_size)

    @property
    def projector_flops(self) -> int:
        """FLOPs of the projector's forward pass for one tile."""
        return self.projector.count_flops(
            self.vision.hidden_size, self.text.hidden_size, isqrt(self.vision.num_patches)
        )

    @property
    def projector_activations(self) -> int:
        """Number of the projector's values of one tile that are kept for the backward pass."""
        return self.projector.count_activations(
            self.vision.hidden_size, self.text.hidden_size, isqrt(self.vision.num_patches)
        )

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> ModelShape:
        """Make the shape from the `config.json` of a LLaVA-class model."""
        text, vision = config["text_config"], config["vision_config"]
        heads = text["num_attention_heads"]
        patches = (vision["image_size"] // vision["patch_size"]) ** 2
        return cls(
            TextShape(
                num_layers=text["num_hidden_layers"],
                hidden_size=text["hidden_size"],
                num_attention_heads=heads,
                num_key_value_heads=text.get("num_key_value_heads") or heads,
                head_dim=text.get("head_dim") or text["hidden_size"] // heads,
                intermediate_size=text["intermediate_size"],
                vocab_size=text["vocab_size"],
                has_pruned_last_layer=text.get("model_type") in MODELS_WITH_PRUNED_LAST_LAYER,
            ),
            VisionShape(
                num_layers=vision["num_hidden_layers"],
                hidden_size=vision["hidden_size"],
                intermediate_size=vision["intermediate_size"],
                image_size=vision["image_size"],
                num_patches=patches,
                num_positions=patches + (1 if vision.get("model_type") == "clip_vision_model" else 0),
            ),
            get_projector(config),
        )


@dataclass(frozen=True, slots=True)
class Flops:
    """FLOPs of one token, one attention square, one tile and one loss position, forward and backward together."""

    per_token: float
    per_square: float  # for each unit of 2 * (attended token pairs): a single segment of t tokens has t^2 units
    per_tile: float
    per_supervised: float

    def compute(self, tokens: Any, squares: Any, tiles: Any, supervised: Any) -> Any:
        """Compute the FLOPs of samples, from numbers or from arrays of one shape.

        Args:
            tokens: tokens of all segments.
            squares: attention squares, see `per_square`.
            tiles: image tiles.
            supervised: loss positions.
        """
        return (
            self.per_token * tokens
            + self.per_square * squares
            + self.per_tile * tiles
            + self.per_supervised * supervised
        )

    @classmethod
    def from_config(
        cls,
        config: dict[str, Any],
        *,
        trains_tower: bool,
        trains_language_model: bool,
        recomputed_share: float = 0.0,
        has_reference: bool = False,
    ) -> Flops:
        """Build the costs from the `config.json` of a LLaVA-class model.

        Args:
            trains_tower: True if the vision tower trains.
            trains_language_model: True if the language model trains.
            recomputed_share: share of the layers' forward pass that activation checkpointing computes again
                (`TrainingOptions.recomputed_share`). Count it for an estimate of time. Do not count it for a utilisation,
                because it is no work on the data.
            has_reference: count the forward pass of a preference stage's reference model as well.
        """
        shape = ModelShape.from_config(config)
        text, vision = shape.text, shape.vision
        recomputed, reference_passes = recomputed_share, int(has_reference)
        passes = (3 if trains_language_model else 2) + recomputed + reference_passes
        # in the last layer every token needs a key and a value, all else is computed for loss positions only; the
        # attention of these few positions is not counted
        loss_position_weights = (
            text.layer_parameters - 2 * text.hidden_size * text.key_width if text.has_pruned_last_layer else 0
        )
        attention_layers = text.num_layers - text.has_pruned_last_layer
        tower = (
            2 * vision.num_layers * vision.layer_parameters * vision.num_patches
            + 4 * vision.num_patches**2 * vision.hidden_size * vision.num_layers
        )
        return cls(
            per_token=2.0 * passes * (text.num_layers * text.layer_parameters - loss_position_weights),
            per_square=2.0 * (3 + recomputed + reference_passes) * text.query_width * attention_layers,
            # the reference model reuses the features of a frozen vision tower
            per_tile=tower * (3 + recomputed + reference_passes if trains_tower else 1)
            + float((3 + reference_passes) * shape.projector_flops),
            per_supervised=2.0 * (passes - recomputed) * text.hidden_size * text.vocab_size
            + 2.0 * passes * loss_position_weights,
        )
