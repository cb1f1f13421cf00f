"""The ablation ladder: tricks of this library, each switched off by itself, beside what arithmetic predicts for it.

A switch is an entry of `SWITCHES`. It lives here and not in the product: nobody wants to train like that.
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
    """One trick, off.

    Attributes:
        stages: that have it.
        recipe: what is done instead, in the words of `Recipe`.
        options: of the stage.
        alter: changes the contender once it is built.
        batch: changes each micro-batch.
    """

    stages: tuple[str, ...]
    recipe: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    alter: Callable[[Ours], None] = lambda contender: None
    batch: Callable[[Batch], Batch] = lambda batch: batch

    def contender(self, name: str, case: Case, place: Place) -> Ours:
        return Ours(case, place, name=name, options=self.options, alter=self.alter, batch=self.batch)

    def predicted(self, case: Case) -> Recipe:
        return replace(case.recipe(OURS), **self.recipe)


class HeadOnAllRows(FlatOnevision):
    """Scores every row and then takes the supervised ones."""

    def forward(self, *args: Any, batch: Batch | None = None, seen: torch.Tensor | None = None, **kwargs: Any) -> Any:
        if batch is None or kwargs.get("embeddings_only"):
            return super().forward(*args, batch=batch, **kwargs)
        seen = self.model.look_at(batch) if seen is None else seen
        hidden = self.model(batch=batch, seen=seen)
        scores = self.lm_head(hidden, batch.input_ids.roll(-1), bool(kwargs.get("statistics")))
        rows = tuple(score.index_select(0, batch.rows) for score in scores)
        return (*rows, seen.detach()) if kwargs.get("statistics") else rows


class LastLayerOnAllRows(FlatOnevisionModel):
    prunes_last_layer = False


def head_on_all_rows(contender: Ours) -> None:
    """The last layer as well: the head reads what it leaves."""
    for model in contender.models:
        model.__class__ = HeadOnAllRows


def last_layer_on_all_rows(contender: Ours) -> None:
    for model in contender.models:
        model.model.__class__ = LastLayerOnAllRows


def a_prompt_for_each_answer(contender: Ours) -> None:
    contender.processor = Processor(contender.processor.tokenizer, contender.processor.images, share_prompts=False)


class LooksAgain(DPOStage):
    """The reference looks at the pictures through a tower of its own."""

    shares_tower = False


def a_tower_for_the_reference(contender: Ours) -> None:
    contender.stage.__class__ = LooksAgain
    contender.stage.reference.model.vision_tower = copy.deepcopy(contender.stage.model.model.vision_tower)


def gradients_of_frozen_weights(contender: Ours) -> None:
    """The language model's weights get gradients that nobody uses, as under adapters everywhere or flat parameters."""
    assert Part.language_model not in contender.case.trainable
    contender.stage.model.model.language_model.requires_grad_(True)
    contender.stage.model.lm_head.requires_grad_(True)


def padded(batch: Batch) -> Batch:
    """Each segment as long as the longest; what is added is behind every real token and supervises nothing."""

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
    # a padded row has no end from which on the last layer could be computed
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
