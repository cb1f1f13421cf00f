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
RANKING_METRICS = ("ranking_accuracy", "reference_ranking_accuracy")
GROUPS = (
    *(language.value for language in Language if language is not Language.auto),
    *(kind.value for kind in SampleKind),
)
GROUP_METRICS = ("rewards/accuracies", "rewards/margins", *RANKING_METRICS)
METRIC_NAMES = dict.fromkeys(
    (
        "loss",
        *PAIR_METRICS,
        *CHOSEN_TOKEN_METRICS,
        *REJECTED_TOKEN_METRICS,
        *TOKEN_METRICS,
        *RANKING_METRICS,
        "drift",
        *(f"{name}_{group}" for group in GROUPS for name in GROUP_METRICS),
    )
).keys()


class PreferenceMetrics:
    """Preference metrics as sums and weights.

    `kl` is the mean KL divergence of policy from reference model at the answers' positions, in nats, over the whole
    vocabulary. It is computed in validation only. `drift` is the mean increase of the log-probability of the chosen answers'
    tokens, in nats per token. `ranking_accuracy` is the share of pairs whose chosen answer has the higher log-probability under the
    policy (arXiv 2405.19534), and `reference_ranking_accuracy` under the reference model, so what the stage started from.
    """

    def __init__(self) -> None:
        self._sums = dict.fromkeys(METRIC_NAMES, (0.0, 0.0))

    def update(
        self,
        batch: Batch,
        lengths: Sequence[int],
        output: PreferenceOutput,
        log_probs: Tensor,
        reference_log_probs: Tensor,
    ) -> None:
        """Update the sums with one micro-batch.

        Args:
            lengths: supervised tokens of each of the 2P answers.
            log_probs, reference_log_probs: [R] of the answers' tokens, under the policy and under the reference model.
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
        answers = [scores.detach().float().split(list(lengths)) for scores in (log_probs, reference_log_probs)]
        sums = [torch.stack([answer.sum() for answer in scores]) for scores in answers]  # [2P] each
        numbers = torch.stack([*sums, output.rewards.float()]).unflatten(1, (2, pairs))  # [3, 2, P]
        (policy_chosen, _), (reference_chosen, _), _ = numbers.sum(dim=2).tolist()
        self._add("drift", policy_chosen - reference_chosen, chosen)
        margins = (numbers[:, 0] - numbers[:, 1]).T.tolist()  # of each pair
        for (policy, reference, reward), *groups in zip(margins, batch.languages, batch.kinds, strict=True):
            values = (float(reward > 0), reward, float(policy > 0), float(reference > 0))
            for name, value in zip(RANKING_METRICS, values[2:], strict=True):
                self._add(name, value, 1)
            for group in groups:
                for name, value in zip(GROUP_METRICS, values, strict=True):
                    self._add(f"{name}_{group}", value, 1)

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
