"""Preference loss (DPO and relatives): TRL's own code, run on our forward pass.

`lit_vlm/compat/trl.py` calls TRL's code with the scores that we computed, so that an image is encoded once. trl is pinned,
and `test_dpo_loss_gradients_and_metrics_equal_those_of_trl` compares each loss with a real DPOTrainer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lit_vlm.compat import trl
from lit_vlm.config.ranges import find_range_errors
from lit_vlm.config.schema import DPOStageConfig
from lit_vlm.config.stage_validation import LOSS_TYPES, SORTING_LOSS_TYPES, find_preference_loss_errors
from lit_vlm.types import UserError

__all__ = [
    "LOSS_TYPES",
    "SORTING_LOSS_TYPES",
    "AnswerScores",
    "PreferenceLoss",
    "PreferenceOutput",
    "make_answer_mask",
    "pad_answer_scores",
]

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


@dataclass(slots=True)
class PreferenceOutput:
    """Output of the preference loss for one micro-batch."""

    loss: Tensor  # [], this micro-batch's part of the optimizer step's loss
    pair_loss: Tensor | None  # [], the mean over its pairs, without the `sft` term; None: `sft` is the only loss
    rewards: Tensor  # [2P], beta times the log-probability ratio of policy to reference
    metrics: dict[str, float]  # TRL's metrics of this micro-batch


class PreferenceLoss:
    """TRL's preference losses as a function of scores. Names and meanings are those of `trl.DPOConfig`.

    Args:
        loss_type: one or more of `LOSSES`.
        loss_weights: one per loss type; None: 1 each.

    Raises:
        UserError: options that TRL's own trainer refuses, a loss that it does not have, numbers that its formulas
            cannot use.
    """

    def __init__(
        self,
        loss_type: list[str],
        loss_weights: list[float] | None = None,
        *,
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        f_divergence_type: str = "reverse_kl",
        f_alpha_divergence_coef: float = 0.5,
        discopop_tau: float = 0.05,
        ld_alpha: float | None = None,
        use_weighting: bool = False,
    ) -> None:
        weights = loss_weights or [1.0] * len(loss_type)
        options: dict[str, Any] = {
            "beta": beta,
            "label_smoothing": label_smoothing,
            "f_divergence_type": f_divergence_type,
            "f_alpha_divergence_coef": f_alpha_divergence_coef,
            "ld_alpha": ld_alpha,
            "use_weighting": use_weighting,
        }
        stage = DPOStageConfig(
            loss_type=list(loss_type), loss_weights=loss_weights, discopop_tau=discopop_tau, **options
        )
        for error in (*find_range_errors(stage, "stage."), *find_preference_loss_errors(stage)):
            raise UserError(error)
        self.beta, self.loss_type, self.label_smoothing = beta, list(loss_type), label_smoothing
        self.use_weighting = use_weighting
        pair_losses = [(name, weight) for name, weight in zip(loss_type, weights, strict=True) if name != "sft"]
        token_losses = [(name, weight) for name, weight in zip(loss_type, weights, strict=True) if name == "sft"]
        # `sft` is a mean over tokens and the others are means over pairs: TRL computes the two apart, so that
        # several micro-batches add up to the loss of one batch
        self._pair_trainer = trl.make_trainer(pair_losses, discopop_tau, options) if pair_losses else None
        self._token_trainer = trl.make_trainer(token_losses, discopop_tau, options) if token_losses else None
        self.loss_weights = dict(zip(loss_type, weights, strict=True))

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
                loss = part * share if output is None else output.loss + part * share
                output = PreferenceOutput(
                    loss, part.detach() if trainer is self._pair_trainer else None, rewards, metrics
                )
        assert output is not None  # there is at least one loss
        return output

    def compute_loss_at_zero_margin(self) -> float | None:
        """Compute the `pair_loss` that the first step must have, while policy and reference model are equal.

        None where that depends on the data.
        """
        values = {
            "sigmoid": math.log(2),
            "sigmoid_norm": math.log(2),
            "hinge": 1.0,
            "ipo": 1 / (4 * self.beta**2),
            "robust": math.log(2),
            "nca_pair": 2 * math.log(2),
            "bco_pair": 2 * math.log(2),
            "sppo_hard": 0.5 / self.beta**2,
            "aot_unpaired": math.log(2),
            "aot": math.log(2),
            "apo_zero": 1.0,
            "apo_down": 1.0,
            "discopop": 0.5 * math.log(2) + 0.5,
        }
        if "exo_pair" in self.loss_weights:
            smooth = self.label_smoothing
            values["exo_pair"] = math.log(0.5) - 0.5 * (math.log(1 - smooth) + math.log(smooth))
        if self.use_weighting or self._pair_trainer is None:
            return None
        return sum(values[name] * weight for name, weight in self.loss_weights.items() if name != "sft")
