"""Cache of the reference model's log-probabilities for a preference stage's answers.

They depend on nothing that a sweep over the loss varies. The log-probability of each token is kept in float32, so that
every loss can be computed from them.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from lit_vlm.stages.kept import RecordCache
from lit_vlm.types import Batch


class ReferenceLogProbCache(RecordCache):
    """Disk cache of reference log-probabilities [tokens]: of each pair's chosen answer, then of its rejected one."""

    def __init__(self, folder: Path | None) -> None:
        super().__init__(folder, "the kept log-probabilities of the reference", "stage.cache_reference")

    def add_batch(self, batch: Batch, log_probs: Tensor) -> None:
        """Add log-probabilities [R] in the order of the batch's row."""
        answers = log_probs.float().split(batch.segment_supervised_tokens[-2 * batch.num_pairs :])
        for number, record in enumerate(zip(batch.record_keys, batch.image_hashes, strict=True)):
            pair = answers[number], answers[batch.num_pairs + number]
            self.add(*record, list(map(len, pair)), torch.cat(pair))

    def get(self, batch: Batch) -> Tensor:
        """Get log-probabilities [R] in the order of the batch's row."""
        chosen, rejected = [], []
        for number in range(batch.num_pairs):
            counts = [
                batch.segment_supervised_tokens[number - 2 * batch.num_pairs],
                batch.segment_supervised_tokens[number - batch.num_pairs],
            ]
            chosen_log_probs, rejected_log_probs = self.get_rows(batch, number, counts).split(counts)
            chosen.append(chosen_log_probs)
            rejected.append(rejected_log_probs)
        return torch.cat([*chosen, *rejected]).to(batch.input_ids.device)
