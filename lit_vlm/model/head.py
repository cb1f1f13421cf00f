"""The language-model head, which in training says how likely given tokens are instead of writing all logits down."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lit_vlm.losses.next_token import score_tokens

if TYPE_CHECKING:
    from lit_vlm.model.vocabulary import NewTokens

# Shapes: R rows, D width, V words.


class ScoringHead(nn.Linear):
    """transformers' `lm_head` with one more way through: with `targets` it says how likely they are.

    Attributes:
        new_tokens: rows that stand in for some of the matrix's; see `NewTokens`.
    """

    def forward(self, hidden: Tensor, targets: Tensor | None = None, statistics: bool = False) -> Any:
        """Logits [..., V] of hidden [..., D], or with targets [R] what `score_tokens` returns for hidden [R, D]."""
        if targets is None:
            return super().forward(hidden)
        new_tokens: NewTokens | None = getattr(self, "new_tokens", None)
        if new_tokens is None:
            return score_tokens(hidden, self.weight, targets, statistics=statistics)
        return new_tokens.score(hidden, self.weight, targets, statistics)
