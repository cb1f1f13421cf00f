"""Preference losses are TRL's own code, run on our forward pass.

TRL has no public loss function: all of it lives in `DPOTrainer._compute_loss` (trl 1.16). That method reads a dozen
attributes of its trainer and calls the model once; `PreferenceLoss` supplies those attributes and a "model" that hands
over the scores we computed ourselves, so an image is encoded once and no Trainer, process group or dataset of TRL's
comes into being. trl is pinned, and a contract test holds this adapter against a real DPOTrainer, loss by loss.
"""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from lit_vlm.types import UserError

# Shapes: P pairs, 2P answers (all chosen ones, then all rejected ones), A longest answer in tokens, R supervised rows,
# V vocabulary.

LOSSES = (
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
)
SORTS_THE_BATCH = ("aot", "aot_unpaired")


@dataclass(slots=True)
class AnswerScores:
    """What a forward pass says of each answer's tokens; all [2P, A], zero behind an answer's end."""

    log_probs: Tensor
    entropy: Tensor
    mean_logits: Tensor
    is_top1: Tensor
    log_sum_sq_probs: Tensor
    aux_loss: None = None


def score_answers(logits: Tensor, targets: Tensor, lengths: list[int]) -> AnswerScores:
    """Spread the supervised rows over the answers they belong to.

    Args:
        logits: [R, V] of the supervised rows, answer after answer.
        targets: [R].
        lengths: supervised tokens of each of the 2P answers; sums to R.
    """
    logits = logits.float()
    log_probs = logits.log_softmax(-1)
    probs = log_probs.detach().exp()
    mask = answer_mask(lengths, logits.device)

    def spread(values: Tensor) -> Tensor:
        return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)

    return AnswerScores(
        log_probs=spread(log_probs.gather(-1, targets[:, None]).squeeze(-1)),
        entropy=spread(-(probs * log_probs.detach()).sum(-1)),
        mean_logits=spread(logits.detach().mean(-1)),
        is_top1=spread(logits.detach().argmax(-1) == targets),
        log_sum_sq_probs=spread((2 * log_probs.detach()).logsumexp(-1)),
    )


def answer_mask(lengths: list[int], device: torch.device) -> Tensor:
    """[2P, A]: True on an answer's own tokens."""
    return torch.arange(max(lengths), device=device)[None] < torch.tensor(lengths, device=device)[:, None]


class PreferenceLoss:
    """TRL's preference losses as a function of scores. Names and meanings are those of `trl.DPOConfig`.

    Args:
        loss_type: one or more of `LOSSES`.
        loss_weights: one per loss type; None: 1 each.

    Raises:
        UserError: a name TRL lacks, numbers that its formulas cannot take.
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
        _check(loss_type, weights, beta, label_smoothing)
        self.beta, self.loss_type, self.label_smoothing = beta, list(loss_type), label_smoothing
        self.use_weighting = use_weighting
        options = {
            "beta": beta,
            "label_smoothing": label_smoothing,
            "f_divergence_type": f_divergence_type,
            "f_alpha_divergence_coef": f_alpha_divergence_coef,
            "ld_alpha": ld_alpha,
            "use_weighting": use_weighting,
        }
        pairs = [(name, weight) for name, weight in zip(loss_type, weights, strict=True) if name != "sft"]
        tokens = [(name, weight) for name, weight in zip(loss_type, weights, strict=True) if name == "sft"]
        # `sft` is a mean over tokens and the others are means over pairs: each goes through TRL by itself, so that
        # several micro-batches add up to what one batch would give
        self._by_pairs = _trainer(pairs, discopop_tau, options) if pairs else None
        self._by_tokens = _trainer(tokens, discopop_tau, options) if tokens else None
        self.weights = dict(zip(loss_type, weights, strict=True))

    def __call__(
        self,
        policy: AnswerScores,
        reference: AnswerScores,
        lengths: list[int],
        *,
        pair_share: float = 1.0,
        token_share: float = 1.0,
        training: bool = True,
    ) -> tuple[Tensor, dict[str, float]]:
        """This micro-batch's part of the step's loss, and TRL's metrics of it.

        Args:
            lengths: supervised tokens of each of the 2P answers.
            pair_share: this micro-batch's pairs as a share of the optimizer step's.
            token_share: its chosen answers' tokens, likewise.
        """
        mask = answer_mask(lengths, policy.log_probs.device)
        inputs = _inputs(mask)
        loss = policy.log_probs.new_zeros(())
        metrics: dict[str, float] = {}
        for trainer, share in ((self._by_tokens, token_share), (self._by_pairs, pair_share)):
            if trainer is not None:
                part, metrics = _run(trainer, policy, reference, inputs, training)
                loss = loss + part * share
        return loss, metrics

    def at_margin_zero(self) -> float | None:
        """What the first step's loss must be: policy and reference are one model then. None where it depends on the data."""
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
        if "exo_pair" in self.weights:
            smooth = self.label_smoothing
            values["exo_pair"] = math.log(0.5) - 0.5 * (math.log(1 - smooth) + math.log(smooth))
        if self.use_weighting or any(name not in values for name in self.weights):
            return None
        return sum(values[name] * weight for name, weight in self.weights.items())


