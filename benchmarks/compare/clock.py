"""Repeated measurements in turn, until their spread is small enough for a ratio."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

from benchmarks.compare.contender import Contender, StepTimes
from lit_vlm.types import Record

MAX_SPREAD = 0.10  # maximum interquartile range over median for which a ratio is printed


def measure_interleaved(
    contenders: Sequence[Contender],
    batches: list[list[Record]],
    *,
    repeats: int = 5,
    most: int = 15,
    budget: float = 900.0,
    clock: str = "cpu",
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, list[StepTimes]]:
    """Measure all contenders in turn, forwards and then backwards (A B B A), so that drift of the machine affects all.

    Args:
        repeats: minimum number of repeats. More follow while a spread is above `MAX_SPREAD`.
        most: maximum number of repeats.
        budget: seconds after which no further repeat starts, once `repeats` are done.
        clock: "cpu" or "wall": the clock whose spread counts.
    """
    times: dict[str, list[StepTimes]] = {contender.name: [] for contender in contenders}
    start = time.perf_counter()
    for i in range(most):
        if i >= repeats:
            is_stable = (
                max(compute_spread([getattr(t, clock) for t in contender_times]) for contender_times in times.values())
                <= MAX_SPREAD
            )
            if is_stable or time.perf_counter() - start > budget:
                break
        for contender in contenders if i % 2 == 0 else contenders[::-1]:
            times[contender.name].append(contender.repeat(batches))
        summary = ", ".join(f"{name} {contender_times[-1].cpu:.2f} s" for name, contender_times in times.items())
        say(f"repeat {i + 1}: {summary}")
    return times


def compute_spread(values: Sequence[float]) -> float:
    """Compute the interquartile range over the median."""
    if len(values) < 2:
        return float("inf")
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / statistics.median(values)
