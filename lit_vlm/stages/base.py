"""Base class of all stages: model, freezing, optimizer, loss with exact gradient accumulation, checkpoints.

A stage is a LightningModule with plain constructor arguments: `L.Trainer().fit(SFTStage("folder"), datamodule)` needs
no config.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from torch import Tensor
from torchmetrics import MeanMetric

from lit_vlm.anyres import Tiling
from lit_vlm.compat.lightning import get_batch_index, get_trainer, set_hparams
from lit_vlm.config.choices import ActivationCheckpointing as Level
from lit_vlm.config.choices import StageName
from lit_vlm.config.schema import StageConfig
from lit_vlm.config.settings import build_stage_config, convert_to_plain
from lit_vlm.losses.next_token import compute_next_token_loss
from lit_vlm.model.generate import generate
from lit_vlm.model.matmul_dtypes import MatmulDtypeCounter, warn_about_float32_matmuls
from lit_vlm.model.parts import PartSummary, set_train_modes, summarize_parts
from lit_vlm.model.skeleton import defer_weights, fill_skeleton, is_deferring_weights, read_exact_values
from lit_vlm.model.spec import ModelSpec
from lit_vlm.model.trained_parts import get_trainable_token_ids, prepare_parts, require_frozen_tower
from lit_vlm.model.weights import NotShardLoadableError
from lit_vlm.stages.caches import FeatureCache, build_feature_cache
from lit_vlm.stages.model_init import (
    ModelLike,
    compute_gradient_sums,
    describe_model,
    init_model,
    require_activation_checkpointing,
    require_bf16,
    require_gradients,
    require_images,
    resolve_model,
)
from lit_vlm.stages.optimizer import make_optimizer, make_scheduler
from lit_vlm.types import Batch, ModelPart, UserError

if TYPE_CHECKING:
    from lit_vlm.model.classes import VisionLanguageModel


class Stage(L.LightningModule):
    """Training stage.

    Args:
        model: a folder or hub id of a LLaVA-class model, a `ModelSpec` of parts, or a built model; None only
            where `load_from_checkpoint` restores it.
        config: settings of the stage, of its class `config_class`; None: `settings`.
        settings: the fields of `config_class` as keyword arguments of plain values, e.g. `learning_rate=1e-5`,
            `trainable=["projector"]`, `activation_checkpointing="full"`, or for one part
            `parts={"vision_tower": {"learning_rate": 2e-6, "lora": {"rank": 8}}}`. The schema explains each.
        tiling: how images are tiled; must be equal to the data's.
        dtype: of the weights, "float32" or "bfloat16".
        frozen_dtype: "bfloat16" under bf16-mixed: of frozen matrices that are read from files (`model/skeleton.py`);
            None: the same as `dtype`.
        seed: for new parameters and for dropout.
    """

    name = StageName.sft
    config_class: type[StageConfig] = StageConfig
    default_trainable: tuple[ModelPart, ...] = tuple(ModelPart)
    default_learning_rate = 1e-5

    _accumulated_loss: Tensor  # [], sum of the losses of the step's micro-batches so far

    def __init__(
        self,
        model: ModelLike | None = None,
        config: StageConfig | None = None,
        *,
        tiling: str = "anyres",
        dtype: str = "float32",
        frozen_dtype: str | None = None,
        seed: int = 0,
        **settings: Any,
    ) -> None:
        super().__init__()
        self._model_source = model
        self.config = copy.deepcopy(config) if config is not None else self._build_config(settings)
        build = {"tiling": tiling, "dtype": dtype, "frozen_dtype": frozen_dtype, "seed": seed}
        # plain containers only, so that load_from_checkpoint needs no trust
        self.hparams.update(convert_to_plain(self.config) | build)
        set_hparams(self, dict(self.hparams))  # not to the logger: the run folder's config.yaml has them, and more
        self.trainable = [ModelPart(name) for name in self.config.trainable]
        self.tiling = Tiling(tiling)
        self.model: VisionLanguageModel | None = None
        self.part_methods: dict[ModelPart, str] = {}
        self.val_loss = MeanMetric()
        self.feature_cache: FeatureCache | None = None
        self.say: Callable[[str], None] = lambda text: None  # reports the progress of a pass before training
        if self.config.cache_features:
            require_frozen_tower(self.trainable)
        self._gradients_checked, self._step_tiles = False, 0
        self._matmul_dtypes_checked = False  # True after the first forward pass
        self._has_rounded_weights = False  # frozen matrices are in the compute dtype
        self.gradients_discarded = False  # a callback discarded this step's gradients: there is nothing to check

    @classmethod
    def _build_config(cls, settings: dict[str, Any]) -> StageConfig:
        """Build the config from keyword arguments, with the trained parts and the learning rate of this class."""
        defaults = {"name": cls.name, "trainable": cls.default_trainable, "learning_rate": cls.default_learning_rate}
        given = {name: value for name, value in settings.items() if value is not None}
        return build_stage_config(cls.config_class, defaults | given)

    # ---- the model

    def configure_model(self) -> None:
        """Build the model, freeze parts, add LoRA adapters.

        Lightning calls it after the strategy's setup; a second call does nothing.
        """
        if self.model is not None or self._model_source is None:
            return
        if not self._should_round_frozen():
            self._make_model()
            return
        try:
            with defer_weights():
                self._make_model()
        except NotShardLoadableError:  # load everything in float32: exact values cannot be read again by shards
            self._make_model()
            return
        for model in (self.model, getattr(self, "reference", None)):
            if model is not None:
                fill_skeleton(model, getattr(torch, self.hparams["frozen_dtype"]))
        self._has_rounded_weights = True

    def _should_round_frozen(self) -> bool:
        """Return True when frozen matrices are rounded to `frozen_dtype`.

        Not for a model that was built already or comes with a checkpoint: the exact values of what is rounded must be
        read again for an export. A strategy that shards weights handles its own.
        """
        from_files = isinstance(self._model_source, str | Path | ModelSpec)
        return self.hparams["frozen_dtype"] is not None and from_files and not is_deferring_weights()

    def _make_model(self) -> None:
        self._model_source = resolve_model(self._model_source, self.tiling)
        init = init_model(self._model_source, getattr(torch, self.hparams["dtype"]), self.hparams["seed"])
        self.model, self._new_ids, self._special_ids = init.model, init.new_ids, init.special_ids
        self._prepare_training()

    def setup(self, stage: str) -> None:
        """Check the trainer's precision."""
        if self._has_rounded_weights:
            require_bf16(self.trainer.precision_plugin.precision)

    def _prepare_training(self) -> None:
        """Freeze parts, add LoRA adapters and trainable token rows, enable activation checkpointing."""
        assert self.model is not None
        self.part_methods |= prepare_parts(
            self.model, self.config, new_ids=self._new_ids, special_ids=self._special_ids, seed=self.hparams["seed"]
        )

    def _get_trainable_token_ids(self) -> list[int]:
        """Get the tokens whose rows train although the vocabulary's tables are frozen."""
        assert self.model is not None
        return get_trainable_token_ids(self.model, self.config, new_ids=self._new_ids, special_ids=self._special_ids)

    def set_train_modes(self) -> None:
        """Set train mode for parts that train, and eval mode for frozen ones."""
        assert self.model is not None
        set_train_modes(self.model, self.trainable, checkpointed=self.level is not Level.none)

    @property
    def level(self) -> Level:
        """Level of activation checkpointing; `auto` is none until it is resolved."""
        return self.config.checkpointing_level

    @property
    def part_summary(self) -> list[PartSummary]:
        """Summary of trainable parameters, one row for each part."""
        assert self.model is not None
        return summarize_parts(self.model, self.part_methods)

    # ---- training

    def on_fit_start(self) -> None:
        """Prepare caches and check the settings against data and model."""
        if self.model is None:
            raise UserError(f"{type(self).__name__} has no model; give it a folder, a Blueprint or a model.")
        self.set_train_modes()
        self.prepare()
        require_images(getattr(getattr(self.trainer, "datamodule", None), "index", None), self.trainable)
        require_activation_checkpointing(self.model, self.level)

    def prepare(self) -> None:
        """Compute, once, what needs the run's initial weights; called before the weights of a checkpoint are loaded."""
        if self.config.cache_features and self.feature_cache is None:
            weights = getattr(self._model_source, "whole", None) or getattr(self._model_source, "vision_tower", None)
            self.feature_cache = build_feature_cache(
                self.trainer, self.model, weights, self.say, dtype=self.hparams["dtype"]
            )

    def get_vision_features(self, batch: Batch) -> Tensor | None:
        """Return cached vision features [N, P, C] of the batch's tiles; None when there is no cache."""
        return self.feature_cache.get(batch) if self.feature_cache is not None and not batch.tiles.numel() else None

    def on_train_epoch_start(self) -> None:
        self.set_train_modes()  # generating samples sets eval mode

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Seed the random generators for this micro-batch."""
        # The seed of a step's random numbers (dropout) depends on its position only: a resumed run samples the same ones
        self.gradients_discarded = False
        step, micro = divmod(batch_idx, self.trainer.accumulate_grad_batches)
        seed = compute_seed(self.hparams["seed"], step, micro, self.global_rank)
        torch.default_generator.manual_seed(seed)  # torch.manual_seed takes 0.6 ms without a GPU
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of one micro-batch, scaled for gradient accumulation."""
        loss = self.compute_loss(batch) if self._matmul_dtypes_checked else self._compute_first_loss(batch)
        self._log_step(loss.detach(), batch)
        return loss * self._get_loss_scale()

    def _compute_first_loss(self, batch: Batch) -> Tensor:
        """Compute the first micro-batch's loss, and warn when a matrix product ran in float32 under half precision."""
        self._matmul_dtypes_checked = True
        with MatmulDtypeCounter() as counter:
            loss = self.compute_loss(batch)
        if "16" in self.trainer.precision_plugin.precision:
            warn_about_float32_matmuls(counter)
        return loss

    def _get_loss_scale(self) -> int:
        """Get the loss scale with which gradient accumulation sums over micro-batches and ranks.

        It cancels the later divisions. Lightning divides the loss by the number of micro-batches, and the strategy
        averages gradients over ranks. Lightning's own DeepSpeedStrategy divides by the number of micro-batches once
        more.
        """
        num_micro_batches, world_size = self.trainer.accumulate_grad_batches, self.trainer.world_size
        return (
            num_micro_batches * num_micro_batches * world_size
            if self.trainer.strategy.handles_gradient_accumulation
            else num_micro_batches * world_size
        )

    def compute_loss(self, batch: Batch) -> Tensor:
        """Compute this micro-batch's part of the optimizer step's loss, [].

        The parts of all micro-batches and ranks add up to the loss of the step.
        """
        return compute_next_token_loss(self.compute_token_losses(batch), batch.step_supervised_tokens)

    def compute_token_losses(self, batch: Batch) -> Tensor:
        """Compute the cross-entropy loss of each supervised token, [R] nats."""
        assert self.model is not None
        (log_probs,) = self.model(batch=batch, vision_features=self.get_vision_features(batch))
        return -log_probs if batch.num_supervised_tokens else log_probs * 0.0

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Check the gradients of the first step with images."""
        if not self._gradients_checked and not self.gradients_discarded:
            self.check_gradients(with_images=self._step_tiles > 0)
            # a step without images does not check the vision side
            self._gradients_checked = self._step_tiles > 0 or self.trainable == [ModelPart.language_model]

    def check_gradients(self, with_images: bool = True) -> None:
        """Raise UserError when gradients and trainable parameters do not match; see `require_gradients`."""
        assert self.model is not None
        require_gradients(self.model, self.trainable, self._compute_gradient_sums(), with_images=with_images)

    def _compute_gradient_sums(self) -> dict[str, float]:
        assert self.model is not None
        return compute_gradient_sums(self.model, getattr(get_trainer(self), "strategy", None))

    def _log_step(self, loss: Tensor, batch: Batch) -> None:
        """Sum the loss over micro-batches and log it at the last one as `train/loss`."""
        micro_batch = get_batch_index(self.trainer) % self.trainer.accumulate_grad_batches
        self._accumulated_loss = loss if micro_batch == 0 else self._accumulated_loss + loss
        self._step_tiles = batch.step_tiles
        if micro_batch == self.trainer.accumulate_grad_batches - 1:
            self.log("train/loss", self._accumulated_loss, prog_bar=True, sync_dist=True, reduce_fx="sum", batch_size=1)

    def configure_optimizers(self) -> Any:
        """Make AdamW and the learning-rate schedule, which advances once per optimizer step."""
        assert self.model is not None
        optimizer = make_optimizer(self.model, self.config)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {
                "scheduler": make_scheduler(optimizer, self.config, self._count_steps()),
                "interval": "step",
            },
        }

    def _count_steps(self) -> int:
        """Count the optimizer steps of this fit.

        Lightning's own estimate would start the data loader before a resumed run has set its position.
        """
        plan = getattr(getattr(self.trainer, "datamodule", None), "plan", None)
        if plan is not None and self.trainer.limit_train_batches == 1.0:
            return plan.num_steps
        return int(self.trainer.estimated_stepping_batches)

    # ---- validation and prediction

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Log `val/loss`, the mean over all supervised tokens; return each segment's loss sum and token count.

        Callbacks read the returned values.
        """
        losses = self.compute_token_losses(batch)
        # a rank with only dummy batches must log too: the others wait for it when the metric is gathered
        self.log("val/loss", self.val_loss, on_epoch=True, on_step=False, prog_bar=True, batch_size=1)
        if batch.dummy:
            return {}
        count = torch.tensor(batch.segment_supervised_tokens)
        sums = torch.stack([part.sum() for part in losses.split(batch.segment_supervised_tokens)])
        self.val_loss.update(losses.sum() / len(losses), weight=len(losses))
        return {"loss_sum": sums, "num_tokens": count}

    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, Any]]:
        """Generate an answer by greedy decoding in place of each sample's last one: `sample_id` and token ids."""
        answers = generate(self.model, batch)[: len(batch.sample_ids)]  # for a pair, the chosen answer's prompt
        return [{"sample_id": name, "ids": ids} for name, ids in zip(batch.sample_ids, answers, strict=True)]

    # ---- Lightning's checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the model's description and the exact values of rounded weights to a Lightning checkpoint."""
        assert self.model is not None
        checkpoint["lit_vlm"] = describe_model(self.model, self._get_trainable_token_ids())
        checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY] = dict(self.hparams)
        if self._has_rounded_weights:
            checkpoint["state_dict"] |= {
                f"model.{name}": value for name, value in read_exact_values(self.model).items()
            }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Build the model from its description in a Lightning checkpoint."""
        if self.model is None:
            self._model_source = checkpoint["lit_vlm"]
            self.configure_model()


def compute_seed(*numbers: int) -> int:
    """Compute a 64-bit seed from the numbers' SHA-256, so that seeds of neighbours are independent."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:8], "little")
