"""FLOPs of text, images and answers: they deal samples into equal packs and turn seconds into utilisation.

A multiply-add is two. The language model's matrices cost 2 FLOPs per weight and token forward and 4 backward (2 when
the weights are frozen and only the gradient passes through); attention costs 4 * t^2 / 2 * width per layer and segment
of t tokens, causal. Formulas after "Training compute-optimal large language models" (arXiv 2203.15556, appendix F),
without the embedding look-up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lit_vlm.cost.shape import Shape


@dataclass(frozen=True, slots=True)
class Flops:
    """Cost of one token, one square, one tile and one supervised row, forward and backward together."""

    per_token: float
    per_square: float  # of twice the pairs of tokens that attention looks at: a segment alone has its length squared
    per_tile: float
    per_supervised: float

    def of(self, tokens: Any, squares: Any, tiles: Any, supervised: Any) -> Any:
        """FLOPs of samples: numbers, or arrays of them.

        Args:
            tokens: of all segments.
            squares: see `per_square`.
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
        recomputes: float = 0.0,
        reference: bool = False,
    ) -> Flops:
        """From the `config.json` of a LLaVA-OneVision-class model.

        Args:
            recomputes: share of the layers' forward pass that activation checkpointing does again (`Training.again`). It is
                work that the device does and no work on the data: leave it out of a utilisation, count it for time.
            reference: count the forward pass of a preference stage's reference model as well.
        """
        shape = Shape.from_config(config)
        text, vision = shape.text, shape.vision
        again, frozen = recomputes, int(reference)
        passes = (3 if trains_language_model else 2) + again + frozen
        # of the last layer each token makes a key and a value, the rest is made of supervised rows; its attention, of these
        # rows alone, is not counted
        read_later = text.layer - 2 * text.hidden * text.key if text.pruned else 0
        looking = text.layers - text.pruned
        tower = 2 * vision.layers * vision.layer * vision.patches + 4 * vision.patches**2 * vision.width * vision.layers
        return cls(
            per_token=2.0 * passes * (text.layers * text.layer - read_later),
            per_square=2.0 * (3 + again + frozen) * text.query * looking,
            # what a frozen tower sees serves the reference as well
            per_tile=tower * (3 + again + frozen if trains_tower else 1)
            + 2.0 * (3 + frozen) * vision.patches * shape.projector,
            per_supervised=2.0 * (passes - again) * text.hidden * text.vocab + 2.0 * passes * read_later,
        )
