"""Stage 4: DPO, preference optimisation of the language model, with TRL's losses and a frozen reference model."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lit_vlm.compat.lightning import discard_logged_value, get_trainer, is_last_micro_step
from lit_vlm.config.choices import StageName
from lit_vlm.config.schema import DPOStageConfig, ModelConfig
from lit_vlm.formatting import format_count
from lit_vlm.losses.loss_types import find_sorting_losses
from lit_vlm.losses.preference import PreferenceLoss, PreferenceOutput, compute_kl, pad_answer_scores
from lit_vlm.model.build import build_model
from lit_vlm.model.lora import disable_adapters
from lit_vlm.model.spec import ModelSpec, load_model_spec
from lit_vlm.model.trained_parts import copy_reference_model, disable_dropout
from lit_vlm.stages.base import Stage
from lit_vlm.stages.caches import ReferenceLogProbCache, fill_cache, get_cache_folder
from lit_vlm.stages.model_init import ModelLike
from lit_vlm.stages.preference_metrics import METRIC_NAMES, PreferenceMetrics
from lit_vlm.types import Batch, ModelPart, UserError

if TYPE_CHECKING:
    from lit_vlm.model.classes import VisionLanguageModel

KL_CHUNK_TOKENS = 512  # positions whose logits over the vocabulary exist at a time, of both models, in float32
COLLAPSE = -0.7  # nats per token: chosen answers' tokens are half as likely as under the reference model


class DPOStage(Stage):
    """Direct preference optimisation (arXiv 2305.18290) and related losses; names and meanings are TRL's.

    The reference model is the model that the stage starts from: a frozen copy, or, under LoRA, the model with its
    adapters disabled. When `reference` is set it is loaded from that folder. It never comes from a name inside a
    config.

    Args:
        model: the policy to start from.
        config: settings; None: `arguments`.
        arguments: as of `Stage`, with the fields of `DPOStageConfig` (`beta`, `loss_type`, `reference`, ...).
    """

    name = StageName.dpo
    config_class = DPOStageConfig
    config: DPOStageConfig
    default_trainable = (ModelPart.language_model,)
    default_learning_rate = 5e-7

    def __init__(
        self,
        model: ModelLike | None = None,
        config: DPOStageConfig | None = None,
        **arguments: Any,
    ) -> None:
        super().__init__(model, config, **arguments)
        self.loss = PreferenceLoss(self.config)
        self.reference: VisionLanguageModel | None = None
        self.reference_cache: ReferenceLogProbCache | None = None
        self.train_metrics, self.val_metrics = PreferenceMetrics(), PreferenceMetrics()
        self._collapse_warned = False

    # ---- the reference

    @property
    def shares_tower(self) -> bool:
        """True when policy and reference model have the same vision tower; it then runs once for both."""
        return self.config.reference is None and ModelPart.vision_tower not in self.trainable

    def _prepare_training(self) -> None:
        """Make the reference model, then prepare the policy; dropout is disabled."""
        if self.config.reference:
            spec = load_model_spec(ModelConfig(special_tokens=[]), self.config.reference, self.tiling)
            self._require_same_vocabulary(spec)
            self.reference = build_model(spec, getattr(torch, self.hparams["dtype"]))
        else:
            assert self.model is not None
            self.reference = copy_reference_model(self.model, self.config)
        super()._prepare_training()
        assert self.model is not None
        if self.reference is not None:
            self.reference.requires_grad_(False).eval()
        disable_dropout(self.model)  # only then policy and reference are equal at the first step

    def _require_same_vocabulary(self, other: ModelSpec) -> None:
        """Require that the reference model has the same vocabulary as the policy.

        Raises:
            UserError: the tokenizers differ.
        """
        tokenizer = getattr(self._model_source, "tokenizer", None)
        if tokenizer is None or tokenizer.get_vocab() == other.tokenizer.get_vocab():
            return
        different = tokenizer.get_vocab().items() ^ other.tokenizer.get_vocab().items()
        raise UserError(
            f"stage.reference={self.hparams['reference']} has another tokenizer than the model that trains: "
            f"{format_count(len(different), 'entry differs', 'entries differ')}, as {sorted(different)[0][0]!r}. Its log-probabilities would be of "
            "other tokens. Name a model of the same vocabulary."
        )

    def prepare(self) -> None:
        """Fill the cache of reference log-probabilities, if it is enabled, and release the reference model."""
        super().prepare()
        if not self.config.cache_reference or self.reference_cache is not None:
            return
        weights = self.config.reference or getattr(self._model_source, "whole", None)
        self.reference_cache = ReferenceLogProbCache(
            get_cache_folder(self.trainer, "reference", weights, dtype=self.hparams["dtype"])
        )
        fill_cache(self.trainer, self.reference_cache, self._store_reference_log_probs, self.say)
        self.say("val/kl is not computed with stage.cache_reference=true, which keeps no logits of the reference model")
        self.reference = None

    def _store_reference_log_probs(self, batch: Batch) -> None:
        """Compute the reference model's log-probabilities of a batch and store them in the cache."""
        assert self.reference_cache is not None
        with self._use_reference() as reference:
            log_probs, *_ = reference(batch=batch)
        if not batch.dummy:
            self.reference_cache.add_batch(batch, log_probs)

    def on_fit_start(self) -> None:
        """Refuse losses that sort the whole batch when it is split into micro-batches."""
        super().on_fit_start()
        micro_batches = self.trainer.accumulate_grad_batches * self.trainer.world_size
        sorting_losses = find_sorting_losses(self.config.loss_type)
        if sorting_losses and micro_batches > 1:
            raise UserError(
                f"stage.loss_type={sorting_losses[0]} sorts the whole batch, and this one is split into {micro_batches} micro-batches. "
                "Lower data.global_batch_size, or raise data.tokens_per_micro_batch and data.tiles_per_micro_batch, on one device."
            )

    def set_train_modes(self) -> None:
        """Set train and eval modes; the reference model is always in eval mode."""
        super().set_train_modes()
        if self.reference is not None:
            self.reference.eval()

    @contextlib.contextmanager
    def _use_reference(self) -> Iterator[VisionLanguageModel]:
        """Use the reference model inside: the frozen copy, or the policy with its adapters disabled."""
        if self.reference is not None:
            yield self.reference
        else:
            assert self.model is not None
            with disable_adapters(self.model):
                yield self.model

    def _compute_reference(self, batch: Batch, vision_features: Tensor) -> tuple[Tensor, Tensor | None]:
        """Compute the reference model's log-probabilities [R] and hidden states [R, D], or get the former from the cache.

        Args:
            vision_features: output of the policy's vision tower for the batch's tiles.
        """
        if self.reference_cache is not None:
            if batch.dummy:
                return vision_features.new_zeros(1, dtype=torch.float32), None
            return self.reference_cache.get(batch), None
        features = vision_features if self.shares_tower else None
        with torch.no_grad(), self._use_reference() as reference:
            log_probs, hidden = reference(batch=batch, vision_features=features, return_hidden=True)
        return log_probs, hidden

    # ---- training

    def compute_loss(self, batch: Batch) -> Tensor:
        """Compute this micro-batch's part of the optimizer step's preference loss, [], and log metrics."""
        loss, output = self._compute_preference(batch, self.train_metrics, training=True)
        if output is not None:
            self._check_first_loss(output)
        self._log_metrics()
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Update the validation metrics.

        At the end of validation, `val/loss`, `val/rewards/accuracies`, ... are means over all pairs.
        """
        loss, _ = self._compute_preference(batch, self.val_metrics, training=False)
        if not batch.dummy:
            self.val_metrics.update_loss(loss, batch.num_pairs)
        return {}

    def on_validation_epoch_end(self) -> None:
        """Log the validation metrics."""
        means = self.val_metrics.compute(self._sum_over_ranks, self.device)
        for name, value in means.items():
            shown = name in ("loss", "rewards/accuracies")
            self.log(f"val/{name}", value, prog_bar=shown, batch_size=1)

    def _compute_preference(
        self, batch: Batch, metrics: PreferenceMetrics, training: bool
    ) -> tuple[Tensor, PreferenceOutput | None]:
        """Compute the micro-batch's part of the preference loss, and the loss output (None for a dummy batch)."""
        assert self.model is not None
        *scores, vision_features, hidden = self.model(
            batch=batch, statistics=True, return_hidden=True, vision_features=self.get_vision_features(batch)
        )
        reference_log_probs, reference_hidden = self._compute_reference(batch, vision_features)
        if not training and reference_hidden is not None:
            self._update_kl(metrics, hidden, reference_hidden, 0 if batch.dummy else len(batch.loss_positions))
        if batch.dummy:
            return scores[0].sum() * 0.0, None
        lengths = batch.segment_supervised_tokens[-2 * batch.num_pairs :]
        num_chosen_tokens = sum(lengths[: batch.num_pairs])
        output = self.loss(
            pad_answer_scores(scores, lengths),
            pad_answer_scores([reference_log_probs], lengths),
            lengths,
            pair_share=batch.num_pairs / max(1, batch.step_pairs),
            token_share=num_chosen_tokens / max(1, batch.step_chosen_tokens),
            training=training,
        )
        metrics.update(batch, lengths, output, scores[0], reference_log_probs)
        return output.loss, output

    @torch.no_grad()
    def _update_kl(self, metrics: PreferenceMetrics, hidden: Tensor, reference_hidden: Tensor, num_tokens: int) -> None:
        """Update the KL divergence with the first `num_tokens` positions of a micro-batch, in chunks.

        The matrices of the heads may be sharded over the ranks, so all ranks call the heads equally often.

        Args:
            hidden, reference_hidden: [R, D] hidden states that the two heads read.
        """
        assert self.model is not None
        num_chunks = math.ceil(num_tokens / KL_CHUNK_TOKENS)
        all_chunks = self.all_gather(torch.tensor(num_chunks, device=self.device))  # of each rank
        for number in range(int(all_chunks.max())):
            start = number * KL_CHUNK_TOKENS
            rows = slice(start, start + KL_CHUNK_TOKENS) if number < num_chunks else slice(0, 1)
            logits = self.model(hidden=hidden[rows])
            with self._use_reference() as reference:
                reference_logits = reference(hidden=reference_hidden[rows])
            if number < num_chunks:
                metrics.update_kl(compute_kl(logits, reference_logits), len(logits))

    def _log_metrics(self) -> None:
        """Log the metrics of a step's pairs over all ranks, if the step is logged.

        Every rank calls it, with a dummy batch too.
        """
        trainer = get_trainer(self)
        if trainer is None:
            return
        if not is_last_micro_step(trainer):
            return
        step = self.global_step + 1
        if step % trainer.log_every_n_steps and step != self._count_steps():
            self.train_metrics = PreferenceMetrics()
            return
        means = self.train_metrics.compute(self._sum_over_ranks, self.device)
        for name, value in means.items():
            self.log(f"train/{name}", value, batch_size=1)
        for name in METRIC_NAMES - means.keys():  # else Lightning would log the value of an earlier step again
            discard_logged_value(trainer, f"train/{name}")
        self._warn_about_collapse(means)

    def _sum_over_ranks(self, numbers: Tensor) -> Tensor:
        return self.trainer.strategy.reduce(numbers, reduce_op="sum")

    def _warn_about_collapse(self, means: dict[str, float]) -> None:
        """Warn when chosen answers become unlikely.

        Preference losses use differences: both answers may become unlikely, the chosen one less so.
        """
        if means.get("drift", 0.0) < COLLAPSE and not self._collapse_warned:
            self._collapse_warned = True
            rank_zero_warn(
                f"Step {self.global_step + 1:,}: the tokens of chosen answers are {math.exp(-means['drift']):.1f} times less likely than under "
                "the reference. The margin grows because rejected answers fall faster, and the model forgets how to write good ones. Lower "
                "stage.learning_rate, raise stage.beta, or add the chosen answers' own loss: stage.loss_type=[sigmoid,sft]."
            )

    def _check_first_loss(self, output: PreferenceOutput) -> None:
        """Check the first loss, which is known because policy and reference model are equal at the first step.

        A different loss means a different reference model.

        Raises:
            UserError: the loss differs from its value at margin zero.
        """
        expected = self.loss.compute_loss_at_zero_margin()
        if self.global_step or expected is None or output.pair_loss is None or self.config.reference:
            return
        actual = float(output.pair_loss)
        is_float32 = self.hparams["dtype"] == "float32" and not torch.is_autocast_enabled(self.device.type)
        # cached values were computed with other pairs in the batch: sums over long answers are rounded differently
        tolerance = (1e-5 if is_float32 else 2e-2) if self.reference_cache is None else (1e-3 if is_float32 else 1e-1)
        if abs(actual - expected) > tolerance * max(1.0, abs(expected)):
            raise UserError(
                f"The first preference loss is {actual:.6f}; policy and reference are the same model, so it must be {expected:.6f} "
                f"({', '.join(self.hparams['loss_type'])} at margin zero). Something makes them differ: dropout, or a changed model."
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave a reference model that has a folder of its own out of the checkpoint."""
        super().on_save_checkpoint(checkpoint)
        if self.config.reference:  # it is loaded again from its folder
            for name in [name for name in checkpoint["state_dict"] if name.startswith("reference.")]:
                del checkpoint["state_dict"][name]
            self.strict_loading = False
