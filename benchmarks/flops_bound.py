"""FLOPs of an optimizer step as arithmetic: what a trainer makes the device do, and the least that the step needs.

A multiply-add is two. A matrix of N weights costs 2N per token forward, 2N for the gradient that passes through it and
2N for its own gradient. Causal attention over T tokens of width a costs 2 T^2 a per layer forward and twice that
backward; under a dense mask twice as much of both. Two recipes over the same records give the speed-up that arithmetic
alone allows, where both reach the same FLOP/s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lit_vlm.cost.shape import Shape


@dataclass(frozen=True, slots=True)
class Size:
    """One record: a sample has one answer, a pair has two."""

    prompt: int  # tokens before the (first) answer, those of its images included
    answers: tuple[int, ...]  # tokens of each, what follows it in the row included
    supervised: tuple[int, ...]  # of them supervised
    tiles: int

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each sequence when each carries the prompt itself."""
        return tuple(self.prompt + answer for answer in self.answers)


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a trainer does a step. The defaults are the least that is exact, but for `prunes_last_layer`."""

    trains_tower: bool = False
    trains_projector: bool = True
    trains_language_model: bool = True
    recomputes: bool = False  # activation checkpointing of all layers
    head_on_all_rows: bool = False
    head_recomputes: bool = False  # logits are made again in backward
    frozen_weight_gradients: bool = False  # of a language model that is frozen and crossed
    pads: bool = False  # to the longest of a micro-batch
    dense_mask: bool = False  # attention over whole squares, which a mask then empties
    micro_batches: int = 1  # sorted by length, of equal numbers of records
    prunes_last_layer: bool = False  # its queries, output and MLP on supervised rows alone
    # preferences
    shares_prompt: bool = True
    tower_passes: float = 1  # of each tile, policy and reference together
    reference: float = 0.0  # forward passes of the reference in a step: 1 online, 1 / epochs when it is kept


def step_flops(shape: Shape, recipe: Recipe, sizes: Sequence[Size]) -> float:
    """FLOPs of one optimizer step over these records, forward and backward, without the optimizer."""
    ordered = sorted(sizes, key=lambda size: max(size.lengths)) if recipe.micro_batches > 1 else list(sizes)
    each = -(-len(ordered) // recipe.micro_batches)
    micro_batches = [ordered[start : start + each] for start in range(0, len(ordered), each)]
    return sum(_micro_batch(shape, recipe, part) for part in micro_batches)


def ratio_bound(shape: Shape, peer: Recipe, ours: Recipe, sizes: Sequence[Sequence[Size]]) -> float:
    """How many times faster `ours` can be than `peer` over these steps, by arithmetic alone."""
    return sum(step_flops(shape, peer, step) for step in sizes) / sum(step_flops(shape, ours, step) for step in sizes)


def _micro_batch(shape: Shape, recipe: Recipe, sizes: Sequence[Size]) -> float:
    learns = int(recipe.trains_language_model)
    backward = 1 + max(learns, int(recipe.frozen_weight_gradients))
    policy = _language_model(shape, recipe, sizes, 1 + backward + recipe.recomputes, 3 + recipe.recomputes)
    policy += _head(shape, recipe, sizes, 1 + backward + recipe.head_recomputes)
    reference = _language_model(shape, recipe, sizes, 1, 1) + _head(shape, recipe, sizes, 1)
    tiles = sum(size.tiles for size in sizes)
    return policy + recipe.reference * reference + tiles * _tile(shape, recipe)


def _language_model(shape: Shape, recipe: Recipe, sizes: Sequence[Size], passes: int, attention_passes: int) -> float:
    """Its layers: matrices `passes` times (forward, the two gradients, again), attention `attention_passes` times."""
    text = shape.text
    longest = max(length for size in sizes for length in size.lengths)
    linear = squares = pruned = 0.0
    for size in sizes:
        shares = recipe.shares_prompt and len(size.answers) > 1
        lengths = [longest] * len(size.answers) if recipe.pads else list(size.lengths)
        rows = size.prompt + sum(size.answers) if shares else sum(lengths)
        linear += rows
        # a pair's answers look at the prompt and at themselves; the prompt looks at itself once
        looks = size.prompt**2 + sum(2 * answer * size.prompt + answer**2 for answer in size.answers)
        squares += looks if shares else sum(length**2 for length in lengths)
        pruned += rows - sum(size.supervised)
    per_square = (4.0 if recipe.dense_mask else 2.0) * text.query * text.layers
    total = 2.0 * text.layers * text.layer * linear * passes + per_square * squares * attention_passes
    if recipe.prunes_last_layer:
        most = text.layer - 2 * text.hidden * text.key  # keys and values are needed of every row
        total -= 2.0 * most * pruned * passes + per_square / text.layers * squares * attention_passes * pruned / linear
    return total


def _head(shape: Shape, recipe: Recipe, sizes: Sequence[Size], passes: int) -> float:
    longest = max(length for size in sizes for length in size.lengths)
    rows = 0
    for size in sizes:
        if not recipe.head_on_all_rows:
            rows += sum(size.supervised)
        elif recipe.pads:
            rows += longest * len(size.answers)
        else:
            rows += size.prompt + sum(size.answers) if recipe.shares_prompt else sum(size.lengths)
    return 2.0 * shape.text.hidden * shape.text.vocab * rows * passes


def _tile(shape: Shape, recipe: Recipe) -> float:
    """Tower and projector over one tile."""
    vision, patches = shape.vision, shape.vision.patches
    pixels = 3 * vision.image_size**2 // patches  # of a patch, which the tower's first matrix reads
    tower = 2.0 * vision.layers * vision.layer * patches + 4.0 * patches**2 * vision.width * vision.layers
    tower += 2.0 * pixels * vision.width * patches
    first, second = 2.0 * patches * vision.width * shape.text.hidden, 2.0 * patches * shape.text.hidden**2
    passes = recipe.tower_passes + (2 + recipe.recomputes) * recipe.trains_tower
    if not recipe.trains_projector:
        return passes * tower + recipe.tower_passes * (first + second)
    # the gradient for the first matrix's input goes nowhere when the tower is frozen
    return passes * tower + 3 * second + (3 if recipe.trains_tower else 2) * first
