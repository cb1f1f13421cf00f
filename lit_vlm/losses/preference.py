"""Preference loss (DPO and relatives): TRL's own code, run on our forward pass, and losses that TRL lacks.

`lit_vlm/compat/trl.py` calls TRL's code with the scores that we computed, so that an image is encoded once. trl is pinned,
and `test_dpo_loss_gradients_and_metrics_equal_those_of_trl` compares each loss with a real DPOTrainer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lit_vlm.compat import trl
from lit_vlm.config.ranges import find_range_errors
from lit_vlm.config.schema import DPOStageConfig
from lit_vlm.config.stage_validation import find_preference_loss_errors
from lit_vlm.losses.loss_types import PREFERENCE_LOSSES, PairLogProbs
from lit_vlm.types import UserError

TRL_OPTIONS = (
    "beta",
    "label_smoothing",
    "f_divergence_type",
    "f_alpha_divergence_coef",
    "ld_alpha",
    "use_weighting",
)  # settings that TRL's trainer holds as attributes

# Shapes: P pairs, 2P answers (all chosen ones, then all rejected ones), A longest answer in tokens, R supervised tokens.


@dataclass(slots=True)
class AnswerScores:
    """Scores of each answer's tokens from one forward pass; all [2P, A], zero behind an answer's end."""

    log_probs: Tensor
    entropy: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    aux_loss: Tensor | None = None  # for mixtures of experts, which these models are not


def pad_answer_scores(scores: Sequence[Tensor], lengths: list[int]) -> AnswerScores:
    """Pad scores [R] to [2P, A]: one row for each answer.

    Args:
        scores: [R] each, as `next_token.compute_token_log_probs` returns them with statistics; or only the
            log-probabilities, for a reference model: TRL needs no more of it.
        lengths: supervised tokens of each of the 2P answers; sums to R.
    """
    mask = make_answer_mask(lengths, scores[0].device)

    def pad(values: Tensor) -> Tensor:
        return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)

    return AnswerScores(*(pad(values) for values in scores))


def make_answer_mask(lengths: list[int], device: torch.device) -> Tensor:
    """Make the [2P, A] mask that is True on an answer's own tokens."""
    return torch.arange(max(lengths), device=device)[None] < torch.tensor(lengths, device=device)[:, None]


def compute_kl(logits: Tensor, reference_logits: Tensor) -> Tensor:
    """Compute the KL divergence of policy from reference model over the whole vocabulary, [] nats, summed over positions.

    Args:
        logits, reference_logits: [R, V] at the same positions.
    """
    log_probs, reference = (values.float().log_softmax(-1) for values in (logits, reference_logits))
    return torch.nn.functional.kl_div(reference, log_probs, reduction="sum", log_target=True)


@dataclass(slots=True)
class PreferenceOutput:
    """Output of the preference loss for one micro-batch."""

    loss: Tensor  # [], this micro-batch's part of the optimizer step's loss
    pair_loss: Tensor | None  # [], the mean over its pairs, without the `sft` term; None: `sft` is the only loss
    rewards: Tensor  # [2P], beta times the log-probability ratio of policy to reference
    metrics: dict[str, float]  # TRL's metrics of this micro-batch


class PreferenceLoss:
    """Preference loss as a function of scores: TRL's losses by TRL's code, others by their entry in `PREFERENCE_LOSSES`.

    Args:
        config: settings of the stage. Names and meanings are those of `trl.DPOConfig`.
        settings: or fields of `DPOStageConfig` as keyword arguments: loss_type, loss_weights, beta, label_smoothing, ...

    Raises:
        UserError: settings that TRL's own trainer refuses, an unknown loss, numbers that the formulas cannot use.
    """

    def __init__(self, config: DPOStageConfig | None = None, **settings: Any) -> None:
        self.settings = stage = config or DPOStageConfig(**settings)
        for error in (*find_range_errors(stage, "stage."), *find_preference_loss_errors(stage)):
            raise UserError(error)
        self.loss_weights = dict(zip(stage.loss_type, stage.loss_weights or [1.0] * len(stage.loss_type), strict=True))
        types = {name: PREFERENCE_LOSSES[name] for name in stage.loss_type}
        token_losses = [(name, weight) for name, weight in self.loss_weights.items() if types[name].is_token_mean]
        pair_losses = [(name, weight) for name, weight in self.loss_weights.items() if not types[name].is_token_mean]
        self._own_losses = [(types[name], weight) for name, weight in pair_losses if types[name].compute]
        trl_losses = [(name, weight) for name, weight in pair_losses if not types[name].compute]
        options = {name: getattr(stage, name) for name in TRL_OPTIONS}
        # `sft` is a mean over tokens and the others are means over pairs: TRL computes the two apart, so that
        # several micro-batches add up to the loss of one batch. Without a loss of its own, TRL computes the metrics.
        self._pair_trainer = trl.make_trainer(trl_losses, stage.discopop_tau, options) if pair_losses else None
        self._token_trainer = trl.make_trainer(token_losses, stage.discopop_tau, options) if token_losses else None

    def __call__(
        self,
        policy: AnswerScores,
        reference: AnswerScores,
        lengths: list[int],
        *,
        pair_share: float = 1.0,
        token_share: float = 1.0,
        training: bool = True,
    ) -> PreferenceOutput:
        """Compute the preference loss of one micro-batch.

        Args:
            policy: scores of the 2P answers under the model that trains.
            reference: log-probabilities under the reference model.
            lengths: supervised tokens of each of the 2P answers.
            pair_share: fraction of the optimizer step's pairs that are in this micro-batch.
            token_share: fraction of the optimizer step's tokens of chosen answers that are in this micro-batch.
        """
        mask = make_answer_mask(lengths, policy.log_probs.device)
        output = None
        for trainer, share in ((self._token_trainer, token_share), (self._pair_trainer, pair_share)):
            if trainer is not None:
                part, rewards, metrics = trl.run_loss(trainer, policy, reference, mask, training)
                if trainer is self._pair_trainer and self._own_losses:
                    part = part + self._compute_own_losses(policy, reference)
                loss = part * share if output is None else output.loss + part * share
                output = PreferenceOutput(
                    loss, part.detach() if trainer is self._pair_trainer else None, rewards, metrics
                )
        assert output is not None  # there is at least one loss
        return output

    def _compute_own_losses(self, policy: AnswerScores, reference: AnswerScores) -> Tensor:
        """Compute the weighted sum of the losses that TRL lacks, [], a mean over pairs."""
        sums = [log_prob_sum for scores in (policy, reference) for log_prob_sum in scores.log_probs.sum(dim=1).chunk(2)]
        pairs = PairLogProbs(*sums)
        losses = [(loss.compute, weight) for loss, weight in self._own_losses]
        return torch.stack(
            [weight * compute(pairs, self.settings).mean() for compute, weight in losses if compute]
        ).sum()

    def compute_loss_at_zero_margin(self) -> float | None:
        """Compute the `pair_loss` that the first step must have, while policy and reference model are equal.

        None where that depends on the data.
        """
        if self.settings.use_weighting or self._pair_trainer is None:
            return None
        total = 0.0
        for name, weight in self.loss_weights.items():
            loss = PREFERENCE_LOSSES[name]
            if loss.is_token_mean:
                continue
            if loss.compute_zero_margin is None:
                return None
            total += loss.compute_zero_margin(self.settings) * weight
        return total
