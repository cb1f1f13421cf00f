"""Slices of benchmarks as plain conversations, so that a model in training answers them without an endpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from lit_vlm.types import Sample


class ScoreAnswers(Protocol):
    """Function that scores answers to the questions of all slices.

    Args:
        answers: in the order of the questions.
        log: file for the answers.
        on_wait: called several times a second.

    Returns:
        Score of each benchmark, on the scale of published tables.

    Raises:
        UserError: the harness failed.
    """

    def __call__(self, answers: Sequence[str], log: Path, on_wait: Callable[[], None]) -> dict[str, float]: ...


@dataclass(frozen=True, slots=True)
class BenchmarkSlices:
    """Questions of some benchmarks.

    Attributes:
        names: names of the benchmarks.
        samples: conversations that end with a question; the same question of two benchmarks is there once.
        max_new_tokens: maximum number of tokens of each answer.
        score: scores the answers.
    """

    names: tuple[str, ...]
    samples: tuple[Sample, ...]
    max_new_tokens: tuple[int, ...]
    score: ScoreAnswers
