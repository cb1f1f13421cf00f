"""Packing: split the samples of each optimizer step into micro-batches with balanced FLOPs, under token and tile limits.

A pack is the list of samples of one micro-batch of one rank. A step has `accumulate_grad_batches * world_size` packs
(gradient accumulation times ranks). All ranks wait for the slowest rank: after each micro-batch with FSDP and ZeRO-3,
at the end of the step with DDP. So packs get FLOPs that are as equal as possible. Packs that remain unequal share a
micro-batch with packs of similar FLOPs, and the sums of the ranks are balanced. Many steps are packed at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from functools import partial

import numpy as np

from lit_vlm.cost import Flops
from lit_vlm.data.index.columns import SampleIndex
from lit_vlm.data.plan.even_out import rebalance
from lit_vlm.types import UserError, format_count

MAX_MATRIX_ELEMENTS = (
    1 << 17
)  # of the largest matrix, steps x packs or steps x samples; about the size of a core's cache


@dataclass(frozen=True, slots=True)
class MicroBatchLimits:
    """Token and tile limits of one micro-batch (pack)."""

    max_tokens: int
    max_tiles: int


@dataclass(slots=True)
class StepSamples:
    """Samples of several optimizer steps, one row for each step; short rows are padded with samples of zero FLOPs."""

    positions: np.ndarray  # [steps, samples] int64, index into the sample sequence of all steps
    sample_ids: np.ndarray  # uint32, row in the index
    valid: np.ndarray  # bool; False: padding
    flops: np.ndarray  # float64
    tokens: np.ndarray  # int64
    tiles: np.ndarray

    def select_steps(self, steps: np.ndarray) -> StepSamples:
        """Select rows: the samples of the steps `steps`."""
        return StepSamples(*(getattr(self, item.name)[steps] for item in fields(self)))


def pack_steps(
    index: SampleIndex,
    flops: Flops,
    sample_sequence: np.ndarray,
    step_ends: np.ndarray,
    limits: MicroBatchLimits,
    world_size: int,
) -> tuple[int, np.ndarray]:
    """Pack every step into `accumulate_grad_batches * world_size` packs and find the number of gradient accumulation steps.

    `accumulate_grad_batches` is the smallest number with which every pack of every step is within the limits.

    Args:
        sample_sequence: [total samples] uint32, index rows of all steps, one step after another.
        step_ends: [steps] int64, end of each step in `sample_sequence`.

    Returns:
        `accumulate_grad_batches`, and [total samples] the pack id of each sample: `micro_batch * world_size + rank`.

    Raises:
        UserError: a single sample exceeds a limit.
    """
    _validate_sample_sizes(index, limits)
    begins = np.concatenate([[0], step_ends[:-1]])
    tokens, tiles = (np.add.reduceat(c[sample_sequence], begins, dtype=np.int64) for c in (index.tokens, index.tiles))
    required_micro_batches = np.maximum(tokens / limits.max_tokens, tiles / limits.max_tiles) / world_size
    # The fullest steps come first: a number that is too small fails in the first block.
    fullest_first = np.argsort(-required_micro_batches, kind="stable")
    accumulate_grad_batches = max(1, math.ceil(required_micro_batches.max()))
    pack_ids = np.empty(len(sample_sequence), dtype=np.uint16)
    while True:
        num_packs = accumulate_grad_batches * world_size
        if num_packs > np.iinfo(pack_ids.dtype).max:
            pack_ids = pack_ids.astype(np.uint32)
        steps_per_block = max(1, MAX_MATRIX_ELEMENTS // max(num_packs, int((step_ends - begins).max())))
        for start in range(0, len(step_ends), steps_per_block):
            step_samples = gather_steps(
                index, flops, sample_sequence, step_ends, fullest_first[start : start + steps_per_block]
            )
            packed = try_pack(step_samples, limits, num_packs, world_size)
            if packed is None:
                break
            pack_ids[step_samples.positions[step_samples.valid]] = packed[step_samples.valid]
        else:
            return accumulate_grad_batches, pack_ids
        accumulate_grad_batches += 1


def _validate_sample_sizes(index: SampleIndex, limits: MicroBatchLimits) -> None:
    """Raise UserError if a single sample exceeds a limit."""
    for column, limit, key in ((index.tokens, limits.max_tokens, "tokens"), (index.tiles, limits.max_tiles, "tiles")):
        too_large = np.flatnonzero(column > limit)
        if len(too_large):
            raise UserError(
                f"{format_count(len(too_large), 'sample has', 'samples have')} more than data.{key}_per_micro_batch={limit} {key}, the largest "
                f"{column.max():,}. Raise data.{key}_per_micro_batch, or let data.on_overlong handle them."
            )


def gather_steps(
    index: SampleIndex, flops: Flops, sample_sequence: np.ndarray, step_ends: np.ndarray, steps: np.ndarray
) -> StepSamples:
    """Gather the samples of some steps from the sample sequence, padded to the longest of these steps.

    Args:
        sample_sequence: [total samples] index rows of all steps, one after another.
        step_ends: [steps] end of each step in `sample_sequence`.
        steps: numbers of the steps to gather.
    """
    begins = np.where(steps > 0, step_ends[steps - 1], 0)
    positions = begins[:, None] + np.arange((step_ends[steps] - begins).max(initial=0))
    valid = positions < step_ends[steps][:, None]
    samples = sample_sequence[np.where(valid, positions, 0)]
    columns = (index.tokens[samples], index.squares[samples], index.tiles[samples], index.supervised[samples])
    tokens, squares, tiles, supervised = (np.where(valid, column, 0).astype(np.int64) for column in columns)
    return StepSamples(positions, samples, valid, flops.compute(tokens, squares, tiles, supervised), tokens, tiles)


def try_pack(step_samples: StepSamples, limits: MicroBatchLimits, num_packs: int, world_size: int) -> np.ndarray | None:
    """Pack some steps into a fixed number of packs; return None if a step does not fit within the limits.

    Greedy packing assigns the sample with the most FLOPs first, to the pack with the fewest FLOPs (longest processing
    time first). A step that then exceeds a limit is packed again: greedily by the scarce resource (tokens or tiles),
    then best-fit by it, then with an even distribution of it. Last, `rebalance` exchanges samples between packs.

    Returns:
        [steps, samples] int32, pack id of each sample: `micro_batch * world_size + rank`; or None.
    """
    scarce = np.maximum(step_samples.tokens / limits.max_tokens, step_samples.tiles / limits.max_tiles)
    pack_ids, fits = _pack_greedily(step_samples, step_samples.flops, limits, num_packs)
    for method in (_pack_greedily, partial(_pack_greedily, best_fit=True), _balance_scarce_resource):
        remaining = np.flatnonzero(~fits)
        if len(remaining):
            pack_ids[remaining], fits[remaining] = method(
                step_samples.select_steps(remaining), scarce[remaining], limits, num_packs
            )
    if not fits.all():
        return None
    rebalance(step_samples, pack_ids, limits, num_packs)
    return _assign_to_ranks(step_samples, pack_ids, num_packs, world_size)


def _balance_scarce_resource(
    step_samples: StepSamples, weight: np.ndarray, limits: MicroBatchLimits, num_packs: int
) -> tuple[np.ndarray, np.ndarray]:
    """Balance the scarce resource by exchanges that ignore the limits: this also packs steps whose packs must all be full.

    Returns the same as `_pack_greedily`.
    """
    step_samples, no_limits = replace(step_samples, flops=weight), MicroBatchLimits(1 << 62, 1 << 62)
    pack_ids, _ = _pack_greedily(step_samples, weight, no_limits, num_packs)
    rebalance(step_samples, pack_ids, no_limits, num_packs, target_balance=1.0)
    tokens, tiles = (
        sum_per_pack(pack_ids, column, num_packs).max(axis=1) for column in (step_samples.tokens, step_samples.tiles)
    )
    return pack_ids, (tokens <= limits.max_tokens) & (tiles <= limits.max_tiles)


def _pack_greedily(
    step_samples: StepSamples, weight: np.ndarray, limits: MicroBatchLimits, num_packs: int, *, best_fit: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Pack greedily: heaviest sample first (ties by sample number), each into the lightest pack in which it fits.

    Args:
        weight: [steps, samples] weight to balance, FLOPs or share of the limits.
        best_fit: choose the heaviest pack in which the sample fits, instead of the lightest.

    Returns:
        [steps, samples] int32 pack ids, and [steps] bool: True if all samples fit.
    """
    num_steps, num_samples = step_samples.sample_ids.shape
    order = np.lexsort((step_samples.sample_ids, -weight), axis=-1)
    columns = [
        np.take_along_axis(column, order, 1).T.copy() for column in (weight, step_samples.tokens, step_samples.tiles)
    ]
    load = np.zeros((num_steps, num_packs))
    tokens, tiles = np.full(load.shape, limits.max_tokens), np.full(load.shape, limits.max_tiles)
    fits, rows = np.ones(num_steps, dtype=bool), np.arange(num_steps)
    chosen = np.empty((num_samples, num_steps), dtype=np.int32)
    for position, (weights, sample_tokens, sample_tiles) in enumerate(zip(*columns, strict=True)):
        choice = load.argmin(1)
        tight = (tokens[rows, choice] < sample_tokens) | (tiles[rows, choice] < sample_tiles)
        if best_fit:
            tight[:] = True
        if tight.any():
            has_room = (tokens[tight] >= sample_tokens[tight, None]) & (tiles[tight] >= sample_tiles[tight, None])
            score = -load[tight] if best_fit else load[tight]
            choice[tight] = np.where(has_room, score, np.inf).argmin(1)
            fits[tight] &= has_room.any(1)
        load[rows, choice] += weights
        tokens[rows, choice] -= sample_tokens
        tiles[rows, choice] -= sample_tiles
        chosen[position] = choice
    pack_ids = np.empty((num_steps, num_samples), dtype=np.int32)
    np.put_along_axis(pack_ids, order, chosen.T, 1)
    return pack_ids, fits


