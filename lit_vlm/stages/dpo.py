"""Stage 4: preference optimisation of the language model, with TRL's losses."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchmetrics import MeanMetric
from transformers import LlavaOnevisionForConditionalGeneration

from lit_vlm.config.schema import ModelConfig
from lit_vlm.losses.preference import SORTS_THE_BATCH, AnswerScores, PreferenceLoss, score_answers
from lit_vlm.model.build import build, draw_up
from lit_vlm.model.forward import row_segments
from lit_vlm.model.lora import adapters_off
from lit_vlm.stages.base import ModelLike, Stage
from lit_vlm.types import Batch, Part, UserError


class DPOStage(Stage):
    """Direct preference optimisation (arXiv 2305.18290) and its relatives; names and meanings are TRL's.

    The reference is the model that the stage starts from: a frozen copy, or, under LoRA, the model with its adapters
    off. It comes from `reference` when that names another folder, and never from a name inside a config.

    Args:
        model: the policy to start from; see `Stage`.
        reference: folder of the reference model; None: what the policy starts as.
        loss_type, loss_weights, beta, ...: see `PreferenceLoss`.
    """

    default_trainable = (Part.language_model,)
    default_learning_rate = 5e-7
    trains_special_rows = False  # under LoRA the reference is the model without its adapters, and these are none

    def __init__(
        self,
        model: ModelLike | None = None,
        *,
        beta: float = 0.1,
        loss_type: Sequence[str] = ("sigmoid",),
        loss_weights: Sequence[float] | None = None,
        label_smoothing: float = 0.0,
        f_divergence_type: str = "reverse_kl",
        f_alpha_divergence_coef: float = 0.5,
        discopop_tau: float = 0.05,
        ld_alpha: float | None = None,
        use_weighting: bool = False,
        reference: str | Path | None = None,
        **stage: Any,
    ) -> None:
        own: dict[str, Any] = {
            "beta": beta,
            "loss_type": list(loss_type),
            "loss_weights": list(loss_weights) if loss_weights else None,
            "label_smoothing": label_smoothing,
            "f_divergence_type": f_divergence_type,
            "f_alpha_divergence_coef": f_alpha_divergence_coef,
            "discopop_tau": discopop_tau,
            "ld_alpha": ld_alpha,
            "use_weighting": use_weighting,
        }
        super().__init__(model, **stage, **own, reference=str(reference) if reference else None)
        self.loss = PreferenceLoss(**own)
        self.reference: LlavaOnevisionForConditionalGeneration | None = None
        self.val_accuracy, self.val_margin = MeanMetric(), MeanMetric()

    def _prepare_training(self) -> None:
        lora = any(getattr(options, "lora", None) for options in self.options.parts.values())
        if self.hparams["reference"]:
            blueprint = draw_up(ModelConfig(special_tokens=[]), self.hparams["reference"], self.tiling)
            self.reference = build(blueprint, getattr(torch, self.hparams["dtype"]))
        elif not lora:
            self.reference = copy.deepcopy(self.model)
        super()._prepare_training()
        if self.reference is not None:
            self.reference.requires_grad_(False).eval()
        for module in self.model.modules():  # the first loss is that of margin zero only when both see the same network
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0

    def set_modes(self) -> None:
        super().set_modes()
        if self.reference is not None:
            self.reference.eval()

    def on_fit_start(self) -> None:
        super().on_fit_start()
        micro_batches = self.trainer.accumulate_grad_batches * self.trainer.world_size
        sorting = [name for name in self.hparams["loss_type"] if name in SORTS_THE_BATCH]
        if sorting and micro_batches > 1:
            raise UserError(
                f"stage.loss_type={sorting[0]} sorts the whole batch, and this one is dealt into {micro_batches} micro-batches. "
                "Lower data.global_batch_size, or raise data.tokens_per_micro_batch and data.tiles_per_micro_batch, on one device."
            )

    def step_loss(self, batch: Batch) -> Tensor:
        loss, metrics = self._preference(batch, training=True)
        if batch.blank:
            return loss
        self._check_first_loss(loss, batch)
        for name, value in metrics.items():
            # of this rank's pairs; the val/ metrics cover all ranks
            self.log(f"train/{name}", value, batch_size=batch.num_pairs)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Logs `val/loss`, `val/rewards/accuracies` and `val/rewards/margins`, each a mean over pairs."""
        loss, metrics = self._preference(batch, training=False)
        known = {
            "val/loss": self.val_loss,
            "val/rewards/accuracies": self.val_accuracy,
            "val/rewards/margins": self.val_margin,
        }
        # on a blank batch too: other ranks wait for this one when metrics are gathered
        for name, metric in known.items():
            self.log(name, metric, on_epoch=True, on_step=False, prog_bar=name != "val/rewards/margins", batch_size=1)
        if not batch.blank:
            self.val_loss.update(loss, weight=batch.num_pairs)
            self.val_accuracy.update(metrics["rewards/accuracies"], weight=batch.num_pairs)
            self.val_margin.update(metrics["rewards/margins"], weight=batch.num_pairs)
        return {}

    def _preference(self, batch: Batch, training: bool) -> tuple[Tensor, dict[str, float]]:
        policy, lengths = self._scores(self.model, batch)
        with torch.no_grad(), self._as_reference() as reference:
            frozen, _ = self._scores(reference, batch)
        if batch.blank:
            return policy.log_probs.sum() * 0.0, {}
        chosen = sum(lengths[: batch.num_pairs])
        return self.loss(
            policy,
            frozen,
            lengths,
            pair_share=batch.num_pairs / max(1, batch.step_pairs),
            token_share=chosen / max(1, batch.step_chosen_tokens),
            training=training,
        )

    def _scores(self, model: LlavaOnevisionForConditionalGeneration, batch: Batch) -> tuple[AnswerScores, list[int]]:
        logits, targets = model(batch=batch)
        if batch.blank:
            return score_answers(logits, targets, [1]), [1]
        counts = torch.bincount(row_segments(batch.labels, batch.cu_seqlens), minlength=len(batch.lengths)).tolist()
        return score_answers(logits, targets, counts), counts

    @contextlib.contextmanager
    def _as_reference(self):
        if self.reference is not None:
            yield self.reference
        else:
            with adapters_off(self.model):
                yield self.model

    def _check_first_loss(self, loss: Tensor, batch: Batch) -> None:
        """Policy and reference are one model at the first step, so its loss is known. Another one means another reference."""
        expected = self.loss.at_margin_zero()
        if self.global_step or expected is None or self.hparams["reference"]:
            return
        got = float(loss.detach()) * batch.step_pairs / batch.num_pairs
        tolerance = 1e-5 if loss.dtype == torch.float32 and self.hparams["dtype"] == "float32" else 2e-2
        if abs(got - expected) > tolerance * max(1.0, abs(expected)):
            raise UserError(
                f"The first preference loss is {got:.6f}; policy and reference are the same model, so it must be {expected:.6f} "
                f"({', '.join(self.hparams['loss_type'])} at margin zero). Something makes them differ: dropout, or a changed model."
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self.hparams["reference"]:  # it is read again from its folder
            for name in [name for name in checkpoint["state_dict"] if name.startswith("reference.")]:
                del checkpoint["state_dict"][name]
            self.strict_loading = False
