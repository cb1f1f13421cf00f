"""Language-model head that computes log-probabilities of given tokens in training, without writing down all logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lit_vlm.losses.next_token import compute_token_log_probs

if TYPE_CHECKING:
    from lit_vlm.model.vocabulary import TrainableTokens

# Shapes: R positions, D width, V vocabulary size.


class LogProbHead(nn.Linear):
    """`lm_head` of transformers that, called with `targets`, returns their log-probabilities (negative cross-entropy).

    Attributes:
        new_tokens: trainable rows that replace some rows of the matrix; see `TrainableTokens`.
    """

    def forward(self, hidden: Tensor, targets: Tensor | None = None, statistics: bool = False) -> Any:
        """Return logits [..., V] of hidden [..., D], or with targets [R] the token log-probabilities.

        Those are the result of `compute_token_log_probs` for hidden [R, D].
        """
        if targets is None:
            return super().forward(hidden)
        new_tokens: TrainableTokens | None = getattr(self, "new_tokens", None)
        if new_tokens is None:
            return compute_token_log_probs(hidden, self.weight, targets, statistics=statistics)
        return new_tokens.compute_log_probs(hidden, self.weight, targets, statistics)
