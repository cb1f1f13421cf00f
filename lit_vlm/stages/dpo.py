"""Stage 4: DPO, preference optimisation of the language model, with TRL's losses and a frozen reference model."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from transformers import LlavaOnevisionForConditionalGeneration

from lit_vlm.config.schema import ModelConfig
from lit_vlm.losses.preference import SORTS_THE_BATCH, Judged, PreferenceLoss, score_answers
from lit_vlm.model.build import Blueprint, build, draw_up
from lit_vlm.model.lora import adapters_off
from lit_vlm.stages.base import Stage
from lit_vlm.stages.passes import folder_for, pass_over
from lit_vlm.stages.reference import ReferenceLogProbs
from lit_vlm.stages.start import ModelLike
from lit_vlm.stages.tally import NAMES, Tally, kl_of
from lit_vlm.types import Batch, Part, UserError, counted

COLLAPSE = -0.7  # nats per token: chosen answers' tokens are half as likely as under the reference model


class DPOStage(Stage):
    """Direct preference optimisation (arXiv 2305.18290) and related losses; names and meanings are TRL's.

    The reference model is the model that the stage starts from: a frozen copy, or, under LoRA, the model with its
    adapters disabled. When `reference` is set it is loaded from that folder. It never comes from a name inside a
    config.

    Args:
        model: the policy to start from; see `Stage`.
        reference: folder of the reference model; None: the policy's initial weights.
        cache_reference: compute the reference model's log-probabilities of all pairs in one pass before training and
            keep them in the data module's store, where other runs find them; no reference model stays in memory then.
        loss_type, loss_weights, beta, ...: see `PreferenceLoss`.
    """

    default_trainable = (Part.language_model,)
    default_learning_rate = 5e-7
    trains_special_rows = False  # under LoRA the reference is the model without adapters; rows are no adapters

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
        cache_reference: bool = False,
        **stage: Any,
    ) -> None:
        loss_options: dict[str, Any] = {
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
        reference_options: dict[str, Any] = {
            "reference": str(reference) if reference else None,
            "cache_reference": cache_reference,
        }
        super().__init__(model, **stage, **loss_options, **reference_options)
        self.loss = PreferenceLoss(**loss_options)
        self.reference: LlavaOnevisionForConditionalGeneration | None = None
        self.kept: ReferenceLogProbs | None = None
        self.tally, self.val_tally = Tally(), Tally()
        self._warned = False

    # ---- the reference

    @property
    def shares_tower(self) -> bool:
        """True when policy and reference model have the same vision tower; it then runs once for both."""
        return self.hparams["reference"] is None and Part.vision_tower not in self.trainable

    def _prepare_training(self) -> None:
        """Make the reference model, then prepare the policy; dropout is disabled."""
        has_lora = any(getattr(options, "lora", None) for options in self.options.parts.values())
        if self.hparams["reference"]:
            spec = draw_up(ModelConfig(special_tokens=[]), self.hparams["reference"], self.tiling)
            self._require_same_words(spec)
            self.reference = build(spec, getattr(torch, self.hparams["dtype"]))
        elif not has_lora and not self.hparams["cache_reference"]:
            self.reference = _copy(self.model, with_tower=not self.shares_tower)
        super()._prepare_training()
        if self.reference is not None:
            self.reference.requires_grad_(False).eval()
        for module in self.model.modules():  # dropout off: only then policy and reference are equal at the first step
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0

    def _require_same_words(self, other: Blueprint) -> None:
        """Require that the reference model has the same vocabulary as the policy.

        Raises:
            UserError: the tokenizers differ.
        """
        tokenizer = getattr(self._given, "tokenizer", None)
        if tokenizer is None or tokenizer.get_vocab() == other.tokenizer.get_vocab():
            return
        different = tokenizer.get_vocab().items() ^ other.tokenizer.get_vocab().items()
        raise UserError(
            f"stage.reference={self.hparams['reference']} has another tokenizer than the model that trains: "
            f"{counted(len(different), 'entry differs', 'entries differ')}, as {sorted(different)[0][0]!r}. Its log-probabilities would be of "
            "other tokens. Name a model of the same vocabulary."
        )

    def prepare(self) -> None:
        """Fill the cache of reference log-probabilities, if it is enabled, and release the reference model."""
        super().prepare()
        if not self.hparams["cache_reference"] or self.kept is not None:
            return
        weights = self.hparams["reference"] or getattr(self._given, "whole", None)
        self.kept = ReferenceLogProbs(folder_for(self.trainer, "reference", weights, dtype=self.hparams["dtype"]))
        pass_over(self.trainer, self.kept, self._keep, self.say)
        self.reference = None

    def _keep(self, batch: Batch) -> None:
        """Compute the reference model's log-probabilities of a batch and store them in the cache."""
        assert self.kept is not None
        with self._as_reference() as reference:
            log_probs, *_ = reference(batch=batch)
        if not batch.blank:
            self.kept.add_batch(batch, log_probs)

    def on_fit_start(self) -> None:
        """Refuse losses that sort the whole batch when it is split into micro-batches."""
        super().on_fit_start()
        micro_batches = self.trainer.accumulate_grad_batches * self.trainer.world_size
        sorting_losses = [name for name in self.hparams["loss_type"] if name in SORTS_THE_BATCH]
        if sorting_losses and micro_batches > 1:
            raise UserError(
                f"stage.loss_type={sorting_losses[0]} sorts the whole batch, and this one is dealt into {micro_batches} micro-batches. "
                "Lower data.global_batch_size, or raise data.tokens_per_micro_batch and data.tiles_per_micro_batch, on one device."
            )

    def set_modes(self) -> None:
        """Set train and eval modes; the reference model is always in eval mode."""
        super().set_modes()
        if self.reference is not None:
            self.reference.eval()

    @contextlib.contextmanager
    def _as_reference(self) -> Iterator[LlavaOnevisionForConditionalGeneration]:
        """Use the reference model inside: the frozen copy, or the policy with its adapters disabled."""
        if self.reference is not None:
            yield self.reference
        else:
            with adapters_off(self.model):
                yield self.model

    def _reference_scores(self, batch: Batch, seen: Tensor) -> Tensor:
        """Compute (or get from the cache) the reference model's log-probabilities [R].

        Args:
            vision_features: output of the policy's vision tower for the batch's tiles.
        """
        if self.kept is not None:
            return self.kept.of(batch) if not batch.blank else seen.new_zeros(1, dtype=torch.float32)
        with torch.no_grad(), self._as_reference() as reference:
            return reference(batch=batch, seen=seen if self.shares_tower else None)[0]

    # ---- training

    def step_loss(self, batch: Batch) -> Tensor:
        """Compute this micro-batch's part of the optimizer step's preference loss, [], and log metrics."""
        loss, output = self._preference(batch, self.tally, training=True)
        if output is not None:
            self._check_first_loss(output)
        self._log_metrics()
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Update the validation metrics.

        At the end of validation, `val/loss`, `val/rewards/accuracies`, ... are means over all pairs.
        """
        loss, _ = self._preference(batch, self.val_tally, training=False)
        if not batch.blank:
            self.val_tally.add_loss(loss, batch.num_pairs)
        return {}

    def on_validation_epoch_end(self) -> None:
        """Log the validation metrics."""
        means = self.val_tally.means(self._sum, self.device)
        for name, value in means.items():
            shown = name in ("loss", "rewards/accuracies")
            self.log(f"val/{name}", value, prog_bar=shown, batch_size=1)

    def _preference(self, batch: Batch, tally: Tally, training: bool) -> tuple[Tensor, Judged | None]:
        """Compute the micro-batch's part of the preference loss, and the loss output (None for a dummy batch)."""
        *scores, vision_features = self.model(batch=batch, statistics=True, seen=self.seen(batch))
        reference_log_probs = self._reference_scores(batch, vision_features)
        if batch.blank:
            return scores[0].sum() * 0.0, None
        lengths = batch.supervised[-2 * batch.num_pairs :]
        num_chosen_tokens = sum(lengths[: batch.num_pairs])
        output = self.loss(
            score_answers(scores, lengths),
            score_answers([reference_log_probs], lengths),
            lengths,
            pair_share=batch.num_pairs / max(1, batch.step_pairs),
            token_share=num_chosen_tokens / max(1, batch.step_chosen_tokens),
            training=training,
        )
        policy_log_probs = scores[0].detach()
        tally.add(
            batch,
            lengths,
            output,
            kl_of(policy_log_probs, reference_log_probs),
            (policy_log_probs - reference_log_probs)[:num_chosen_tokens].sum(),
        )
        return output.loss, output

    def _log_metrics(self) -> None:
        """Log the metrics of a step's pairs over all ranks, if the step is logged.

        Every rank calls it, with a dummy batch too.
        """
        trainer = self._trainer
        if trainer is None:
            return
        is_last = (trainer.fit_loop.epoch_loop.batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if not is_last:
            return
        step = self.global_step + 1
        if step % trainer.log_every_n_steps and step != self._num_steps():
            self.tally = Tally()
            return
        means = self.tally.means(self._sum, self.device)
        for name, value in means.items():
            self.log(f"train/{name}", value, batch_size=1)
        for name in NAMES - means.keys():  # else Lightning would log the value of an earlier step again
            trainer._results.pop(f"training_step.train/{name}", None)
        self._warn_of_collapse(means)

    def _sum(self, numbers: Tensor) -> Tensor:
        return self.trainer.strategy.reduce(numbers, reduce_op="sum")

    def _warn_of_collapse(self, means: dict[str, float]) -> None:
        """Warn when chosen answers become unlikely.

        Preference losses use differences: both answers may become unlikely, the chosen one less so.
        """
        if means.get("drift", 0.0) < COLLAPSE and not self._warned:
            self._warned = True
            rank_zero_warn(
                f"Step {self.global_step + 1:,}: the tokens of chosen answers are {math.exp(-means['drift']):.1f} times less likely than under "
                "the reference. The margin grows because rejected answers fall faster, and the model forgets how to write good ones. Lower "
                "stage.learning_rate, raise stage.beta, or add the chosen answers' own loss: stage.loss_type=[sigmoid,sft]."
            )

    def _check_first_loss(self, judged: Judged) -> None:
        """Check the first loss, which is known because policy and reference model are equal at the first step.

        A different loss means a different reference model.

        Raises:
            UserError: the loss differs from its value at margin zero.
        """
        expected = self.loss.at_margin_zero()
        if self.global_step or expected is None or judged.pair_loss is None or self.hparams["reference"]:
            return
        actual = float(judged.pair_loss)
        is_float32 = self.hparams["dtype"] == "float32" and not torch.is_autocast_enabled(self.device.type)
        # cached values were computed with other pairs in the batch: sums over long answers are rounded differently
        tolerance = (1e-5 if is_float32 else 2e-2) if self.kept is None else (1e-3 if is_float32 else 1e-1)
        if abs(actual - expected) > tolerance * max(1.0, abs(expected)):
            raise UserError(
                f"The first preference loss is {actual:.6f}; policy and reference are the same model, so it must be {expected:.6f} "
                f"({', '.join(self.hparams['loss_type'])} at margin zero). Something makes them differ: dropout, or a changed model."
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave a reference model that has a folder of its own out of the checkpoint."""
        super().on_save_checkpoint(checkpoint)
        if self.hparams["reference"]:  # it is loaded again from its folder
            for name in [name for name in checkpoint["state_dict"] if name.startswith("reference.")]:
                del checkpoint["state_dict"][name]
            self.strict_loading = False


def _copy(model: LlavaOnevisionForConditionalGeneration, *, with_tower: bool) -> LlavaOnevisionForConditionalGeneration:
    """Copy the model; without the vision tower where policy and reference model share it."""
    tower = model.model.vision_tower
    if with_tower:
        return copy.deepcopy(model)
    model.model.vision_tower = None
    try:
        return copy.deepcopy(model)
    finally:
        model.model.vision_tower = tower
