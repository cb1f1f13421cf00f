"""Start a worker on several ranks and compare its results with one process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch


def run_ranks(
    worker: Path, arguments: list[str], checks: Iterable[str], out: Path, world: int, limit: float
) -> list[dict[str, dict]]:
    """Return the results of each check on each rank, which the worker writes to `out/<check>.<rank>.pt`. A hang ends at the
    limit, in seconds. The output of the worker is in `out/terminal`."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, str(worker), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=limit, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    (out / "terminal").write_text(done.stdout + done.stderr, encoding="utf-8")
    return [{check: torch.load(out / f"{check}.{r}.pt", weights_only=False) for check in checks} for r in range(world)]


def require_equal(several: dict, one: dict, steps: int, atol: float = 1e-5) -> None:
    """Require the same losses, learning rates and weights, step by step."""
    assert several["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert several["val"] == pytest.approx(one["val"], rel=1e-5)
    assert several["hooks"] == one["hooks"] == list(range(steps))
    assert several["global_step"] == steps and several["rates"] == pytest.approx(one["rates"])
    assert several["weights"].keys() == one["weights"].keys()
    for name, weight in one["weights"].items():
        torch.testing.assert_close(
            several["weights"][name], weight, atol=atol, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
