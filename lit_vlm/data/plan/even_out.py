"""Packs that were dealt greedily are made more equal by exchanging single samples, many packs at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from lit_vlm.data.plan.deal import Caps, Hand

GOOD = 0.995
ROUNDS = 8
CANDIDATES = 16  # samples of a pack that are looked at; packs of more are even already
ELEMENTS = 1 << 20  # exchanges that are weighed at once


def even_out(hand: Hand, pack: np.ndarray, caps: Caps, num_packs: int, good: float = GOOD) -> None:
    """Change `pack` in place: [steps, samples] int32, kept under the caps.

    In each round the heaviest pack meets the lightest, the second heaviest the second lightest, and so on; each two
    exchange the samples (or move the one) that bring them closest.

    Args:
        good: mean over max work at which a step is left alone.
    """
    if num_packs == 1:
        return
    size = min(CANDIDATES, int(_counts(pack, hand.there, num_packs).max())) + 1
    height = max(1, ELEMENTS // (num_packs // 2 * size**2))
    for start in range(0, len(pack), height):
        rows = np.arange(start, min(start + height, len(pack)))
        table = _Table(hand.rows(rows), pack[rows], num_packs, size)
        for _ in range(ROUNDS):
            if not table.exchange(caps, good):
                break
        pack[rows] = table.pack()


class _Table:
    """Packs of some steps as lists of samples, a null sample behind them; sums[3] are work, tokens and tiles."""

    def __init__(self, hand: Hand, pack: np.ndarray, num_packs: int, size: int) -> None:
        steps, width = pack.shape
        self.dealt, self.rows = pack, np.arange(steps)[:, None]
        null = np.zeros((steps, 1))
        self.weights = [np.hstack([column, null]) for column in (hand.work, hand.tokens, hand.tiles)]
        places = pack + self.rows * num_packs
        self.sums = [
            np.bincount(places.ravel(), column.ravel(), steps * num_packs).reshape(steps, num_packs)
            for column in (hand.work, hand.tokens, hand.tiles)
        ]
        order = np.argsort(np.where(hand.there, pack, num_packs), axis=1, kind="stable")  # fillers last
        sorted_pack = np.take_along_axis(pack, order, 1)
        counts = _counts(pack, hand.there, num_packs)
        starts = np.cumsum(counts, axis=1) - counts
        seat = np.arange(width) - np.take_along_axis(starts, sorted_pack, 1)
        held = np.take_along_axis(hand.there, order, 1) & (seat < size - 1)
        self.members = np.full((steps, num_packs, size), width)  # width: the null sample
        step, column = np.nonzero(held)
        self.members[step, sorted_pack[held], seat[held]] = order[step, column]

    def exchange(self, caps: Caps, good: float) -> bool:
        """One round; whether anything changed."""
        work = self.sums[0]
        todo = np.flatnonzero(work.mean(axis=1) < good * work.max(axis=1))
        if not len(todo):
            return False
        half = work.shape[1] // 2
        order = np.argsort(work[todo], axis=1, kind="stable")
        rows, light, heavy = todo[:, None], order[:, :half], order[:, ::-1][:, :half]
        ours, theirs = self.members[rows, heavy], self.members[rows, light]
        moved = [w[rows[..., None], ours][..., None] - w[rows[..., None], theirs][..., None, :] for w in self.weights]
        gap = (work[rows, heavy] - work[rows, light])[..., None, None]
        allowed = (moved[0] > 0) & (moved[0] < gap)
        for sums, more, most in zip(self.sums[1:], moved[1:], (caps.tokens, caps.tiles), strict=True):
            allowed &= (more <= (most - sums[rows, light])[..., None, None]) & (
                -more <= (most - sums[rows, heavy])[..., None, None]
            )
        distance = np.where(allowed, np.abs(moved[0] - gap / 2), np.inf).reshape(*heavy.shape, -1)
        best = distance.argmin(axis=-1)
        row, pair = np.nonzero(np.isfinite(np.take_along_axis(distance, best[..., None], -1)[..., 0]))
        self._apply(todo[row], heavy[row, pair], light[row, pair], best[row, pair])
        return len(row) > 0

    def _apply(self, steps: np.ndarray, heavy: np.ndarray, light: np.ndarray, best: np.ndarray) -> None:
        mine, other = np.divmod(best, self.members.shape[2])
        given, taken = self.members[steps, heavy, mine], self.members[steps, light, other]
        self.members[steps, heavy, mine], self.members[steps, light, other] = taken, given
        for sums, weights in zip(self.sums, self.weights, strict=True):
            more = weights[steps, given] - weights[steps, taken]
            sums[steps, heavy] -= more
            sums[steps, light] += more

    def pack(self) -> np.ndarray:
        """[steps, samples] int32, the packs as they are now."""
        steps, width = self.dealt.shape
        changed = np.hstack([self.dealt, np.zeros((steps, 1), dtype=self.dealt.dtype)])
        number = np.broadcast_to(np.arange(self.members.shape[1])[:, None], self.members.shape[1:])
        np.put_along_axis(changed, self.members.reshape(steps, -1), np.tile(number.ravel(), (steps, 1)), 1)
        return changed[:, :width]


def _counts(pack: np.ndarray, there: np.ndarray, num_packs: int) -> np.ndarray:
    """[steps, packs] samples of each."""
    places = (pack + np.arange(len(pack))[:, None] * num_packs)[there]
    return np.bincount(places, minlength=len(pack) * num_packs).reshape(len(pack), num_packs)
