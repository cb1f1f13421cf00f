"""Mixture shares: settings of the data mixture, and the share of the samples for each source and each cell."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from lit_vlm.types import SampleKind, UserError

SHARE_TOLERANCE = 1e-9  # tolerance of a share: far below one sample in ten million
MAX_FITTING_ROUNDS, ROUNDS_BETWEEN_CHECKS = (
    5000,
    500,
)  # of proportional fitting; number of rounds between two checks for vanishing cells
VANISHING_FRACTION = 0.02  # a cell below this fraction of its initial share, and still decreasing, is set to zero


@dataclass(frozen=True, slots=True)
class SourceAmount:
    """Amount of one source in the mixture: a weight, or a number of passes, or a number of samples."""

    weight: float | None = None  # share relative to the other sources
    repeat: float | None = None  # passes over it in an epoch, if no source has a weight
    count: int | None = None  # alternatively: samples of it in an epoch


@dataclass(frozen=True, slots=True)
class MixtureSettings:
    """Mixture settings: those under `data` in the configuration, as plain values."""

    sources: Mapping[str, SourceAmount] = field(default_factory=dict)  # by name; a missing source: by its size
    weights_in: Literal["samples", "tokens"] = "samples"
    temperature: float = 1.0  # without weights: a source is weighted by size^(1/temperature)
    share_ko: float | None = None  # share of the samples
    share_text_only: float | None = None
    share_kinds: Mapping[SampleKind, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TargetShare:
    """Requested share of a group of cells."""

    name: str  # e.g. "data.share.ko=0.7"
    share: float
    cells: np.ndarray  # [cells] bool


def resolve_amounts(settings: MixtureSettings, names: Sequence[str]) -> list[SourceAmount]:
    """Resolve the amount of each source.

    Raises:
        UserError: the mixture names an unknown source, or amounts contradict each other.
    """
    for name in settings.sources:
        if name not in names:
            raise UserError(f"The mixture names the source {name}, but there are only: {', '.join(names)}.")
    amounts = [settings.sources.get(name, SourceAmount()) for name in names]
    has_weights = any(amount.weight is not None for amount in amounts)
    for name, amount in zip(names, amounts, strict=True):
        given = {key: getattr(amount, key) for key in ("weight", "repeat", "count")}
        given = {key: value for key, value in given.items() if value is not None}
        if has_weights and amount.weight is None:
            raise UserError(f"data.sources.{name}.weight is missing: other sources have one. Give it; 0 leaves it out.")
        if len(given) > 1:
            raise UserError(f"data.sources.{name} has {' and '.join(given)}. Keep one of them.")
        for key, value in given.items():
            if not 0 <= value < math.inf:
                raise UserError(f"data.sources.{name}.{key}={value:g} must be a number from 0.")
    if has_weights and settings.temperature != 1:
        raise UserError(
            f"data.temperature={settings.temperature:g} tempers the sizes of sources, but they have weights. "
            "Leave out data.temperature, or every data.sources.<name>.weight."
        )
    if not has_weights and settings.weights_in == "tokens":
        raise UserError("data.weights_in=tokens, but no source has a weight. Give data.sources.<name>.weight.")
    if not 0 < settings.temperature < math.inf:
        raise UserError(f"data.temperature={settings.temperature:g} must be above 0.")
    return amounts


def compute_epoch_counts(amounts: Sequence[SourceAmount], sizes: np.ndarray) -> np.ndarray:
    """Compute the samples of each source in an epoch, if no source has a weight: [sources] float64."""
    counts = sizes.astype(np.float64)
    for number, amount in enumerate(amounts):
        if amount.repeat is not None:
            counts[number] *= amount.repeat
        elif amount.count is not None:
            counts[number] = amount.count
    return counts


def compute_source_shares(
    settings: MixtureSettings, names: Sequence[str], sizes: np.ndarray, tokens: np.ndarray
) -> np.ndarray:
    """Compute the share of the samples for each source, [sources]: by weights, else by counts with temperature.

    Args:
        sizes: [sources] usable samples.
        tokens: [sources] their tokens; a weight in tokens is divided by the mean tokens of a sample of the source.

    Raises:
        UserError: see `resolve_amounts`; or a requested source is empty, or the mixture is empty.
    """
    amounts = resolve_amounts(settings, names)
    if any(amount.weight is not None for amount in amounts):
        shares = np.array([amount.weight for amount in amounts], dtype=np.float64)
    else:
        counts = compute_epoch_counts(amounts, sizes)
        shares = np.where(counts > 0, (counts / max(counts.max(initial=0), 1)) ** (1 / settings.temperature), 0.0)
    for name, share, size in zip(names, shares.tolist(), sizes.tolist(), strict=True):
        if share and not size:
            raise UserError(
                f"data.sources.{name} is in the mixture, but has no usable sample. Check data.sources.{name}.path."
            )
    if not shares.sum() > 0:
        raise UserError("Nothing is sampled: the sources are empty, or each has weight, repeat or count 0.")
    if settings.weights_in == "tokens":
        shares *= sizes / np.maximum(tokens, 1)
    return shares / shares.sum()


def compute_cell_shares(initial_shares: np.ndarray, target_shares: Sequence[TargetShare]) -> np.ndarray:
    """Compute the cell shares that meet every target share, by iterative proportional fitting.

    Of all solutions it is the one closest to `initial_shares` in relative entropy. If cells must vanish, fitting alone
    converges too slowly to zero; such cells are set to zero during the fitting.

    Args:
        initial_shares: [cells], they sum to 1.
        target_shares: requested shares of groups of cells.

    Returns:
        [cells] shares that sum to 1.

    Raises:
        UserError: a target share has no sample, or the target shares contradict each other.
    """
    for margin in target_shares:
        if margin.share > SHARE_TOLERANCE and not initial_shares[margin.cells].sum() > 0:
            raise UserError(
                f"{margin.name} cannot be met: no source has samples of that sort. "
                "Change the share, or add a source that has them."
            )
    shares = initial_shares.copy()
    for round_number in range(1, MAX_FITTING_ROUNDS + 1):
        for margin in target_shares:
            current = shares[margin.cells].sum()
            if current > 0:
                shares[margin.cells] *= margin.share / current
        if all(abs(shares[margin.cells].sum() - margin.share) < SHARE_TOLERANCE for margin in target_shares):
            return shares / shares.sum()
        if round_number % ROUNDS_BETWEEN_CHECKS == 0:
            shares[shares < VANISHING_FRACTION * initial_shares] = 0.0
    reached = ", ".join(f"{margin.name} (reached {shares[margin.cells].sum():.3f})" for margin in target_shares)
    raise UserError(
        f"The shares asked contradict each other with the samples there are: {reached}. "
        "Change one of them, or add a source with samples that are of both sorts."
    )
