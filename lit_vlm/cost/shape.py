"""The sizes of a LLaVA-OneVision-class model that its cost follows from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# Families whose last layer is computed only where its result is read (`model/last_layer.py`).
PRUNED = ("qwen2", "qwen3", "llama", "mistral", "granite", "hyperclovax")


@dataclass(frozen=True, slots=True)
class TextShape:
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
        """Width of all key heads; that of the values is the same."""
        return self.kv_heads * self.head_dim

    @property
    def layer(self) -> int:
        """Weights of one layer's matrices: queries, keys, values, output, gate, up, down."""
        return 2 * self.hidden * (self.query + self.key) + 3 * self.hidden * self.ffn


@dataclass(frozen=True, slots=True)
class VisionShape:
    layers: int
    width: int
    ffn: int
    image_size: int
    patches: int  # of a tile
    positions: int  # of a tile in the tower: its patches, and CLIP's class token

    @property
    def layer(self) -> int:
        """Weights of one layer's matrices."""
        return 4 * self.width**2 + 2 * self.width * self.ffn


@dataclass(frozen=True, slots=True)
class Shape:
    text: TextShape
    vision: VisionShape

    @property
    def projector(self) -> int:
        """Weights of its two matrices."""
        return self.vision.width * self.text.hidden + self.text.hidden**2

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Shape:
        """From the `config.json` of a LLaVA-OneVision-class model."""
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
