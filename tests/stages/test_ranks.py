"""Several processes against one, with SGD, gradient clipping, text-only ranks and dummy micro-batches."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from waiting import PATIENCE

WORKER = Path(__file__).with_name("rank_worker.py")


def train(world: int, parts: tuple[str, str], out: Path, *, tokens: int, batch: int, level: str = "none") -> dict:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"] if world > 1 else []
    command = [sys.executable, *launcher, str(WORKER), *parts, str(out), str(tokens), str(batch), level]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out, weights_only=True)


@pytest.mark.parametrize(
    ("tokens", "batch", "level"), [(130, 9, "selective"), pytest.param(100_000, 1, "none", marks=pytest.mark.slow)]
)
def test_n_ranks_equal_one_rank_and_a_rank_without_images_does_not_hang_one_with(
    small_parts, tmp_path, tokens, batch, level
):
    """130 tokens: several micro-batches, some dummy. Batch 1: one rank is always idle. The single rank keeps all activations."""
    one = train(1, small_parts, tmp_path / "one.pt", tokens=tokens, batch=batch)
    two = train(2, small_parts, tmp_path / "two.pt", tokens=tokens, batch=batch, level=level)
    assert two["val"] == pytest.approx(one["val"], rel=1e-5)
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
    if tokens == 130:
        assert one["k"] > two["k"] > 1
    for name, weight in one["weights"].items():
        torch.testing.assert_close(
            two["weights"][name], weight, atol=1e-6, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
