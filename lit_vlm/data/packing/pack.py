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
from lit_vlm.data.index.sample_index import SampleIndex
from lit_vlm.formatting import format_count
from lit_vlm.types import UserError

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
    then best-fit by it, then with an even distribution of it. Then `rebalance` exchanges samples between packs. Steps
    that remain unbalanced are packed once more, by `_pack_by_capacity`.

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
    if world_size > 1:  # else no rank waits
        _pack_by_capacity(step_samples, pack_ids, limits, num_packs, world_size)
    return _assign_to_ranks(step_samples, pack_ids, num_packs, world_size)


def _pack_by_capacity(
    step_samples: StepSamples, pack_ids: np.ndarray, limits: MicroBatchLimits, num_packs: int, world_size: int
) -> None:
    """Change `pack_ids` in place for the steps that remain unbalanced: MULTIFIT (Coffman, Garey, Johnson 1978).

    Best-fit, heaviest sample first, with a capacity of FLOPs; bisection finds the smallest capacity in which all samples
    fit. It wins where a rank has two or three samples: an exchange between two packs cannot give one pack a heavy sample
    alone and three light ones to another.
    """
    best = _sum_slowest_packs(step_samples, pack_ids, num_packs, world_size)
    high = sum_per_pack(pack_ids, step_samples.flops, num_packs).max(axis=1)
    low = np.maximum(step_samples.flops.sum(axis=1) / num_packs, step_samples.flops.max(axis=1, initial=0))
    rows = np.flatnonzero(low < MIN_BALANCE * high)
    while len(rows):
        part, capacity = step_samples.select_steps(rows), (low[rows] + high[rows]) / 2
        packed, fits = _pack_greedily(part, part.flops, limits, num_packs, best_fit=True, capacity=capacity)
        slowest = _sum_slowest_packs(part, packed, num_packs, world_size)
        better = fits & (slowest < best[rows])
        pack_ids[rows[better]], best[rows[better]] = packed[better], slowest[better]
        low[rows], high[rows] = np.where(fits, low[rows], capacity), np.where(fits, capacity, high[rows])
        rows = rows[high[rows] > (1 + CAPACITY_STEP) * low[rows]]


def _sum_slowest_packs(step_samples: StepSamples, pack_ids: np.ndarray, num_packs: int, world_size: int) -> np.ndarray:
    """Sum the FLOPs of the slowest rank over the micro-batches of each step: [steps]."""
    load = -np.sort(-sum_per_pack(pack_ids, step_samples.flops, num_packs), axis=1)
    return load[:, ::world_size].sum(axis=1)


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
    step_samples: StepSamples,
    weight: np.ndarray,
    limits: MicroBatchLimits,
    num_packs: int,
    *,
    best_fit: bool = False,
    capacity: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Pack greedily: heaviest sample first (ties by sample number), each into the lightest pack in which it fits.

    Args:
        weight: [steps, samples] weight to balance, FLOPs or share of the limits.
        best_fit: choose the heaviest pack in which the sample fits, instead of the lightest.
        capacity: [steps], with `best_fit`: the most weight that a pack of a step holds.

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
            if capacity is not None:
                has_room &= load[tight] + weights[tight, None] <= capacity[tight, None]
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


TARGET_BALANCE = 0.995
MAX_ROUNDS = 8
MIN_BALANCE = 0.99  # of the heaviest pack to what it could be at best; a step below it is packed by capacity
CAPACITY_STEP = 0.002  # the bisection of the capacity ends here
MAX_CANDIDATES = 16  # samples of a pack that are considered; packs with more samples are balanced already
MAX_EXCHANGES = 1 << 20  # exchanges that are evaluated at once


