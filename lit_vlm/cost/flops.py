"""FLOPs of samples, used to pack micro-batches of equal work and to convert seconds to utilisation (MFU).

A multiply-add counts as two FLOPs. The language model's matrices cost 2 FLOPs per weight and token in the forward pass
and 4 in the backward pass (2 if the weights are frozen and only the gradient passes through). Causal attention costs
4 * t^2 / 2 * width per layer, for a segment of t tokens. Formulas after "Training compute-optimal large language models"
(arXiv 2203.15556, appendix F), without the embedding look-up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lit_vlm.cost.shape import ModelShape


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
        """Build the costs from the `config.json` of a LLaVA-OneVision-class model.

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
            + 2.0 * (3 + reference_passes) * vision.num_patches * shape.projector_parameters,
            per_supervised=2.0 * (passes - recomputed) * text.hidden_size * text.vocab_size
            + 2.0 * passes * loss_position_weights,
        )
