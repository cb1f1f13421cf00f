"""Optimizer steps over the sample sequence of a mixture, independent of the number of devices."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from lit_vlm.data.index.columns import SampleIndex
from lit_vlm.data.plan.mixture import Mixture
from lit_vlm.types import UserError

SUMMED_COLUMNS = ("supervised", "tiles", "chosen")  # columns of the index that are summed for each step


@dataclass(frozen=True, slots=True)
class StageLength:
    """Length of an optimizer step and of the training stage."""

    batch_size: int | None  # samples per optimizer step
    batch_tokens: int | None  # alternatively: a step ends with the sample that brings it to this number of tokens
    max_steps: int | None
    max_epochs: float  # if max_steps is None: minimum number of passes over the mixture

    def __post_init__(self) -> None:
        if self.batch_tokens is None and self.batch_size is None:
            raise UserError("Give data.global_batch_size or data.global_batch_tokens.")
        for name in ("batch_size", "batch_tokens", "max_steps", "max_epochs"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                key = f"data.global_{name}" if name.startswith("batch") else f"trainer.{name}"
                raise UserError(f"{key}={value} must be above 0.")


def sample_steps(index: SampleIndex, mixture: Mixture, length: StageLength, seed: int) -> dict[str, np.ndarray]:
    """Sample all optimizer steps of a stage from the mixture.

    Returns:
        `samples` [total samples] uint32, index rows, step after step; `ends` [steps] int64, end of each step in
        `samples`; and for each column of SUMMED_COLUMNS its sum in each step, [steps] int64.
    """
    samples, ends = (
        _sample_by_tokens(index, mixture, length, seed)
        if length.batch_tokens
        else _sample_by_count(mixture, length, seed)
    )
    begins = np.concatenate([[0], ends[:-1]])
    totals = {name: np.add.reduceat(getattr(index, name)[samples], begins, dtype=np.int64) for name in SUMMED_COLUMNS}
    return {"samples": samples, "ends": ends, **totals}


def _sample_by_count(mixture: Mixture, length: StageLength, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Sample steps with a fixed number of samples; return (samples, step ends)."""
    assert length.batch_size is not None
    num_steps = length.max_steps or max(1, math.ceil(_compute_num_samples(mixture, length) / length.batch_size - 1e-9))
    ends = np.arange(1, num_steps + 1, dtype=np.int64) * length.batch_size
    return mixture.sample(int(ends[-1]), seed), ends


def _sample_by_tokens(
    index: SampleIndex, mixture: Mixture, length: StageLength, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Sample steps with a minimum number of tokens; return (samples, step ends)."""
    assert length.batch_tokens is not None
    min_samples = 0 if length.max_steps else math.ceil(_compute_num_samples(mixture, length) - 1e-9)
    samples_per_step = math.ceil(length.batch_tokens / index.tokens.mean())
    count = (
        math.ceil(1.02 * (length.max_steps * samples_per_step if length.max_steps else min_samples))
        + 2 * samples_per_step
    )
    while True:  # the number of samples needed for these tokens is not known in advance
        samples = mixture.sample(count, seed)
        ends = _find_step_ends(
            np.cumsum(index.tokens[samples], dtype=np.int64), length.batch_tokens, length.max_steps, min_samples
        )
        if ends is not None:
            return samples[: ends[-1]], ends
        count += count // 2


def _find_step_ends(
    cumulative_tokens: np.ndarray, tokens_per_step: int, max_steps: int | None, min_samples: int
) -> np.ndarray | None:
    """Find the end of each step, [steps] int64; None if there are too few samples.

    Args:
        cumulative_tokens: [samples] int64, running sum of the tokens.
        tokens_per_step: a step ends with the sample that reaches this number of tokens.
        min_samples: number of samples that the steps must cover, if max_steps is None.
    """
    ends: list[int] = []
    reached = 0
    while len(ends) < max_steps if max_steps else (not ends or ends[-1] < min_samples):
        last = int(np.searchsorted(cumulative_tokens, reached + tokens_per_step))
        if last == len(cumulative_tokens):
            return None
        ends.append(last + 1)
        reached = int(cumulative_tokens[last])
    return np.array(ends, dtype=np.int64)


def _compute_num_samples(mixture: Mixture, length: StageLength) -> float:
    return length.max_epochs * mixture.epoch_length
