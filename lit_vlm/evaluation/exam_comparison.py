"""Paired comparison of two exams on the same items: per cell an interval of the difference, corrected for the number of cells.

The two models answer the same items, so the difference of each item is known. Its variance has no part from the difficulty of
the items, which an unpaired comparison has.

Bonferroni's correction: each interval has the level 1 - 0.05 / cells, so that with a probability of at least 95 % no cell of an
unchanged model counts as changed. The cells of different kinds share no items, so they are nearly independent, and max-T would
give nearly the same intervals. Bonferroni also holds for the cells that share items (token obedience and the mean of all).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache

import numpy as np
from scipy import special

from lit_vlm.evaluation.exam import ALL_CELL, ExamAnswers
from lit_vlm.types import UserError

ERROR_RATE = 0.05  # probability that at least one cell of an unchanged model counts as changed
NUM_RESAMPLES = 40_000
BOOTSTRAP_SEED = 0


class Verdict(StrEnum):
    """Result of a comparison in one cell."""

    gained = "gained"
    lost = "lost"
    unchanged = "no difference"


@dataclass(frozen=True, slots=True)
class CellDifference:
    """Paired difference of two exams in one cell.

    Attributes:
        cell: name of the cell, such as "caption_ko_easy".
        num_items: number of items.
        before, after: mean score of each model, 0 to 1.
        low, high: ends of the interval of after - before, corrected for the number of cells.
    """

    cell: str
    num_items: int
    before: float
    after: float
    low: float
    high: float

    @property
    def difference(self) -> float:
        """Mean difference of the items, -1 to 1."""
        return self.after - self.before

    @property
    def verdict(self) -> Verdict:
        """Return the verdict: the interval lies above zero, below zero, or holds it."""
        if self.low > 0:
            return Verdict.gained
        return Verdict.lost if self.high < 0 else Verdict.unchanged


def compare_exams(before: ExamAnswers, after: ExamAnswers) -> list[CellDifference]:
    """Compare two models on the same items, cell by cell.

    Raises:
        UserError: the two exams differ in version, seed or items.
    """
    require_same_exam(before, after)
    cells_before, cells_after = before.collect_cells(), after.collect_cells()
    differences = []
    for cell, scores in cells_before.items():
        old, new = np.array(scores), np.array(cells_after[cell])
        low, high = compute_interval(new - old, len(cells_before))
        differences.append(CellDifference(cell, len(old), float(old.mean()), float(new.mean()), low, high))
    return differences


def require_same_exam(before: ExamAnswers, after: ExamAnswers) -> None:
    """Require that two exams have the same version, seed, way of answering and items.

    Raises:
        UserError: names the entries or the number of items that differ.
    """
    names = sorted({*before.identity, *after.identity})
    differing = [name for name in names if before.identity.get(name) != after.identity.get(name)]
    if differing:
        found = ", ".join(f"{name}: {before.identity.get(name)} and {after.identity.get(name)}" for name in differing)
        raise UserError(
            f"{before.path} and {after.path} hold different exams ({found}); only answers to one exam can be compared. Run"
            " task=exam again for the older one, with overwrite=true."
        )
    old, new = before.contents, after.contents
    if old != new:
        count = len({*old.items()} ^ {*new.items()})
        raise UserError(
            f"{before.path} and {after.path} hold different items ({count} are in one of them alone); only answers to the same"
            " items can be compared. Run task=exam for both with the same evaluate.exam_items."
        )


def compute_interval(differences: np.ndarray, num_cells: int) -> tuple[float, float]:
    """Compute the bootstrap interval of a mean of paired differences, with Bonferroni's correction.

    One item that gained 1 and one that lost 1 are added before resampling (adding constants to the discordant cells of a
    table of pairs: Agresti and Min 2005). Without them a cell in which few answers changed gives an interval that is far too
    narrow: eight gains and no loss would count as a gain, which an unchanged model shows with probability 1/256. The ends are
    moved outwards by the ratio of the quantiles of Student's t and of the normal distribution, times sqrt(N / (N - 1)): a
    percentile interval of few values is too narrow (Hesterberg 2015, doi 10.1080/00031305.2015.1089789, section 3.2).

    Args:
        differences: score after - score before of each item, [N].
        num_cells: number of cells that are compared.
    """
    values, counts = np.unique(np.round(np.concatenate([differences, [1.0, -1.0]]), 6), return_counts=True)
    return _resample(tuple(values.tolist()), tuple(counts.tolist()), num_cells)


@lru_cache(maxsize=4096)
def _resample(values: tuple[float, ...], counts: tuple[int, ...], num_cells: int) -> tuple[float, float]:
    """Resample the differences, given by their distinct values, and return the ends of the interval of their mean."""
    total, tail = sum(counts), ERROR_RATE / num_cells / 2
    rng = np.random.default_rng(BOOTSTRAP_SEED)
    drawn = rng.multinomial(total, np.array(counts) / total, size=NUM_RESAMPLES)
    means = drawn @ np.array(values) / total
    mean = float(np.array(counts) @ np.array(values)) / total
    ratio = float(special.stdtrit(total - 1, tail) / special.ndtri(tail)) * math.sqrt(total / (total - 1))
    low, high = np.quantile(means, tail, method="lower"), np.quantile(means, 1 - tail, method="higher")
    return max(-1.0, mean - ratio * (mean - float(low))), min(1.0, mean + ratio * (float(high) - mean))


def format_verdicts(differences: list[CellDifference]) -> str:
    """Format the comparison in words: the number of cells by verdict, and each cell that lost."""
    counts = {verdict: [one for one in differences if one.verdict is verdict] for verdict in Verdict}
    lost = ", ".join(format_difference(one) for one in counts[Verdict.lost])
    gained, unchanged = len(counts[Verdict.gained]), len(counts[Verdict.unchanged])
    overall = next((one for one in differences if one.cell == ALL_CELL), None)
    mean = f"; the mean of all {overall.before:.2f} → {overall.after:.2f} ({overall.verdict})" if overall else ""
    return (
        f"gained in {gained} of {len(differences)} cells, lost in {len(counts[Verdict.lost])}"
        f"{f' ({lost})' if lost else ''}, no difference in {unchanged}{mean}"
    )


def format_difference(difference: CellDifference) -> str:
    """Format a cell with its difference and interval: "caption ko easy -0.20 [-0.31, -0.08]"."""
    name = difference.cell.replace("_", " ")
    return f"{name} {difference.difference:+.2f} [{difference.low:+.2f}, {difference.high:+.2f}]"
