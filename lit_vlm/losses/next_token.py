"""Next-token cross-entropy on the rows that are supervised, and on no others."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

# Shapes: R supervised rows, V vocabulary.


def next_token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Loss of each row in nats.

    Not averaged: micro-batches and ranks hold different numbers of supervised tokens, so the stage divides the sum
    once, by the count over the whole optimizer step. A mean of means would overweight short answers.

    Args:
        logits: [R, V], any float dtype; the loss is taken in float32.
        targets: [R].

    Returns:
        [R] float32.
    """
    return F.cross_entropy(logits.float(), targets, reduction="none")
