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
from benchmarks.compare.contender import Ours, Place
from benchmarks.flops_bound import Recipe
from lit_vlm.data.processor import Processor
from lit_vlm.model.forward import FlatOnevision, FlatOnevisionModel
from lit_vlm.stages import DPOStage
from lit_vlm.types import IGNORE_INDEX, Batch, Part


@dataclass(frozen=True, slots=True)
class Switch:
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
    alter: Callable[[Ours], None] = lambda contender: None
    batch: Callable[[Batch], Batch] = lambda batch: batch

    def contender(self, name: str, case: Case, place: Place) -> Ours:
        """Make the contender with this optimisation off."""
        return Ours(case, place, name=name, options=self.options, alter=self.alter, batch=self.batch)

    def predicted(self, case: Case) -> Recipe:
        """Make the recipe that predicts its FLOPs."""
        return replace(case.recipe(OURS), **self.recipe)


class HeadOnAllRows(FlatOnevision):
    """Model that computes the head for all rows and then selects the supervised ones."""

    def forward(self, *args: Any, batch: Batch | None = None, seen: torch.Tensor | None = None, **kwargs: Any) -> Any:
        if batch is None or kwargs.get("embeddings_only"):
            return super().forward(*args, batch=batch, **kwargs)
        seen = self.model.look_at(batch) if seen is None else seen
        hidden = self.model(batch=batch, seen=seen)
        scores = self.lm_head(hidden, batch.input_ids.roll(-1), bool(kwargs.get("statistics")))
        rows = tuple(score.index_select(0, batch.rows) for score in scores)
        return (*rows, seen.detach()) if kwargs.get("statistics") else rows


class LastLayerOnAllRows(FlatOnevisionModel):
    """Model that computes the last layer for all rows."""

    prunes_last_layer = False


def head_on_all_rows(contender: Ours) -> None:
    """Compute head and last layer for all rows; the head needs the output of the last layer."""
    for model in contender.models:
        model.__class__ = HeadOnAllRows


def last_layer_on_all_rows(contender: Ours) -> None:
    """Compute the last layer for all rows."""
    for model in contender.models:
        model.model.__class__ = LastLayerOnAllRows


def a_prompt_for_each_answer(contender: Ours) -> None:
    """Repeat the prompt for each response of a pair."""
    contender.processor = Processor(contender.processor.tokenizer, contender.processor.images, share_prompts=False)


class LooksAgain(DPOStage):
    """DPO stage whose reference model encodes the images with a separate vision tower."""

    shares_tower = False


def a_tower_for_the_reference(contender: Ours) -> None:
    """Add a separate vision tower to the reference model."""
    contender.stage.__class__ = LooksAgain
    contender.stage.reference.model.vision_tower = copy.deepcopy(contender.stage.model.model.vision_tower)


def gradients_of_frozen_weights(contender: Ours) -> None:
    """Enable unused gradients of the frozen language model, as with flat parameters or adapters on all layers."""
    assert Part.language_model not in contender.case.trainable
    contender.stage.model.model.language_model.requires_grad_(True)
    contender.stage.model.lm_head.requires_grad_(True)


def padded(batch: Batch) -> Batch:
    """Pad each segment to the longest one. Padding follows the real tokens and is not supervised."""

    def stretch(row: torch.Tensor, value: int) -> torch.Tensor:
        return pad_sequence(list(row.split(batch.lengths)), batch_first=True, padding_value=value).flatten()

    count, longest = len(batch.lengths), max(batch.lengths)
    device = batch.input_ids.device
    labels = stretch(batch.labels, IGNORE_INDEX)
    return replace(
        batch,
        input_ids=stretch(batch.input_ids, 0),
        labels=labels,
        rows=(labels != IGNORE_INDEX).nonzero().squeeze(1) - 1,
        position_ids=torch.arange(longest, device=device).repeat(count),
        cu_seqlens=torch.arange(0, longest * count + 1, longest, dtype=torch.int32, device=device),
        lengths=[longest] * count,
        tails=[tail + longest - own for tail, own in zip(batch.tails, batch.lengths, strict=True)],
    )


EVERY = ("align", "sft", "anyres", "dpo")
SWITCHES = {
    "head and last layer on all rows": Switch(
        EVERY, {"head_on_all_rows": True, "prunes_last_layer": False}, alter=head_on_all_rows
    ),
    "last layer on all rows": Switch(EVERY, {"prunes_last_layer": False}, alter=last_layer_on_all_rows),
    "activation checkpointing": Switch(EVERY, {"recomputes": True}, options={"activation_checkpointing": "full"}),
    # with padding, the last layer cannot be computed only from some row on
    "padded to the longest, last layer on all rows": Switch(
        ("align", "sft", "anyres"),
        {"pads": True, "prunes_last_layer": False},
        alter=last_layer_on_all_rows,
        batch=padded,
    ),
    "gradients of frozen weights": Switch(
        ("align",), {"frozen_weight_gradients": True}, alter=gradients_of_frozen_weights
    ),
    "a prompt for each answer": Switch(("dpo",), {"shares_prompt": False}, alter=a_prompt_for_each_answer),
    "a tower for the reference": Switch(("dpo",), {"tower_passes": 2}, alter=a_tower_for_the_reference),
}
