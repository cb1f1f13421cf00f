"""Preference metrics (rewards, margins, KL), summed over micro-batches and ranks with one all-reduce."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lit_vlm.losses.preference import PreferenceOutput
from lit_vlm.types import Batch, Language, SampleKind

# TRL's metrics, grouped by what each is a mean over.
PAIR_METRICS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)
CHOSEN_TOKEN_METRICS = ("logits/chosen", "mean_token_accuracy")
REJECTED_TOKEN_METRICS = ("logits/rejected",)
TOKEN_METRICS = ("entropy", "kl")
GROUPS = (
    *(language.value for language in Language if language is not Language.auto),
    *(kind.value for kind in SampleKind),
)
GROUP_METRICS = ("rewards/accuracies", "rewards/margins")
METRIC_NAMES = dict.fromkeys(
    (
        "loss",
        *PAIR_METRICS,
        *CHOSEN_TOKEN_METRICS,
        *REJECTED_TOKEN_METRICS,
        *TOKEN_METRICS,
        "drift",
        *(f"{name}_{group}" for group in GROUPS for name in GROUP_METRICS),
    )
).keys()


class PreferenceMetrics:
    """Preference metrics as sums and weights.

    `kl` is the mean KL divergence of policy from reference model at the answers' positions, in nats, over the whole
    vocabulary. It is computed in validation only. `drift` is the mean increase of the log-probability of the chosen answers'
    tokens, in nats per token.
    """

    def __init__(self) -> None:
        self._sums = dict.fromkeys(METRIC_NAMES, (0.0, 0.0))

    def update(self, batch: Batch, lengths: Sequence[int], output: PreferenceOutput, drift: Tensor) -> None:
        """Update the sums with one micro-batch.

        Args:
            lengths: supervised tokens of each of the 2P answers.
            drift: [], summed over the chosen answers' tokens.
        """
        pairs = batch.num_pairs
        chosen, rejected = sum(lengths[:pairs]), sum(lengths[pairs:])
        weights = {
            PAIR_METRICS: pairs,
            CHOSEN_TOKEN_METRICS: chosen,
            REJECTED_TOKEN_METRICS: rejected,
            ("entropy",): chosen + rejected,
        }
        for names, weight in weights.items():
            for name in names:
                self._add(name, output.metrics[name] * weight, weight)
        summed_drift, *rewards = torch.stack([drift, *output.rewards]).tolist()
        self._add("drift", summed_drift, chosen)
        for number, groups in enumerate(zip(batch.languages, batch.kinds, strict=True)):
            margin = rewards[number] - rewards[pairs + number]
            for group in groups:
                self._add(f"rewards/accuracies_{group}", float(margin > 0), 1)
                self._add(f"rewards/margins_{group}", margin, 1)

    def update_kl(self, kl: Tensor, num_tokens: int) -> None:
        """Update the mean KL divergence with its sum over the positions of `num_tokens` tokens."""
        self._add("kl", float(kl), num_tokens)

    def update_loss(self, loss: Tensor, num_pairs: int) -> None:
        """Update the mean loss with a micro-batch of `num_pairs` pairs."""
        self._add("loss", float(loss) * num_pairs, num_pairs)

    def compute(self, reduce: Callable[[Tensor], Tensor], device: torch.device) -> dict[str, float]:
        """Compute the mean of each metric that has a weight, over all ranks, and reset the sums.

        All ranks call it together.

        Args:
            reduce: sums a tensor over the ranks.
        """
        # float32: some devices support no wider type, and no sum of a step needs one
        numbers = torch.tensor(list(self._sums.values()), dtype=torch.float32, device=device)
        self._sums = dict.fromkeys(METRIC_NAMES, (0.0, 0.0))
        totals = reduce(numbers).tolist()
        return {name: total / weight for name, (total, weight) in zip(METRIC_NAMES, totals, strict=True) if weight}

    def _add(self, name: str, value: float, weight: float) -> None:
        total, weights = self._sums[name]
        self._sums[name] = total + value, weights + weight
