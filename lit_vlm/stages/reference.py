"""The reference's log-probabilities of a preference stage's answers.

They depend on nothing that a sweep of the loss varies. Each answer's tokens are kept one by one in float32, so that every
loss can be had from them.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from lit_vlm.stages.kept import Kept
from lit_vlm.types import Batch


class ReferenceLogProbs(Kept):
    """Log-probabilities [tokens] of each pair's chosen answer, then of its rejected one."""

    def __init__(self, folder: Path | None) -> None:
        super().__init__(folder, "the kept log-probabilities of the reference", "stage.cache_reference")

    def add_batch(self, batch: Batch, log_probs: Tensor) -> None:
        """[R] along the batch's row."""
        answers = log_probs.float().split(batch.supervised[-2 * batch.num_pairs :])
        for number, record in enumerate(zip(batch.keys, batch.contents, strict=True)):
            both = answers[number], answers[batch.num_pairs + number]
            self.add(*record, list(map(len, both)), torch.cat(both))

    def of(self, batch: Batch) -> Tensor:
        """[R] along the batch's row."""
        chosen, rejected = [], []
        for number in range(batch.num_pairs):
            counts = [batch.supervised[number - 2 * batch.num_pairs], batch.supervised[number - batch.num_pairs]]
            good, bad = self.rows(batch, number, counts).split(counts)
            chosen.append(good)
            rejected.append(bad)
        return torch.cat([*chosen, *rejected]).to(batch.input_ids.device)
