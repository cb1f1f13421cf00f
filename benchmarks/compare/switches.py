"""Ablations: optimisations of this library, each turned off alone, compared with the analytical prediction.

An ablation is an entry of `ABLATIONS`. It stands here and not in the product, because training needs none of them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from benchmarks.compare.cases import OURS, Case
from benchmarks.compare.contender import Ours, Placement
from benchmarks.flops_bound import Recipe
from lit_vlm.data.processor import Processor
from lit_vlm.model.packed_forward import FlatOnevision, FlatOnevisionModel
from lit_vlm.stages import DPOStage
from lit_vlm.types import IGNORE_INDEX, Batch, ModelPart


@dataclass(frozen=True, slots=True)
class Ablation:
    """Ablation: one optimisation turned off.

    Attributes:
        stages: stages with this optimisation.
        recipe: changed fields of `Recipe`.
        options: options of the stage.
        change_stage: changes the contender after it is built.
        change_batch: changes each micro-batch.
    """

    stages: tuple[str, ...]
    recipe: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    change_stage: Callable[[Ours], None] = lambda contender: None
    change_batch: Callable[[Batch], Batch] = lambda batch: batch

    def make_contender(self, name: str, case: Case, placement: Placement) -> Ours:
        """Make the contender with this optimisation off."""
        return Ours(
            case,
            placement,
            name=name,
            options=self.options,
            change_stage=self.change_stage,
            change_batch=self.change_batch,
        )

    def make_recipe(self, case: Case) -> Recipe:
        """Make the recipe that predicts its FLOPs."""
        return replace(case.make_recipe(OURS), **self.recipe)


class HeadOnAllRows(FlatOnevision):
    """Model that computes the head for all rows and then selects the supervised ones."""

    def forward(
        self, *args: Any, batch: Batch | None = None, vision_features: torch.Tensor | None = None, **kwargs: Any
    ) -> Any:
        if batch is None or kwargs.get("embeddings_only"):
            return super().forward(*args, batch=batch, **kwargs)
        vision_features = self.model.encode_images(batch) if vision_features is None else vision_features
        hidden = self.model(batch=batch, vision_features=vision_features)
        scores = self.lm_head(hidden, batch.input_ids.roll(-1), bool(kwargs.get("statistics")))
        rows = tuple(score.index_select(0, batch.loss_positions) for score in scores)
        rows = (*rows, vision_features.detach()) if kwargs.get("statistics") else rows
        return (*rows, hidden.index_select(0, batch.loss_positions).detach()) if kwargs.get("return_hidden") else rows


class LastLayerOnAllRows(FlatOnevisionModel):
    """Model that computes the last layer for all rows."""

    prunes_last_layer = False


def use_head_on_all_rows(contender: Ours) -> None:
    """Compute head and last layer for all rows; the head needs the output of the last layer."""
    for model in contender.models:
        model.__class__ = HeadOnAllRows


def use_last_layer_on_all_rows(contender: Ours) -> None:
    """Compute the last layer for all rows."""
    for model in contender.models:
        model.model.__class__ = LastLayerOnAllRows


def repeat_prompts(contender: Ours) -> None:
    """Repeat the prompt for each response of a pair."""
    contender.processor = Processor(contender.processor.tokenizer, contender.processor.images, share_prompts=False)


class DPOStageWithSecondTower(DPOStage):
    """DPO stage whose reference model encodes the images with a separate vision tower."""

    shares_tower = False


def add_reference_tower(contender: Ours) -> None:
    """Add a separate vision tower to the reference model."""
    contender.stage.__class__ = DPOStageWithSecondTower
    contender.stage.reference.model.vision_tower = copy.deepcopy(contender.stage.model.model.vision_tower)


def enable_frozen_gradients(contender: Ours) -> None:
    """Enable unused gradients of the frozen language model, as with flat parameters or adapters on all layers."""
    assert ModelPart.language_model not in contender.case.trainable
    contender.stage.model.model.language_model.requires_grad_(True)
    contender.stage.model.lm_head.requires_grad_(True)


def pad_batch(batch: Batch) -> Batch:
    """Pad each segment to the longest one. Padding follows the real tokens and is not supervised."""

    def pad_row(row: torch.Tensor, value: int) -> torch.Tensor:
        return pad_sequence(list(row.split(batch.segment_lengths)), batch_first=True, padding_value=value).flatten()

    count, longest = len(batch.segment_lengths), max(batch.segment_lengths)
    device = batch.input_ids.device
    labels = pad_row(batch.labels, IGNORE_INDEX)
    return replace(
        batch,
        input_ids=pad_row(batch.input_ids, 0),
        labels=labels,
        loss_positions=(labels != IGNORE_INDEX).nonzero().squeeze(1) - 1,
        position_ids=torch.arange(longest, device=device).repeat(count),
        cu_seqlens=torch.arange(0, longest * count + 1, longest, dtype=torch.int32, device=device),
        segment_lengths=[longest] * count,
        trailing_tokens=[
            tail + longest - own for tail, own in zip(batch.trailing_tokens, batch.segment_lengths, strict=True)
        ],
    )


ALL_STAGES = ("align", "sft", "anyres", "dpo")
ABLATIONS = {
    "head and last layer on all rows": Ablation(
        ALL_STAGES, {"head_on_all_rows": True, "prunes_last_layer": False}, change_stage=use_head_on_all_rows
    ),
    "last layer on all rows": Ablation(
        ALL_STAGES, {"prunes_last_layer": False}, change_stage=use_last_layer_on_all_rows
    ),
    "activation checkpointing": Ablation(
        ALL_STAGES, {"recomputes": True}, options={"activation_checkpointing": "full"}
    ),
    # with padding, the last layer cannot be computed only from some row on
    "padded to the longest, last layer on all rows": Ablation(
        ("align", "sft", "anyres"),
        {"pads": True, "prunes_last_layer": False},
        change_stage=use_last_layer_on_all_rows,
        change_batch=pad_batch,
    ),
    "gradients of frozen weights": Ablation(
        ("align",), {"frozen_weight_gradients": True}, change_stage=enable_frozen_gradients
    ),
    "a prompt for each answer": Ablation(("dpo",), {"shares_prompt": False}, change_stage=repeat_prompts),
    "a tower for the reference": Ablation(("dpo",), {"tower_passes": 2}, change_stage=add_reference_tower),
}
