"""Analytical FLOPs of an optimizer step: those that a trainer executes, and the minimum that the step needs.

A multiply-add counts as two FLOPs. A matrix of N weights costs 2N per token in the forward pass, 2N for the gradient of its
input and 2N for the gradient of its weights. Causal attention over T tokens of width a costs 2 T^2 a per layer in the
forward pass and twice that in the backward pass. A dense mask doubles both. The ratio of two recipes over the same records
is the maximum speed-up if both reach the same FLOP/s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lit_vlm.cost.model_shape import ModelShape


@dataclass(frozen=True, slots=True)
class RecordSize:
    """Token counts of one record: a sample has one answer, a preference pair has two."""

    prompt: int  # tokens before the (first) answer, image tokens included
    answers: tuple[int, ...]  # tokens of each answer, including what follows it in the row
    supervised: tuple[int, ...]  # supervised tokens of each answer
    tiles: int

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each sequence if each one includes the prompt."""
        return tuple(self.prompt + answer for answer in self.answers)


@dataclass(frozen=True, slots=True)
class Recipe:
    """Description of the work in a training step. The defaults are the exact minimum, except for `prunes_last_layer`."""

    trains_tower: bool = False
    trains_projector: bool = True
    trains_language_model: bool = True
    recomputes: bool = False  # activation checkpointing of all layers
    head_on_all_rows: bool = False
    head_recomputes: bool = False  # logits are recomputed in the backward pass
    frozen_weight_gradients: bool = False  # for a frozen language model that gradients pass through
    pads: bool = False  # pad to the longest sequence of a micro-batch
    dense_mask: bool = False  # compute full attention squares, then apply a mask
    micro_batches: int = 1  # number of micro-batches, sorted by length, with equal numbers of records
    prunes_last_layer: bool = False  # compute its queries, output and MLP only for supervised rows
    # preference optimisation
    shares_prompt: bool = True
    tower_passes: float = 1  # passes per tile, policy plus reference
    reference: float = 0.0  # reference-model forward passes per step: 1 online, 1 / epochs if cached


def compute_step_flops(shape: ModelShape, recipe: Recipe, sizes: Sequence[RecordSize]) -> float:
    """Compute the FLOPs of one optimizer step over these records: forward and backward, without the optimizer."""
    sorted_sizes = sorted(sizes, key=lambda size: max(size.lengths)) if recipe.micro_batches > 1 else list(sizes)
    records_per_batch = -(-len(sorted_sizes) // recipe.micro_batches)
    micro_batches = [
        sorted_sizes[start : start + records_per_batch] for start in range(0, len(sorted_sizes), records_per_batch)
    ]
    return sum(_compute_micro_batch(shape, recipe, part) for part in micro_batches)


def compute_ratio_bound(shape: ModelShape, peer: Recipe, ours: Recipe, sizes: Sequence[Sequence[RecordSize]]) -> float:
    """Compute the maximum speed-up of `ours` over `peer` for these steps, from FLOPs alone."""
    return sum(compute_step_flops(shape, peer, step) for step in sizes) / sum(
        compute_step_flops(shape, ours, step) for step in sizes
    )


def _compute_micro_batch(shape: ModelShape, recipe: Recipe, sizes: Sequence[RecordSize]) -> float:
    learns = int(recipe.trains_language_model)
    backward = 1 + max(learns, int(recipe.frozen_weight_gradients))
    policy = _compute_language_model(shape, recipe, sizes, 1 + backward + recipe.recomputes, 3 + recipe.recomputes)
    policy += _compute_head(shape, recipe, sizes, 1 + backward + recipe.head_recomputes)
    reference = _compute_language_model(shape, recipe, sizes, 1, 1) + _compute_head(shape, recipe, sizes, 1)
    tiles = sum(size.tiles for size in sizes)
    return policy + recipe.reference * reference + tiles * _compute_tile(shape, recipe)


def _compute_language_model(
    shape: ModelShape, recipe: Recipe, sizes: Sequence[RecordSize], passes: int, attention_passes: int
) -> float:
    """Compute the FLOPs of the language-model layers.

    Matrix products count `passes` times (forward, two gradients, recomputation), attention `attention_passes` times.
    """
    text = shape.text
    longest = max(length for size in sizes for length in size.lengths)
    linear = squares = pruned = 0.0
    for size in sizes:
        shares = recipe.shares_prompt and len(size.answers) > 1
        lengths = [longest] * len(size.answers) if recipe.pads else list(size.lengths)
        rows = size.prompt + sum(size.answers) if shares else sum(lengths)
        linear += rows
        # answers of a pair attend to the prompt and to themselves; the prompt attends to itself once
        pair_squares = size.prompt**2 + sum(2 * answer * size.prompt + answer**2 for answer in size.answers)
        squares += pair_squares if shares else sum(length**2 for length in lengths)
        pruned += rows - sum(size.supervised)
    per_square = (4.0 if recipe.dense_mask else 2.0) * text.query_width * text.num_layers
    total = 2.0 * text.num_layers * text.layer_parameters * linear * passes + per_square * squares * attention_passes
    if recipe.prunes_last_layer:
        prunable = (
            text.layer_parameters - 2 * text.hidden_size * text.key_width
        )  # keys and values are needed for all rows
        total -= (
            2.0 * prunable * pruned * passes
            + per_square / text.num_layers * squares * attention_passes * pruned / linear
        )
    return total


def _compute_head(shape: ModelShape, recipe: Recipe, sizes: Sequence[RecordSize], passes: int) -> float:
    longest = max(length for size in sizes for length in size.lengths)
    rows = 0
    for size in sizes:
        if not recipe.head_on_all_rows:
            rows += sum(size.supervised)
        elif recipe.pads:
            rows += longest * len(size.answers)
        else:
            rows += size.prompt + sum(size.answers) if recipe.shares_prompt else sum(size.lengths)
    return 2.0 * shape.text.hidden_size * shape.text.vocab_size * rows * passes


def _compute_tile(shape: ModelShape, recipe: Recipe) -> float:
    """Compute the FLOPs of vision tower and projector for one tile."""
    vision, patches = shape.vision, shape.vision.num_patches
    pixels = 3 * vision.image_size**2 // patches  # input values per patch of the first tower matrix
    tower = (
        2.0 * vision.num_layers * vision.layer_parameters * patches
        + 4.0 * patches**2 * vision.hidden_size * vision.num_layers
    )
    tower += 2.0 * pixels * vision.hidden_size * patches
    first, second = (
        2.0 * patches * vision.hidden_size * shape.text.hidden_size,
        2.0 * patches * shape.text.hidden_size**2,
    )
    passes = recipe.tower_passes + (2 + recipe.recomputes) * recipe.trains_tower
    if not recipe.trains_projector:
        return passes * tower + recipe.tower_passes * (first + second)
    # with a frozen tower, the input gradient of the first matrix is not needed
    return passes * tower + 3 * second + (3 if recipe.trains_tower else 2) * first
