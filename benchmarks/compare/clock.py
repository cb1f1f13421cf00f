"""Repeats in turn, until their spread allows a ratio."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

from benchmarks.compare.contender import Contender, Times
from lit_vlm.types import Record

SPREAD = 0.10  # largest interquartile range over median from which a ratio is still printed


def interleave(
    contenders: Sequence[Contender],
    batches: list[list[Record]],
    *,
    repeats: int = 5,
    most: int = 15,
    budget: float = 900.0,
    clock: str = "cpu",
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, list[Times]]:
    """All contenders in turn, forwards and then backwards (A B B A), so that a drift of the machine is everybody's.

    Args:
        repeats: at least; more of them follow while a spread is above `SPREAD`.
        most: repeats at most.
        budget: seconds, after which no further repeat starts once there are `repeats`.
        clock: "cpu" or "wall", whose spread decides.
    """
    times: dict[str, list[Times]] = {contender.name: [] for contender in contenders}
    began = time.perf_counter()
    for number in range(most):
        if number >= repeats:
            settled = max(spread([getattr(t, clock) for t in taken]) for taken in times.values()) <= SPREAD
            if settled or time.perf_counter() - began > budget:
                break
        for contender in contenders if number % 2 == 0 else contenders[::-1]:
            times[contender.name].append(contender.repeat(batches))
        shown = ", ".join(f"{name} {taken[-1].cpu:.2f} s" for name, taken in times.items())
        say(f"repeat {number + 1}: {shown}")
    return times


def spread(values: Sequence[float]) -> float:
    """Interquartile range over median."""
    if len(values) < 2:
        return float("inf")
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / statistics.median(values)
