"""What share of the draws each source and each cell of the mixture has: the settings, and how they are met."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from lit_vlm.types import Kind, UserError

EXACT = 1e-9  # of a share, far below one sample in ten million
ROUNDS, PATIENCE = 5000, 500  # of proportional fitting; so many rounds between two looks for cells that vanish
VANISHING = 0.02  # a cell below this part of where it started, still falling


@dataclass(frozen=True, slots=True)
class Amount:
    """How much of one source is drawn."""

    weight: float | None = None  # share relative to the other sources
    repeat: float | None = None  # passes over it in an epoch, where no source has a weight
    count: int | None = None  # or samples of it in an epoch


@dataclass(frozen=True, slots=True)
class MixtureSettings:
    """As under `data` in the configuration, in plain values."""

    sources: Mapping[str, Amount] = field(default_factory=dict)  # by name; one that is missing is drawn by its size
    weights_in: Literal["samples", "tokens"] = "samples"
    temperature: float = 1.0  # without weights: sources count by size^(1/temperature)
    share_ko: float | None = None  # of the samples drawn
    share_text_only: float | None = None
    share_kinds: Mapping[Kind, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Margin:
    """A share that was asked for, and the cells that make it up."""

    name: str  # e.g. "data.share.ko=0.7"
    share: float
    cells: np.ndarray  # [cells] bool


def amounts_of(settings: MixtureSettings, names: Sequence[str]) -> list[Amount]:
    """One for each source.

    Raises:
        UserError: a source that is not there, or amounts that contradict each other.
    """
    for name in settings.sources:
        if name not in names:
            raise UserError(f"The mixture names the source {name}, but there are only: {', '.join(names)}.")
    amounts = [settings.sources.get(name, Amount()) for name in names]
    weighted = any(amount.weight is not None for amount in amounts)
    for name, amount in zip(names, amounts, strict=True):
        given = {key: getattr(amount, key) for key in ("weight", "repeat", "count")}
        given = {key: value for key, value in given.items() if value is not None}
        if weighted and amount.weight is None:
            raise UserError(f"data.sources.{name}.weight is missing: other sources have one. Give it; 0 leaves it out.")
        if len(given) > 1:
            raise UserError(f"data.sources.{name} has {' and '.join(given)}. Keep one of them.")
        for key, value in given.items():
            if not 0 <= value < math.inf:
                raise UserError(f"data.sources.{name}.{key}={value:g} must be a number from 0.")
    if weighted and settings.temperature != 1:
        raise UserError(
            f"data.temperature={settings.temperature:g} tempers the sizes of sources, but they have weights. "
            "Leave out data.temperature, or every data.sources.<name>.weight."
        )
    if not weighted and settings.weights_in == "tokens":
        raise UserError("data.weights_in=tokens, but no source has a weight. Give data.sources.<name>.weight.")
    if not 0 < settings.temperature < math.inf:
        raise UserError(f"data.temperature={settings.temperature:g} must be above 0.")
    return amounts


def counts_of(amounts: Sequence[Amount], sizes: np.ndarray) -> np.ndarray:
    """[sources] float64, samples of each in an epoch, where no source has a weight."""
    counts = sizes.astype(np.float64)
    for number, amount in enumerate(amounts):
        if amount.repeat is not None:
            counts[number] *= amount.repeat
        elif amount.count is not None:
            counts[number] = amount.count
    return counts


def source_shares(settings: MixtureSettings, names: Sequence[str], sizes: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """[sources] share of the samples drawn: by weights, else by tempered counts.

    Args:
        sizes: [sources] usable samples.
        tokens: [sources] of all of them; a weight in tokens is divided by a source's mean sample.

    Raises:
        UserError: as `amounts_of`; a source that is asked for is empty, or none is drawn.
    """
    amounts = amounts_of(settings, names)
    if any(amount.weight is not None for amount in amounts):
        shares = np.array([amount.weight for amount in amounts], dtype=np.float64)
    else:
        counts = counts_of(amounts, sizes)
        shares = np.where(counts > 0, (counts / max(counts.max(initial=0), 1)) ** (1 / settings.temperature), 0.0)
    for name, share, size in zip(names, shares.tolist(), sizes.tolist(), strict=True):
        if share and not size:
            raise UserError(
                f"data.sources.{name} is to be drawn, but has no usable sample. Check data.sources.{name}.path."
            )
    if not shares.sum() > 0:
        raise UserError("Nothing is drawn: the sources are empty, or each has weight, repeat or count 0.")
    if settings.weights_in == "tokens":
        shares *= sizes / np.maximum(tokens, 1)
    return shares / shares.sum()


def meet(start: np.ndarray, margins: Sequence[Margin]) -> np.ndarray:
    """[cells] the shares nearest to `start` (in relative entropy) that meet every margin: proportional fitting.

    Where cells have to vanish for it, fitting alone takes forever to get there; they are set to zero on the way.

    Raises:
        UserError: a margin has no sample, or the margins contradict each other.
    """
    for margin in margins:
        if margin.share > EXACT and not start[margin.cells].sum() > 0:
            raise UserError(
                f"{margin.name} cannot be met: no sample of that sort is drawn from any source. "
                "Change the share, or add a source that has them."
            )
    shares = start.copy()
    for number in range(1, ROUNDS + 1):
        for margin in margins:
            there = shares[margin.cells].sum()
            if there > 0:
                shares[margin.cells] *= margin.share / there
        if all(abs(shares[margin.cells].sum() - margin.share) < EXACT for margin in margins):
            return shares / shares.sum()
        if number % PATIENCE == 0:
            shares[shares < VANISHING * start] = 0.0
    reached = ", ".join(f"{margin.name} (reached {shares[margin.cells].sum():.3f})" for margin in margins)
    raise UserError(
        f"The shares asked contradict each other with the samples there are: {reached}. "
        "Change one of them, or add a source with samples that are of both sorts."
    )
