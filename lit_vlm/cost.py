"""FLOPs of text, images and answers: they deal samples into equal packs and turn seconds into utilisation.

A multiply-add is two. The language model's matrices cost 2 FLOPs per weight and token forward and 4 backward (2 when
the weights are frozen and only the gradient passes through); attention costs 4 * t^2 / 2 * width per layer and segment
of t tokens, causal. Formulas after "Training compute-optimal large language models" (arXiv 2203.15556, appendix F),
without the embedding look-up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Flops:
    """Cost of one token, one squared segment length, one tile and one supervised row, forward and backward together."""

    per_token: float
    per_square: float  # per squared segment length
    per_tile: float
    per_supervised: float

    def of(self, lengths: tuple[int, ...], num_tiles: int, num_supervised: int) -> float:
        squares = sum(length * length for length in lengths)
        return (
            self.per_token * sum(lengths)
            + self.per_square * squares
            + self.per_tile * num_tiles
            + self.per_supervised * num_supervised
        )

    @classmethod
    def from_config(cls, config: dict[str, Any], *, trains_tower: bool, trains_language_model: bool) -> Flops:
        """From the `config.json` of a LLaVA-OneVision-class model."""
        text, vision = config["text_config"], config["vision_config"]
        hidden, layers = text["hidden_size"], text["num_hidden_layers"]
        heads = text["num_attention_heads"]
        head_dim = text.get("head_dim") or hidden // heads
        kv_heads = text.get("num_key_value_heads") or heads
        weights = layers * (2 * hidden * head_dim * (heads + kv_heads) + 3 * hidden * text["intermediate_size"])
        passes = 3 if trains_language_model else 2
        patches = (vision["image_size"] // vision["patch_size"]) ** 2
        width, depth = vision["hidden_size"], vision["num_hidden_layers"]
        tower_weights = depth * (4 * width * width + 2 * width * vision["intermediate_size"])
        tower = 2 * tower_weights * patches + 4 * patches**2 * width * depth
        projector = 2 * patches * (width * hidden + hidden * hidden)
        return cls(
            per_token=2.0 * passes * weights,
            per_square=2.0 * 3 * heads * head_dim * layers,
            per_tile=tower * (3 if trains_tower else 1) + 3.0 * projector,
            per_supervised=2.0 * passes * hidden * text["vocab_size"],
        )
