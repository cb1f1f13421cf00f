"""The stages of BLIP-2 and BLIP as LightningModules that learn from pairs of an image and a caption.

They run under a plain Lightning Trainer with `CaptionDataModule`, and as stages of the command line with `PairDataModule`
(docs/qformer.md). A step is never split into micro-batches: contrastive losses need all pairs of a step at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import lightning as L
import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric
from transformers import Blip2ForConditionalGeneration, BlipForConditionalGeneration, PreTrainedTokenizerBase

from lit_vlm.data.caption_pairs import PairBatch
from lit_vlm.evaluation.retrieval import PairRetrieval
from lit_vlm.losses.contrastive import ContrastiveLosses, compute_alpha
from lit_vlm.model.blip import BlipForPretraining, BlipForRetrieval
from lit_vlm.model.blip_parts import caption_images, compute_prompted_loss, count_prompt_tokens
from lit_vlm.model.parts import PartSummary, summarize_modules
from lit_vlm.model.qformer.generation import generate_captions, make_caption_labels
from lit_vlm.model.qformer.pretraining import Blip2ForPretraining
from lit_vlm.stages.base import compute_seed
from lit_vlm.types import IGNORE_INDEX, UserError

EPOCH_DECAY = 0.9  # of BLIP's learning rate
FIRST_LEARNING_RATE = 1e-6  # from which the warm-up begins; LAVIS, pretrain_stage1.yaml


class PairStage(L.LightningModule):
    """Base of the stages: optimizer, schedule and random numbers.

    Args:
        model: its parameters with `requires_grad` train.
        learning_rate, min_learning_rate: peak after the warm-up, and end of the cosine decay.
        warmup_steps: optimizer steps of the linear warm-up.
        weight_decay: of matrices; biases and norms do not decay.
        adam_betas, adam_eps: of AdamW.
        seed: of dropout and of the negatives.
    """

    PARTS: ClassVar[dict[str, str]] = {}  # part -> regular expression of its parameters' names; the first that matches
    accumulation_error: str  # reason for which the losses of micro-batches are no loss of the step

    def __init__(
        self,
        model: nn.Module,
        *,
        learning_rate: float = 1e-4,
        min_learning_rate: float = 1e-5,
        warmup_steps: int = 5000,
        weight_decay: float = 0.05,
        adam_betas: tuple[float, float] = (0.9, 0.999),
        adam_eps: float = 1e-8,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.hparams.update(
            learning_rate=learning_rate,
            min_learning_rate=min_learning_rate,
            warmup_steps=warmup_steps,
            weight_decay=weight_decay,
            adam_betas=adam_betas,
            adam_eps=adam_eps,
            seed=seed,
        )
        self.model = model
        self.pulse: Callable[[], None] = lambda: None  # called while the validation matches candidates

    @property
    def part_summary(self) -> list[PartSummary]:
        """Summary of trainable parameters, one row for each part of the model."""
        return summarize_modules(self.model, self.PARTS)

    def on_fit_start(self) -> None:
        """Refuse gradient accumulation.

        Raises:
            UserError: the trainer accumulates gradients.
        """
        if self.trainer.accumulate_grad_batches > 1:
            raise UserError(
                f"accumulate_grad_batches={self.trainer.accumulate_grad_batches}: {self.accumulation_error} Leave it at 1, and use more "
                "devices or smaller images for a larger batch."
            )

    def configure_model(self) -> None:
        """Do nothing: the model is built already. A strategy that shards weights does so after this call."""

    def on_validation_start(self) -> None:
        """Gather sharded weights: ranks have different numbers of held-out batches and of candidates to match."""
        if gather := getattr(self.trainer.strategy, "gather_all_units", None):
            gather(self.model)

    def on_train_batch_start(self, batch: PairBatch, batch_idx: int) -> None:
        """Seed dropout and negatives by step and rank, so that a resumed run samples the same ones."""
        if shard := getattr(self.trainer.strategy, "shard_all_units", None):
            shard(self.model)  # a validation has gathered them
        torch.manual_seed(compute_seed(self.hparams["seed"], self.global_step, self.global_rank))

    def configure_optimizers(self) -> Any:
        """Make AdamW, and a learning rate that rises linearly and falls with a cosine."""
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        groups = [
            {
                "params": [parameter for parameter in trained if (parameter.dim() > 1) is decays],
                "weight_decay": self.hparams["weight_decay"] if decays else 0.0,
            }
            for decays in (True, False)
        ]
        options = {"betas": self.hparams["adam_betas"], "eps": self.hparams["adam_eps"]}
        optimizer = torch.optim.AdamW(groups, lr=self.hparams["learning_rate"], **options)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.compute_learning_rate_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def compute_learning_rate_factor(self, step: int) -> float:
        """Compute the learning rate of a step as a fraction of its peak."""
        peak, warmup = self.hparams["learning_rate"], self.hparams["warmup_steps"]
        if step < warmup:
            first = min(FIRST_LEARNING_RATE, peak)
            return (first + (peak - first) * step / warmup) / peak
        return self.compute_decay(step) / peak

    def compute_decay(self, step: int) -> float:
        """Compute the learning rate after the warm-up: a cosine down to its minimum at the last step."""
        peak, last, warmup = (self.hparams[name] for name in ("learning_rate", "min_learning_rate", "warmup_steps"))
        num_steps = max(1, self.count_steps() - warmup)
        progress = min(1.0, (step - warmup) / num_steps)
        return last + (peak - last) * 0.5 * (1 + math.cos(math.pi * progress))

    def count_steps(self) -> int:
        """Count the optimizer steps of this fit.

        Lightning's own estimate would start a data loader before a resumed run has set its position.
        """
        plan = getattr(getattr(self.trainer, "datamodule", None), "plan", None)
        return int(self.trainer.estimated_stepping_batches) if plan is None else plan.num_steps


class ContrastiveStage(PairStage):
    """Base of the stages with the three losses of BLIP and BLIP-2; measures retrieval among the held-out pairs.

    Args:
        num_candidates: best candidates of each held-out query that are re-ranked by matching; 0: none.
        settings: see `PairStage`.
    """

    accumulation_error = (
        "a contrastive loss compares each pair with all others of its step, so the losses of micro-batches do not add "
        "up to it."
    )
    LOSSES: ClassVar[tuple[str, ...]] = ("itc", "itm", "itg")  # that are logged besides their sum
    model: Any

    def __init__(self, model: nn.Module, *, num_candidates: int = 0, **settings: Any) -> None:
        super().__init__(model, **settings)
        self.retrieval = PairRetrieval(num_candidates)

    def compute_losses(self, batch: PairBatch) -> ContrastiveLosses:
        """Compute the losses of this rank's pairs."""
        raise NotImplementedError

    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        """Return the loss of this rank's pairs; the strategy's mean over ranks is the loss of the step."""
        losses = self.compute_losses(batch)
        for name in ("total", *self.LOSSES):
            value, name = getattr(losses, name), "loss" if name == "total" else name
            self.log(f"train/{name}", value.detach(), prog_bar=name == "loss", sync_dist=True, batch_size=1)
        return losses.total

    def validation_step(self, batch: PairBatch, batch_idx: int) -> None:
        """Add held-out pairs to the retrieval."""
        self.retrieval.update(self.model, batch, self.global_rank)

    def on_validation_epoch_end(self) -> None:
        """Log the recalls over all held-out pairs, and those after re-ranking."""
        recalls = self.retrieval.compute()
        if self.retrieval.num_candidates:
            with self.trainer.precision_plugin.forward_context():
                recalls |= self.retrieval.rerank(self.model, self.global_rank, pulse=self.pulse)
        for name, value in recalls.items():
            self.log(f"val/{name}", value)
        self.retrieval.reset()


