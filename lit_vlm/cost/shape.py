"""Shape of a LLaVA-OneVision-class model: the sizes that determine its cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# Model types whose last layer is computed at loss positions only (`model/last_layer.py`).
PRUNED = ("qwen2", "qwen3", "llama", "mistral", "granite", "hyperclovax")


@dataclass(frozen=True, slots=True)
class TextShape:
    """Sizes of the language model."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    pruned: bool = False

    @property
    def query(self) -> int:
        """Width of all query heads."""
        return self.heads * self.head_dim

    @property
    def key(self) -> int:
        """Width of all key heads; the value heads have the same width."""
        return self.kv_heads * self.head_dim

    @property
    def layer(self) -> int:
        """Number of weights in one layer's matrices: queries, keys, values, output, gate, up, down."""
        return 2 * self.hidden * (self.query + self.key) + 3 * self.hidden * self.ffn


@dataclass(frozen=True, slots=True)
class VisionShape:
    """Sizes of the vision tower."""

    layers: int
    width: int
    ffn: int
    image_size: int
    patches: int  # of a tile
    positions: int  # of a tile in the tower: its patches, plus CLIP's class token

    @property
    def layer(self) -> int:
        """Number of weights in one layer's matrices."""
        return 4 * self.width**2 + 2 * self.width * self.ffn


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of language model and vision tower."""

    text: TextShape
    vision: VisionShape

    @property
    def projector(self) -> int:
        """Number of weights in the projector's two matrices."""
        return self.vision.width * self.text.hidden + self.text.hidden**2

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Shape:
        """Make the shape from the `config.json` of a LLaVA-OneVision-class model."""
        text, vision = config["text_config"], config["vision_config"]
        heads = text["num_attention_heads"]
        patches = (vision["image_size"] // vision["patch_size"]) ** 2
        return cls(
            TextShape(
                layers=text["num_hidden_layers"],
                hidden=text["hidden_size"],
                heads=heads,
                kv_heads=text.get("num_key_value_heads") or heads,
                head_dim=text.get("head_dim") or text["hidden_size"] // heads,
                ffn=text["intermediate_size"],
                vocab=text["vocab_size"],
                pruned=text.get("model_type") in PRUNED,
            ),
            VisionShape(
                layers=vision["num_hidden_layers"],
                width=vision["hidden_size"],
                ffn=vision["intermediate_size"],
                image_size=vision["image_size"],
                patches=patches,
                positions=patches + (1 if vision.get("model_type") == "clip_vision_model" else 0),
            ),
        )