def rebalance(
    step_samples: StepSamples,
    pack_ids: np.ndarray,
    limits: MicroBatchLimits,
    num_packs: int,
    target_balance: float = TARGET_BALANCE,
) -> None:
    """Rebalance packs in place: change `pack_ids` [steps, samples] int32, within the limits.

    Each round pairs the heaviest pack with the lightest, the second heaviest with the second lightest, and so on. Each
    pair exchanges two samples, or moves one, so that the difference of its FLOPs becomes as small as possible.

    Args:
        target_balance: mean over maximum FLOPs of a step's packs; a step that reaches it is not changed further.
    """
    if num_packs == 1:
        return
    list_size = min(MAX_CANDIDATES, int(_count_samples(pack_ids, step_samples.valid, num_packs).max())) + 1
    steps_per_block = max(1, MAX_EXCHANGES // (num_packs // 2 * list_size**2))
    for start in range(0, len(pack_ids), steps_per_block):
        rows = np.arange(start, min(start + steps_per_block, len(pack_ids)))
        table = _PackTable(step_samples.select_steps(rows), pack_ids[rows], num_packs, list_size)
        for _ in range(MAX_ROUNDS):
            if not table.run_round(limits, target_balance):
                break
        pack_ids[rows] = table.get_pack_ids()


class _PackTable:
    """Table of the packs of some steps: sample lists that end with a null sample; `sums` are FLOPs, tokens and tiles."""

    def __init__(self, step_samples: StepSamples, pack_ids: np.ndarray, num_packs: int, size: int) -> None:
        steps, width = pack_ids.shape
        self.initial_pack_ids, self.step_rows = pack_ids, np.arange(steps)[:, None]
        null_sample = np.zeros((steps, 1))
        self.weights = [
            np.hstack([column, null_sample]) for column in (step_samples.flops, step_samples.tokens, step_samples.tiles)
        ]
        flat_ids = pack_ids + self.step_rows * num_packs
        self.sums = [
            np.bincount(flat_ids.ravel(), column.ravel(), steps * num_packs).reshape(steps, num_packs)
            for column in (step_samples.flops, step_samples.tokens, step_samples.tiles)
        ]
        order = np.argsort(np.where(step_samples.valid, pack_ids, num_packs), axis=1, kind="stable")  # padding last
        sorted_pack = np.take_along_axis(pack_ids, order, 1)
        counts = _count_samples(pack_ids, step_samples.valid, num_packs)
        starts = np.cumsum(counts, axis=1) - counts
        slot = np.arange(width) - np.take_along_axis(starts, sorted_pack, 1)
        is_member = np.take_along_axis(step_samples.valid, order, 1) & (slot < size - 1)
        self.members = np.full((steps, num_packs, size), width)  # width: the null sample
        step, column = np.nonzero(is_member)
        self.members[step, sorted_pack[is_member], slot[is_member]] = order[step, column]

    def run_round(self, limits: MicroBatchLimits, target_balance: float) -> bool:
        """Run one round of exchanges; return True if anything changed."""
        work = self.sums[0]
        unbalanced = np.flatnonzero(work.mean(axis=1) < target_balance * work.max(axis=1))
        if not len(unbalanced):
            return False
        half = work.shape[1] // 2
        order = np.argsort(work[unbalanced], axis=1, kind="stable")
        rows, light, heavy = unbalanced[:, None], order[:, :half], order[:, ::-1][:, :half]
        heavy_samples, light_samples = self.members[rows, heavy], self.members[rows, light]
        differences = [
            w[rows[..., None], heavy_samples][..., None] - w[rows[..., None], light_samples][..., None, :]
            for w in self.weights
        ]
        gap = (work[rows, heavy] - work[rows, light])[..., None, None]
        allowed = (differences[0] > 0) & (differences[0] < gap)
        for sums, difference, limit in zip(
            self.sums[1:], differences[1:], (limits.max_tokens, limits.max_tiles), strict=True
        ):
            allowed &= (difference <= (limit - sums[rows, light])[..., None, None]) & (
                -difference <= (limit - sums[rows, heavy])[..., None, None]
            )
        distance = np.where(allowed, np.abs(differences[0] - gap / 2), np.inf).reshape(*heavy.shape, -1)
        best = distance.argmin(axis=-1)
        row, pair = np.nonzero(np.isfinite(np.take_along_axis(distance, best[..., None], -1)[..., 0]))
        self._apply_exchanges(unbalanced[row], heavy[row, pair], light[row, pair], best[row, pair])
        return len(row) > 0

    def _apply_exchanges(self, steps: np.ndarray, heavy: np.ndarray, light: np.ndarray, best: np.ndarray) -> None:
        heavy_slot, light_slot = np.divmod(best, self.members.shape[2])
        moved_out, moved_in = self.members[steps, heavy, heavy_slot], self.members[steps, light, light_slot]
        self.members[steps, heavy, heavy_slot], self.members[steps, light, light_slot] = moved_in, moved_out
        for sums, weights in zip(self.sums, self.weights, strict=True):
            difference = weights[steps, moved_out] - weights[steps, moved_in]
            sums[steps, heavy] -= difference
            sums[steps, light] += difference

    def get_pack_ids(self) -> np.ndarray:
        """Return the current pack ids, [steps, samples] int32."""
        steps, width = self.initial_pack_ids.shape
        changed = np.hstack([self.initial_pack_ids, np.zeros((steps, 1), dtype=self.initial_pack_ids.dtype)])
        number = np.broadcast_to(np.arange(self.members.shape[1])[:, None], self.members.shape[1:])
        np.put_along_axis(changed, self.members.reshape(steps, -1), np.tile(number.ravel(), (steps, 1)), 1)
        return changed[:, :width]


def _count_samples(pack_ids: np.ndarray, valid: np.ndarray, num_packs: int) -> np.ndarray:
    """Count the samples of each pack: [steps, packs]."""
    flat_ids = (pack_ids + np.arange(len(pack_ids))[:, None] * num_packs)[valid]
    return np.bincount(flat_ids, minlength=len(pack_ids) * num_packs).reshape(len(pack_ids), num_packs)