class RepresentStage(ContrastiveStage):
    """First stage of BLIP-2. The defaults are those of LAVIS's `pretrain_stage1.yaml`, 100 pairs on each GPU.

    Logs `train/loss`, `train/itc`, `train/itm`, `train/itg`, and the recalls of retrieval among the held-out pairs,
    `val/image_to_text_r1` and so on.

    Args:
        model: made by `build_blip2` or `load_blip2`.
        match_equal: pairs with one picture or one text are no negatives of each other, and count as right; False: only
            the own pair is right, as in the publication.
        settings: see `ContrastiveStage`.
    """

    PARTS = {"vision tower": "vision_model", "Q-Former": "qformer|query_tokens", "texts and heads": ""}
    model: Blip2ForPretraining

    def __init__(self, model: Blip2ForPretraining, *, match_equal: bool = True, **settings: Any) -> None:
        super().__init__(model, **settings)
        self.hparams.update(match_equal=match_equal)

    def compute_losses(self, batch: PairBatch) -> ContrastiveLosses:
        pair_ids = batch.pair_ids if self.hparams["match_equal"] else None
        return self.model(batch.pixel_values, batch.input_ids, batch.attention_mask, pair_ids)


class BlipStage(ContrastiveStage):
    """Pretraining of BLIP. The defaults are those of the release's `pretrain.yaml`, 75 pairs on each GPU.

    Logs the same as `RepresentStage`; `train/itg` is the loss of the captions.

    Args:
        model: made by `build_blip`.
        steps_per_epoch: the share of the momentum encoder in the targets grows over two epochs, and the learning rate
            falls to 0.9 of its value with each.
        match_equal: pairs of a rank with one picture or one text are no negatives of each other; False: as published.
        settings: see `ContrastiveStage`.
    """

    PARTS = {
        "momentum encoders": "momentum",
        "vision tower": "vision_model",
        "text encoder": "text_encoder",
        "text decoder": "text_decoder",
        "heads": "",
    }
    model: BlipForPretraining

    def __init__(
        self,
        model: BlipForPretraining,
        steps_per_epoch: int,
        *,
        learning_rate: float = 3e-4,
        min_learning_rate: float = 1e-6,
        warmup_steps: int = 3000,
        match_equal: bool = True,
        **settings: Any,
    ) -> None:
        settings |= {"learning_rate": learning_rate, "min_learning_rate": min_learning_rate}
        super().__init__(model, warmup_steps=warmup_steps, **settings)
        self.hparams.update(steps_per_epoch=steps_per_epoch, match_equal=match_equal)

    def compute_losses(self, batch: PairBatch) -> ContrastiveLosses:
        """Compute the losses of this rank's pairs, with the share of the momentum encoder at this step."""
        pair_ids = batch.pair_ids if self.hparams["match_equal"] else None
        alpha = compute_alpha(self.global_step, self.hparams["steps_per_epoch"])
        self.model.prepare_step()
        return self.model(batch.pixel_values, batch.input_ids, batch.attention_mask, alpha, pair_ids)

    def compute_decay(self, step: int) -> float:
        """Compute the learning rate after the warm-up: 0.9 of it with each epoch."""
        peak, last = self.hparams["learning_rate"], self.hparams["min_learning_rate"]
        return max(last, peak * EPOCH_DECAY ** (step // self.hparams["steps_per_epoch"]))


class GenerateStage(PairStage):
    """Second stage of BLIP-2. The defaults are those of LAVIS's `pretrain_stage2.yaml`, 64 pairs on each GPU.

    The data module's `tokenize` is `tokenize_prompted`. Logs `train/loss` and `val/loss`, mean losses of the captions' tokens.
    `predict` generates a caption of each image.

    Args:
        model, tokenizer: made by `build_blip2_generator`.
        settings: see `PairStage`.
    """

    accumulation_error = (
        "the loss is the mean over the tokens of a batch, and micro-batches have different numbers of tokens."
    )
    PARTS = {
        "vision tower": "vision_model",
        "Q-Former": "qformer|query_tokens",
        "projector": "language_projection",
        "language model": "language_model",
    }
    model: Blip2ForConditionalGeneration

    def __init__(
        self,
        model: Blip2ForConditionalGeneration,
        tokenizer: PreTrainedTokenizerBase,
        *,
        warmup_steps: int = 2000,
        **settings: Any,
    ) -> None:
        super().__init__(model, warmup_steps=warmup_steps, **settings)
        self.tokenizer = tokenizer
        self.val_loss = MeanMetric()

    def on_train_epoch_start(self) -> None:
        """Set train mode; the frozen tower and the language model stay in eval mode."""
        self.model.train()
        self.model.vision_model.eval()
        self.model.language_model.eval()

    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        """Return the mean loss of this rank's tokens; the strategy's mean over ranks is the loss of the step, as in LAVIS."""
        loss = self._compute_loss(batch)
        self.log("train/loss", loss.detach(), prog_bar=True, sync_dist=True, batch_size=1)
        return loss

    def validation_step(self, batch: PairBatch, batch_idx: int) -> None:
        """Log the mean loss of all tokens of the held-out captions."""
        labels = self._make_labels(batch)
        self.val_loss.update(self._compute_loss(batch), weight=(labels[:, 1:] != IGNORE_INDEX).sum())
        self.log("val/loss", self.val_loss, on_epoch=True, on_step=False, prog_bar=True, batch_size=1)

    def predict_step(self, batch: PairBatch, batch_idx: int) -> list[str]:
        """Generate a caption of each image greedily."""
        return generate_captions(self.model, self.tokenizer, batch.pixel_values)

    def _compute_loss(self, batch: PairBatch) -> Tensor:
        return self.model(
            pixel_values=batch.pixel_values,
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            labels=self._make_labels(batch),
        ).loss

    def _make_labels(self, batch: PairBatch) -> Tensor:
        return make_caption_labels(batch.input_ids, batch.attention_mask, self.model.config.image_token_index)


class RetrievalStage(ContrastiveStage):
    """BLIP's fine-tuning for retrieval. The defaults are those of its `retrieval_coco.yaml`, 32 pairs on each of 8 GPUs.

    Logs `train/loss`, `train/itc`, `train/itm` and the recalls of retrieval among the held-out pairs.

    Args:
        model: made by `build_blip_retrieval`.
        steps_per_epoch: the share of the momentum encoder in the targets grows over two epochs.
        match_equal: equal texts are right for each other, as equal images are; False: equal images alone, as published.
        settings: see `ContrastiveStage`.
    """

    PARTS = {part: pattern for part, pattern in BlipStage.PARTS.items() if part != "text decoder"}
    LOSSES = ("itc", "itm")
    model: BlipForRetrieval

    def __init__(
        self,
        model: BlipForRetrieval,
        steps_per_epoch: int,
        *,
        learning_rate: float = 1e-5,
        min_learning_rate: float = 0.0,
        warmup_steps: int = 0,
        match_equal: bool = True,
        **settings: Any,
    ) -> None:
        settings |= {"learning_rate": learning_rate, "min_learning_rate": min_learning_rate}
        super().__init__(model, warmup_steps=warmup_steps, **settings)
        self.hparams.update(steps_per_epoch=steps_per_epoch, match_equal=match_equal)

    def compute_losses(self, batch: PairBatch) -> ContrastiveLosses:
        """Compute the losses of this rank's pairs, with the share of the momentum encoder at this step."""
        pair_ids = batch.pair_ids if self.hparams["match_equal"] else batch.pair_ids[:, [0, 0]]
        alpha = compute_alpha(self.global_step, self.hparams["steps_per_epoch"])
        self.model.prepare_step()
        return self.model(batch.pixel_values, batch.input_ids, batch.attention_mask, alpha, pair_ids)


class CaptionStage(PairStage):
    """BLIP's fine-tuning for captions. The defaults are those of its `caption_coco.yaml`, 32 pairs on each of 8 GPUs.

    The data module's `tokenize` is `tokenize_with_prompt`. Logs `train/loss` and `val/loss`, mean losses of the captions'
    tokens with label smoothing 0.1. `predict` captions images by beam search.

    Args:
        model, tokenizer: made by `load_captioner`.
        prompt: text before each caption, without a loss.
        generation: options of `generate`.
        settings: see `PairStage`.
    """

    PARTS = {"vision tower": "vision_model", "text decoder": "text_decoder", "heads": ""}
    accumulation_error = GenerateStage.accumulation_error
    model: BlipForConditionalGeneration

    def __init__(
        self,
        model: BlipForConditionalGeneration,
        tokenizer: PreTrainedTokenizerBase,
        *,
        prompt: str = "a picture of ",
        generation: dict[str, Any] | None = None,
        learning_rate: float = 1e-5,
        min_learning_rate: float = 0.0,
        warmup_steps: int = 0,
        **settings: Any,
    ) -> None:
        settings |= {"learning_rate": learning_rate, "min_learning_rate": min_learning_rate}
        super().__init__(model, warmup_steps=warmup_steps, **settings)
        self.tokenizer, self.prompt = tokenizer, prompt
        self.generation = {"num_beams": 3, "min_length": 5, "max_length": 20} if generation is None else generation
        self.num_prompt_tokens = count_prompt_tokens(tokenizer, prompt)
        self.val_loss = MeanMetric()

    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        """Return the mean loss of this rank's tokens; the strategy's mean over ranks is the loss of the step."""
        loss, _ = self._compute_loss(batch)
        self.log("train/loss", loss.detach(), prog_bar=True, sync_dist=True, batch_size=1)
        return loss

    def validation_step(self, batch: PairBatch, batch_idx: int) -> None:
        """Log the mean loss of all tokens of the held-out captions."""
        loss, num_tokens = self._compute_loss(batch)
        self.val_loss.update(loss, weight=num_tokens)
        self.log("val/loss", self.val_loss, on_epoch=True, on_step=False, prog_bar=True, batch_size=1)

    def predict_step(self, batch: PairBatch, batch_idx: int) -> list[str]:
        """Caption each image."""
        return caption_images(self.model, self.tokenizer, batch.pixel_values, self.prompt, **self.generation)

    def _compute_loss(self, batch: PairBatch) -> tuple[Tensor, int]:
        inputs = (batch.pixel_values, batch.input_ids, batch.attention_mask)
        return compute_prompted_loss(self.model, *inputs, self.num_prompt_tokens)