def _assign_to_ranks(step_samples: StepSamples, pack_ids: np.ndarray, num_packs: int, world_size: int) -> np.ndarray:
    """Assign packs to micro-batches and ranks, and return the new pack ids [steps, samples].

    Packs of similar FLOPs share a micro-batch. Within it, the rank with the largest sum so far gets the smallest pack.
    """
    load = sum_per_pack(pack_ids, step_samples.flops, num_packs)
    order = np.argsort(-load, axis=1, kind="stable").reshape(len(load), -1, world_size)
    new_pack_ids = np.empty(load.shape, dtype=np.int32)
    totals = np.zeros((len(load), world_size))
    for micro_batch in range(num_packs // world_size):
        ranks = np.argsort(totals, axis=1, kind="stable")
        np.put_along_axis(new_pack_ids, order[:, micro_batch], (micro_batch * world_size + ranks).astype(np.int32), 1)
        added_load = np.take_along_axis(load, order[:, micro_batch], 1)
        np.put_along_axis(totals, ranks, np.take_along_axis(totals, ranks, 1) + added_load, 1)
    return np.take_along_axis(new_pack_ids, pack_ids, 1)


def sum_per_pack(pack_ids: np.ndarray, weight: np.ndarray, num_packs: int) -> np.ndarray:
    """Sum `weight` in each pack: [steps, packs] float64."""
    flat_ids = pack_ids + np.arange(len(pack_ids))[:, None] * num_packs
    return np.bincount(flat_ids.ravel(), weight.ravel(), len(pack_ids) * num_packs).reshape(len(pack_ids), num_packs)
