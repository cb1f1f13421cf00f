"""Rebalancing of packed steps: exchange single samples between micro-batches until their FLOPs are nearly equal."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from lit_vlm.data.plan.deal import MicroBatchLimits, StepSamples

TARGET_BALANCE = 0.995
MAX_ROUNDS = 8
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
