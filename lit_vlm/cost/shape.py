"""Shape of a LLaVA-OneVision-class model: the sizes that determine its cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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
    """Sizes of language model and vision tower."""

    text: TextShape
    vision: VisionShape

    @property
    def projector_parameters(self) -> int:
        """Number of weights in the projector's two matrices."""
        return self.vision.hidden_size * self.text.hidden_size + self.text.hidden_size**2

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> ModelShape:
        """Make the shape from the `config.json` of a LLaVA-OneVision-class model."""
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
        )
