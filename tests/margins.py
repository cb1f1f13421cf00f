"""Record how far each numeric comparison of the tests is from failing: `pytest --margins=FILE`, then `python tests/margins.py FILE...`.

The margin is tolerance / difference at the worst element. For two values that must differ it is difference / tolerance.
Another processor adds in another order, so a comparison whose margin is below `SMALLEST` here may fail there: compare in
float64 (`float64.py`) or derive the bound. `assert_close`, `allclose` and `approx` are for rounding. The accuracy of an
estimate or a share is an inequality, not rounding: counts are the same on every processor.
"""

from __future__ import annotations

import json
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any

SMALLEST = 3.0
TESTS = Path(__file__).resolve().parent


class Recorder:
    """Writer of one line of JSON for each comparison site of a test: its smallest margin and the number of runs.

    Attributes:
        test: node id of the running test.
    """

    def __init__(self, file: Path) -> None:
        self.file, self.test = file, ""
        self.sites: dict[str, list[float]] = {}

    def record(self, margin: float) -> None:
        seen = self.sites.setdefault(find_site(), [math.inf, 0])
        seen[0], seen[1] = min(seen[0], margin), seen[1] + 1

    def write_test(self) -> None:
        lines = [
            json.dumps({"test": self.test, "site": site, "margin": margin, "count": count})
            for site, (margin, count) in self.sites.items()
        ]
        self.sites.clear()
        with self.file.open("a", encoding="utf-8") as file:
            file.writelines(line + "\n" for line in lines)


def find_site() -> str:
    """Find the line of the tests that makes the comparison."""
    frame = sys._getframe(1)
    while frame and (
        Path(frame.f_code.co_filename) == Path(__file__) or TESTS not in Path(frame.f_code.co_filename).parents
    ):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).relative_to(TESTS)}:{frame.f_lineno}" if frame else "elsewhere"


def compute_margin(difference: Any, allowed: Any) -> float:
    """Compute the smallest allowed / difference of tensors of doubles; infinite where nothing differs."""
    import torch

    difference, allowed = torch.as_tensor(difference), torch.as_tensor(allowed)
    margins = torch.where(difference == 0, math.inf, allowed / difference).nan_to_num(nan=0.0, posinf=math.inf)
    return float(margins.min()) if margins.numel() else math.inf


def measure_tensors(actual: Any, expected: Any, rtol: float | None, atol: float | None) -> Iterator[float]:
    """Yield the margin of each pair of tensors or numbers of two like structures."""
    from torch.testing._comparison import default_tolerances
    from torch.utils._pytree import tree_leaves

    for one, other in zip(tree_leaves(actual), tree_leaves(expected), strict=False):
        if one.shape != other.shape:
            continue  # the comparison itself reports it
        least = default_tolerances(one, other) if rtol is None or atol is None else (rtol, atol)
        yield measure_arrays(one.detach().cpu(), other.detach().cpu(), *least)


def measure_arrays(actual: Any, expected: Any, rtol: float, atol: float) -> float:
    """Measure the margin of two arrays or lists."""
    import torch

    one, other = (torch.as_tensor(value, dtype=torch.float64) for value in (actual, expected))
    alike = (one == other) | (one.isnan() & other.isnan())
    return compute_margin(torch.where(alike, 0.0, (one - other).abs()), atol + rtol * other.abs())


def watch(recorder: Recorder, patch: Any) -> None:
    """Patch every function with which the tests compare numbers, so that it records its margin first."""
    import numpy as np
    import pytest
    import torch

    def patch_comparison(owner: Any, name: str, measure: Callable[..., Iterable[float]]) -> None:
        compare = getattr(owner, name)

        @wraps(compare)
        def record_and_compare(*args: Any, **kwargs: Any) -> Any:
            for margin in measure(*args, **kwargs):
                recorder.record(margin)
            return compare(*args, **kwargs)

        patch.setattr(owner, name, record_and_compare)

    patch_comparison(
        torch.testing, "assert_close", lambda a, b, *, rtol=None, atol=None, **_: measure_tensors(a, b, rtol, atol)
    )
    for owner, name, least in ((torch, "allclose", 1e-8), (np, "allclose", 1e-8), (np.testing, "assert_allclose", 0.0)):
        rtol = 1e-7 if name == "assert_allclose" else 1e-5
        patch_comparison(owner, name, lambda a, b, rtol=rtol, atol=least, **_: [measure_arrays(a, b, rtol, atol)])
    scalar = type(pytest.approx(1.0))  # sequences and mappings use it for each of their numbers
    equals, differences = scalar.__eq__, []

    def is_equal(self: Any, actual: Any) -> bool:
        if isinstance(actual, (int, float, np.number)) and isinstance(self.expected, (int, float, np.number)):
            margin = compute_margin(abs(float(actual) - float(self.expected)), float(self.tolerance))
            if differences:
                differences[-1].append(1 / margin if margin else math.inf)
            else:
                recorder.record(margin)
        return equals(self, actual)

    def is_different(self: Any, actual: Any) -> bool:
        differences.append([])
        try:
            same = self == actual
            return not same
        finally:
            recorder.record(max(differences.pop(), default=math.inf))  # one number that differs is enough

    patch.setattr(scalar, "__eq__", is_equal)
    patch.setattr(scalar.__mro__[1], "__ne__", is_different, raising=False)


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--margins", metavar="FILE", help="append the margin of each numeric comparison to this file")


def pytest_configure(config: Any) -> None:
    import pytest

    if file := config.getoption("--margins"):
        patch = pytest.MonkeyPatch()
        config.add_cleanup(patch.undo)
        config.pluginmanager.register(Hooks(Recorder(Path(file)), patch), "margins-hooks")


class Hooks:
    """Pytest hooks that give the recorder the name of the running test."""

    def __init__(self, recorder: Recorder, patch: Any) -> None:
        self.recorder = recorder
        watch(recorder, patch)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.recorder.test = nodeid

    def pytest_runtest_logfinish(self) -> None:
        self.recorder.write_test()


def summarize(files: list[str]) -> str:
    """List the sites below the smallest margin, in ascending order."""
    worst: dict[str, tuple[float, str]] = {}
    counts: dict[str, int] = defaultdict(int)
    for file in files:
        for line in Path(file).read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            counts[row["site"]] += row["count"]
            worst[row["site"]] = min(worst.get(row["site"], (math.inf, "")), (row["margin"], row["test"]))
    small = sorted((margin, site, test) for site, (margin, test) in worst.items() if margin < SMALLEST)
    total = (
        f"{sum(counts.values())} comparisons at {len(counts)} lines; {len(small)} lines below a margin of {SMALLEST:g}"
    )
    return "\n".join([total, *(f"{margin:8.3f}  {site}  {test}" for margin, site, test in small)])


if __name__ == "__main__":
    print(summarize(sys.argv[1:]))