def _run(
    trainer: Any, policy: AnswerScores, reference: AnswerScores, inputs: dict, training: bool
) -> tuple[Tensor, dict[str, float]]:
    from trl.trainer.dpo_trainer import DPOTrainer

    trainer.model.training = training
    trainer.accelerator.device = policy.log_probs.device
    trainer.ref_model = lambda **_: reference
    loss = DPOTrainer._compute_loss(trainer, lambda **_: policy, inputs, False)
    recorded = trainer._metrics["train" if training else "eval"]
    metrics = {name: values[-1] for name, values in recorded.items() if name != "num_tokens"}
    recorded.clear()
    return loss, metrics


def _inputs(mask: Tensor) -> dict[str, Tensor]:
    """TRL's batch, cut down to the answers: one position before each, for the token that predicts its first."""
    completion = torch.cat([torch.zeros_like(mask[:, :1]), mask], dim=1).long()
    return {"input_ids": torch.zeros_like(completion), "attention_mask": completion, "completion_mask": completion}


def _trainer(losses: list[tuple[str, float]], discopop_tau: float, options: dict[str, Any]) -> Any:
    """The attributes that `DPOTrainer._compute_loss` of trl 1.16 reads from its trainer."""
    model: Any = nn.Module()
    model.is_gradient_checkpointing = False
    accelerator = SimpleNamespace(
        device=None,
        gather=lambda x: x,
        gather_for_metrics=lambda x: x,
        unwrap_model=lambda m, *_, **__: m,
        autocast=contextlib.nullcontext,
    )
    return SimpleNamespace(
        **options,
        model=model,
        ref_model=None,
        accelerator=accelerator,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None, discopop_tau=discopop_tau),
        aux_loss_enabled=False,
        router_aux_loss_coef=0.0,
        precompute_ref_logps=False,
        loss_types=[name for name, _ in losses],
        loss_weights=[weight for _, weight in losses],
        _metrics={"train": defaultdict(list), "eval": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )


def _check(names: list[str], weights: list[float], beta: float, label_smoothing: float) -> None:
    unknown = [name for name in names if name not in LOSSES]
    if unknown or not names:
        raise UserError(f"stage.loss_type={names}: {', '.join(unknown) or 'empty'}; TRL knows {', '.join(LOSSES)}.")
    if len(weights) != len(names):
        raise UserError(
            f"stage.loss_weights has {len(weights)} numbers for {len(names)} loss types; give one for each."
        )
    if beta <= 0:
        raise UserError(f"stage.beta={beta} must be above 0.")
    if "exo_pair" in names and not 0 < label_smoothing < 0.5:
        raise UserError(
            f"stage.loss_type=exo_pair needs stage.label_smoothing between 0 and 0.5, got {label_smoothing}."
        )
