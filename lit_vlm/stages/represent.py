"""BLIP-2's first stage as a LightningModule: image-text contrast, matching and captions train the Q-Former.

It runs under a plain Lightning Trainer with `CaptionDataModule` (docs/qformer.md). It is no stage of the command line: a
step there is packed into micro-batches of tokens, and this loss needs all pairs of a step at once.
"""

from __future__ import annotations

import math
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torchmetrics import MeanMetric

from lit_vlm.data.caption_pairs import PairBatch
from lit_vlm.evaluation.retrieval import RetrievalRecall
from lit_vlm.losses.contrastive import ContrastiveLosses
from lit_vlm.model.qformer.pretraining import Blip2ForPretraining
from lit_vlm.stages.base import compute_seed
from lit_vlm.types import UserError

FIRST_LEARNING_RATE = 1e-6  # from which the warm-up begins; LAVIS, pretrain_stage1.yaml


class RepresentStage(L.LightningModule):
    """First stage of BLIP-2. The defaults are those of LAVIS's `pretrain_stage1.yaml`, for a global batch of 1,600 or more.

    Logs `train/loss`, `train/itc`, `train/itm`, `train/itg`, the same with `val/`, and the recalls of retrieval among the
    held-out pairs, `val/image_to_text_r1` and so on.

    Args:
        model: made by `build_blip2` or `load_blip2`.
        learning_rate, min_learning_rate: peak after the warm-up, and end of the cosine decay.
        warmup_steps: optimizer steps of the linear warm-up.
        weight_decay: of matrices; biases and norms do not decay.
        match_equal: pairs with one picture or one text are no negatives of each other, and count as right; False: only
            the own pair is right, as in the publication.
        seed: of dropout and of the negatives.
    """

    def __init__(
        self,
        model: Blip2ForPretraining,
        *,
        learning_rate: float = 1e-4,
        min_learning_rate: float = 1e-5,
        warmup_steps: int = 5000,
        weight_decay: float = 0.05,
        match_equal: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["model"])
        self.model = model
        self.val_losses = torch.nn.ModuleDict({name: MeanMetric() for name in ("loss", "itc", "itm", "itg")})
        self.recall = RetrievalRecall()

    def on_fit_start(self) -> None:
        """Refuse gradient accumulation.

        Raises:
            UserError: the trainer accumulates gradients.
        """
        if self.trainer.accumulate_grad_batches > 1:
            raise UserError(
                f"accumulate_grad_batches={self.trainer.accumulate_grad_batches}: a contrastive loss compares each pair with all others of "
                "its step, so the losses of micro-batches do not add up to it. Leave it at 1, and use more devices or "
                "smaller images for a larger batch."
            )

    def on_train_batch_start(self, batch: PairBatch, batch_idx: int) -> None:
        """Seed dropout and negatives by step and rank, so that a resumed run samples the same ones."""
        torch.manual_seed(compute_seed(self.hparams["seed"], self.global_step, self.global_rank))

    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        """Return the loss of this rank's pairs; the strategy's mean over ranks is the loss of the step."""
        losses = self._compute_losses(batch)
        for name, value in _list_losses(losses):
            self.log(f"train/{name}", value.detach(), prog_bar=name == "loss", sync_dist=True, batch_size=1)
        return losses.total

    def _compute_losses(self, batch: PairBatch) -> ContrastiveLosses:
        pair_ids = batch.pair_ids if self.hparams["match_equal"] else None
        return self.model(batch.pixel_values, batch.input_ids, batch.attention_mask, pair_ids)

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
        optimizer = torch.optim.AdamW(groups, lr=self.hparams["learning_rate"], betas=(0.9, 0.999))
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.compute_learning_rate_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def compute_learning_rate_factor(self, step: int) -> float:
        """Compute the learning rate of a step as a fraction of its peak."""
        peak, last, warmup = (self.hparams[name] for name in ("learning_rate", "min_learning_rate", "warmup_steps"))
        if step < warmup:
            first = min(FIRST_LEARNING_RATE, peak)
            return (first + (peak - first) * step / warmup) / peak
        num_steps = max(1, int(self.trainer.estimated_stepping_batches) - warmup)
        progress = min(1.0, (step - warmup) / num_steps)
        return (last + (peak - last) * 0.5 * (1 + math.cos(math.pi * progress))) / peak

    def validation_step(self, batch: PairBatch, batch_idx: int) -> None:
        """Add held-out pairs to the recalls. A text id stands for its pair, so that equal texts count as right."""
        model = self.model
        image_features = model.compute_image_features(model.encode_images(batch.pixel_values))
        text_features = model.compute_text_features(batch.input_ids, batch.attention_mask)
        text_ids = batch.pair_ids[:, 1]
        self.recall.update(image_features, text_ids, text_features, text_ids)

    def on_validation_epoch_end(self) -> None:
        """Log the recalls over all held-out pairs."""
        for name, value in self.recall.compute().items():
            self.log(f"val/{name}", value)
        self.recall.reset()


def _list_losses(losses: ContrastiveLosses) -> list[tuple[str, Tensor]]:
    return [("loss", losses.total), ("itc", losses.itc), ("itm", losses.itm), ("itg", losses.itg)]
