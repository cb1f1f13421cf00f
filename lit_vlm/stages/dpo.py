"""Stage 4: preference optimisation of the language model, with TRL's losses."""

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

COLLAPSE = -0.7  # nats per token: chosen answers' tokens are half as likely as under the reference


class DPOStage(Stage):
    """Direct preference optimisation (arXiv 2305.18290) and its relatives; names and meanings are TRL's.

    The reference is the model that the stage starts from: a frozen copy, or, under LoRA, the model with its adapters
    off. It comes from `reference` when that names another folder, and never from a name inside a config.

    Args:
        model: the policy to start from; see `Stage`.
        reference: folder of the reference model; None: what the policy starts as.
        cache_reference: its log-probabilities of all pairs of the run are made in one pass before training and kept in
            the data module's store, where other runs find them; no reference is held in memory then.
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
        cache_reference: bool = False,
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
        kept: dict[str, Any] = {"reference": str(reference) if reference else None, "cache_reference": cache_reference}
        super().__init__(model, **stage, **own, **kept)
        self.loss = PreferenceLoss(**own)
        self.reference: LlavaOnevisionForConditionalGeneration | None = None
        self.kept: ReferenceLogProbs | None = None
        self.tally, self.val_tally = Tally(), Tally()
        self._warned = False

    # ---- the reference

    @property
    def shares_tower(self) -> bool:
        """Whether the reference sees pictures as the policy does: then the tower runs once for both."""
        return self.hparams["reference"] is None and Part.vision_tower not in self.trainable

    def _prepare_training(self) -> None:
        lora = any(getattr(options, "lora", None) for options in self.options.parts.values())
        if self.hparams["reference"]:
            blueprint = draw_up(ModelConfig(special_tokens=[]), self.hparams["reference"], self.tiling)
            self._require_same_words(blueprint)
            self.reference = build(blueprint, getattr(torch, self.hparams["dtype"]))
        elif not lora and not self.hparams["cache_reference"]:
            self.reference = _copy(self.model, with_tower=not self.shares_tower)
        super()._prepare_training()
        if self.reference is not None:
            self.reference.requires_grad_(False).eval()
        for module in self.model.modules():  # the first loss is that of margin zero only when both see the same network
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0

    def _require_same_words(self, other: Blueprint) -> None:
        mine = getattr(self._given, "tokenizer", None)
        if mine is None or mine.get_vocab() == other.tokenizer.get_vocab():
            return
        words = mine.get_vocab().items() ^ other.tokenizer.get_vocab().items()
        raise UserError(
            f"stage.reference={self.hparams['reference']} has another tokenizer than the model that trains: "
            f"{counted(len(words), 'entry differs', 'entries differ')}, as {sorted(words)[0][0]!r}. Its log-probabilities would be of "
            "other tokens. Name a model of the same vocabulary."
        )

    def prepare(self) -> None:
        super().prepare()
        if not self.hparams["cache_reference"] or self.kept is not None:
            return
        weights = self.hparams["reference"] or getattr(self._given, "whole", None)
        self.kept = ReferenceLogProbs(folder_for(self.trainer, "reference", weights, dtype=self.hparams["dtype"]))
        pass_over(self.trainer, self.kept, self._keep, self.say)
        self.reference = None

    def _keep(self, batch: Batch) -> None:
        assert self.kept is not None
        with self._as_reference() as reference:
            log_probs, *_ = reference(batch=batch)
        if not batch.blank:
            self.kept.add_batch(batch, log_probs)

    def on_fit_start(self) -> None:
        super().on_fit_start()
        micro_batches = self.trainer.accumulate_grad_batches * self.trainer.world_size
        sorting = [name for name in self.hparams["loss_type"] if name in SORTS_THE_BATCH]
        if sorting and micro_batches > 1:
            raise UserError(
                f"stage.loss_type={sorting[0]} sorts the whole batch, and this one is dealt into {micro_batches} micro-batches. "
                "Lower data.global_batch_size, or raise data.tokens_per_micro_batch and data.tiles_per_micro_batch, on one device."
            )

    def set_modes(self) -> None:
        super().set_modes()
        if self.reference is not None:
            self.reference.eval()

    @contextlib.contextmanager
    def _as_reference(self) -> Iterator[LlavaOnevisionForConditionalGeneration]:
        if self.reference is not None:
            yield self.reference
        else:
            with adapters_off(self.model):
                yield self.model

    def _reference_scores(self, batch: Batch, seen: Tensor) -> Tensor:
        """[R] log-probabilities; `seen`: what the policy's tower made of the tiles."""
        if self.kept is not None:
            return self.kept.of(batch) if not batch.blank else seen.new_zeros(1, dtype=torch.float32)
        with torch.no_grad(), self._as_reference() as reference:
            return reference(batch=batch, seen=seen if self.shares_tower else None)[0]

    # ---- training

    def step_loss(self, batch: Batch) -> Tensor:
        loss, judged = self._preference(batch, self.tally, training=True)
        if judged is not None:
            self._check_first_loss(judged)
        self._log_metrics()
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """What is logged at the end of validation as `val/loss`, `val/rewards/accuracies` and so on is of all pairs."""
        loss, _ = self._preference(batch, self.val_tally, training=False)
        if not batch.blank:
            self.val_tally.add_loss(loss, batch.num_pairs)
        return {}

    def on_validation_epoch_end(self) -> None:
        means = self.val_tally.means(self._sum, self.device)
        for name, value in means.items():
            shown = name in ("loss", "rewards/accuracies")
            self.log(f"val/{name}", value, prog_bar=shown, batch_size=1)

    def _preference(self, batch: Batch, tally: Tally, training: bool) -> tuple[Tensor, Judged | None]:
        """The micro-batch's part of the loss, and what it is made of; nothing of a blank one."""
        *scores, seen = self.model(batch=batch, statistics=True, seen=self.seen(batch))
        frozen = self._reference_scores(batch, seen)
        if batch.blank:
            return scores[0].sum() * 0.0, None
        lengths = batch.supervised[-2 * batch.num_pairs :]
        chosen = sum(lengths[: batch.num_pairs])
        judged = self.loss(
            score_answers(scores, lengths),
            score_answers([frozen], lengths),
            lengths,
            pair_share=batch.num_pairs / max(1, batch.step_pairs),
            token_share=chosen / max(1, batch.step_chosen_tokens),
            training=training,
        )
        policy = scores[0].detach()
        tally.add(batch, lengths, judged, kl_of(policy, frozen), (policy - frozen)[:chosen].sum())
        return judged.loss, judged

    def _log_metrics(self) -> None:
        """At a step that is logged: over its pairs, on all ranks; each of them comes here, with a blank batch too."""
        trainer = self._trainer
        if trainer is None:
            return
        last = (trainer.fit_loop.epoch_loop.batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if not last:
            return
        step = self.global_step + 1
        if step % trainer.log_every_n_steps and step != self._num_steps():
            self.tally = Tally()
            return
        means = self.tally.means(self._sum, self.device)
        for name, value in means.items():
            self.log(f"train/{name}", value, batch_size=1)
        for name in NAMES - means.keys():  # Lightning would log the value of an earlier step again
            trainer._results.pop(f"training_step.train/{name}", None)
        self._warn_of_collapse(means)

    def _sum(self, numbers: Tensor) -> Tensor:
        return self.trainer.strategy.reduce(numbers, reduce_op="sum")

    def _warn_of_collapse(self, means: dict[str, float]) -> None:
        """Preference losses look at differences: both answers may become unlikely, the chosen one less so."""
        if means.get("drift", 0.0) < COLLAPSE and not self._warned:
            self._warned = True
            rank_zero_warn(
                f"Step {self.global_step + 1:,}: the tokens of chosen answers are {math.exp(-means['drift']):.1f} times less likely than under "
                "the reference. The margin grows because rejected answers fall faster, and the model forgets how to write good ones. Lower "
                "stage.learning_rate, raise stage.beta, or add the chosen answers' own loss: stage.loss_type=[sigmoid,sft]."
            )

    def _check_first_loss(self, judged: Judged) -> None:
        """Policy and reference are one model at the first step, so its loss is known. Another one means another reference."""
        expected = self.loss.at_margin_zero()
        if self.global_step or expected is None or judged.pair_loss is None or self.hparams["reference"]:
            return
        got = float(judged.pair_loss)
        exact = self.hparams["dtype"] == "float32" and not torch.is_autocast_enabled(self.device.type)
        # what was kept was computed beside other pairs: long answers' sums are rounded differently
        tolerance = (1e-5 if exact else 2e-2) if self.kept is None else (1e-3 if exact else 1e-1)
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


def _copy(model: LlavaOnevisionForConditionalGeneration, *, with_tower: bool) -> LlavaOnevisionForConditionalGeneration:
    """Of the model as it is; without a tower where the original's serves both."""
    tower = model.model.vision_tower
    if with_tower:
        return copy.deepcopy(model)
    model.model.vision_tower = None
    try:
        return copy.deepcopy(model)
    finally:
        model.model.vision_tower = tower
