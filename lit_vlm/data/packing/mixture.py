"""Data mixture: sample sources by weight or size, and meet the shares of Korean, text-only and each kind.

A cell is the set of samples with the same source, language and kind, all with or all without an image. Each cell has a
share of the samples. Cells are interleaved by their shares. Each cell is read in passes, and shuffled in each pass.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from lit_vlm.data.index.sample_index import KINDS, LANGUAGES, SampleIndex
from lit_vlm.data.packing.mixture_shares import (
    MixtureSettings,
    SourceAmount,
    TargetShare,
    compute_cell_shares,
    compute_epoch_counts,
    compute_source_shares,
    resolve_amounts,
)
from lit_vlm.types import Language, SampleKind, UserError

__all__ = ["Mixture", "MixtureCell", "MixtureSettings", "SourceAmount"]

WINDOW_SIZES = 1 << 10, 1 << 20  # samples that are sorted at once: first window, and maximum
SAMPLES_PER_BLOCK = 4096  # passes over a small cell are shuffled together, about this many samples at once
IMAGE_GROUPS = ("text only", "with image")


@dataclass(frozen=True, slots=True)
class MixtureCell:
    """Samples that the mixture treats alike: same source, language, kind, and with or without an image."""

    source: int
    language: Language
    has_image: bool
    kind: SampleKind
    members: np.ndarray  # [samples] uint32, rows in the index


class Mixture:
    """Data mixture: shares of the cells, and the endless sample sequence that they define.

    The shares of Korean, text-only and kinds are met exactly. The initial share of a cell is the share of its source,
    divided among the cells of the source by their sizes. It changes as little as the requested shares require, so the
    shares of the sources stay as close to their targets as possible.

    Columns of the index are read only when they are needed.
    """

    def __init__(self, index: SampleIndex, settings: MixtureSettings | None = None) -> None:
        self.index, self.settings = index, settings or MixtureSettings()
        self.source_names = [source.name for source in index.sources]

    @cached_property
    def source_sizes(self) -> np.ndarray:
        """Usable samples of each source, [sources] int64."""
        return np.bincount(self.index.source_ids, minlength=len(self.source_names))

    @cached_property
    def source_shares(self) -> np.ndarray:
        """Initial share of the samples for each source, [sources]. Raises UserError if the settings cannot be met."""
        tokens = np.bincount(self.index.source_ids, self.index.tokens, minlength=len(self.source_names))
        return compute_source_shares(self.settings, self.source_names, self.source_sizes, tokens)

    @cached_property
    def cells(self) -> list[MixtureCell]:
        """Non-empty cells, in a fixed order."""
        index = self.index
        shape = (len(self.source_names), len(LANGUAGES), 2, len(KINDS))
        # 16-bit integers sort faster
        codes = index.source_ids.astype(np.uint16 if math.prod(shape) < 1 << 16 else np.uint32)
        for size, column in zip(shape[1:], (index.language, index.images > 0, index.kind), strict=True):
            codes = codes * size + column
        order = np.argsort(codes, kind="stable").astype(np.uint32)
        sizes = np.bincount(codes)
        ends = np.cumsum(sizes)
        cells = []
        for code in np.flatnonzero(sizes).tolist():
            source, language, has_image, kind = (int(part) for part in np.unravel_index(code, shape))
            members = order[ends[code] - sizes[code] : ends[code]]
            cells.append(MixtureCell(source, LANGUAGES[language], bool(has_image), KINDS[kind], members))
        return cells

    @cached_property
    def cell_shares(self) -> np.ndarray:
        """Share of the samples for each cell, [cells]. Raises UserError if the requested shares cannot be met."""
        sources = np.array([cell.source for cell in self.cells], dtype=np.int64)
        sizes = np.array([len(cell.members) for cell in self.cells])
        return compute_cell_shares(
            self.source_shares[sources] * sizes / self.source_sizes[sources], self._build_target_shares()
        )

    @cached_property
    def epoch_length(self) -> int:
        """Samples of one epoch (pass over the mixture): the sum of the sources' counts, or with weights of their sizes."""
        amounts = resolve_amounts(self.settings, self.source_names)
        if any(amount.weight is not None for amount in amounts):
            return int(self.source_sizes[self.source_shares > 0].sum())
        return max(1, round(float(compute_epoch_counts(amounts, self.source_sizes).sum())))

    def sample(self, count: int, seed: int) -> np.ndarray:
        """Sample the first `count` index rows of the endless sequence: [count] uint32, the same for any world size.

        A cell with share s is sampled at the times (j + 1/2) / s. Sorting all times interleaves the cells as evenly as
        possible: in every prefix, each cell has its share to within one or two samples.
        """
        cells = [
            (share, _CellSampler(cell.members, f"{seed}\0{self._get_cell_key(cell)}"))
            for share, cell in zip(self.cell_shares.tolist(), self.cells, strict=True)
            if share > 0
        ]
        result, filled = np.empty(count, dtype=np.uint32), 0
        for begin, end in _iter_windows():
            if filled == count:
                break
            times, samples = [], []
            for share, sampler in cells:
                first, last = (max(0, math.ceil(time * share - 0.5)) for time in (begin, end))
                times.append((np.arange(first, last) + 0.5) / share)
                samples.append(sampler.get_range(first, last))
            order = np.argsort(np.concatenate(times), kind="stable")[: count - filled]
            result[filled : filled + len(order)] = np.concatenate(samples)[order]
            filled += len(order)
        return result

    def summarize(self, sample_sequence: np.ndarray) -> list[dict[str, Any]]:
        """Summarize requested and actual shares: one row for each source, language, text-only or not, and kind.

        Keys of a row: `size` and `size_tokens` are the available samples and tokens; `asked` is the requested share or
        None, and `asked_in` its unit; `drawn` is the number of samples in the sequence; `samples` and `tokens` are the
        actual shares; `repeats` is the average number of times that a sample is used.

        Args:
            sample_sequence: [count] index rows.
        """
        index, settings = self.index, self.settings
        times = np.bincount(sample_sequence, minlength=len(index))
        languages = {language: _compute_rest(settings.share_ko) for language in LANGUAGES} | {
            Language.ko: settings.share_ko
        }
        images = dict(
            zip(IMAGE_GROUPS, (settings.share_text_only, _compute_rest(settings.share_text_only)), strict=True)
        )
        return [
            *self._summarize_group(
                "source",
                index.source_ids,
                self.source_names,
                self._get_requested_source_shares(),
                times,
                settings.weights_in,
            ),
            *self._summarize_group("language", index.language, LANGUAGES, languages, times),
            *self._summarize_group("images", index.images > 0, IMAGE_GROUPS, images, times),
            *self._summarize_group("kind", index.kind, KINDS, settings.share_kinds, times),
        ]

    def _summarize_group(
        self,
        group: str,
        codes: np.ndarray,
        names: Sequence[str],
        requested_shares: Mapping[Any, float | None],
        sample_counts: np.ndarray,
        share_unit: str = "samples",
    ) -> list[dict[str, Any]]:
        tokens, rows = self.index.tokens, []
        columns = [None, tokens, sample_counts, sample_counts * tokens]
        sums = np.array([np.bincount(codes, column, minlength=len(names)) for column in columns])
        shares = sums[2:] / np.maximum(sums[2:].sum(axis=1, keepdims=True), 1)
        for number, name in enumerate(names):
            size, size_tokens, num_sampled = (int(value) for value in sums[:3, number])
            if not size and group != "source":
                continue
            share = requested_shares.get(name)
            row = {"group": group, "name": str(name), "size": size, "size_tokens": size_tokens, "asked": share}
            row |= {
                "asked_in": None if share is None else share_unit,
                "drawn": num_sampled,
                "repeats": num_sampled / max(size, 1),
            }
            rows.append(row | {"samples": float(shares[0, number]), "tokens": float(shares[1, number])})
        return rows

    def _get_requested_source_shares(self) -> dict[str, float | None]:
        """Return the requested share of each source, in the unit of its weight."""
        weights = [amount.weight for amount in resolve_amounts(self.settings, self.source_names)]
        if all(weight is None for weight in weights):
            return dict(zip(self.source_names, self.source_shares.tolist(), strict=True))
        total = sum(weight or 0.0 for weight in weights)
        return {name: (weight or 0.0) / total for name, weight in zip(self.source_names, weights, strict=True)}

    def _build_target_shares(self) -> list[TargetShare]:
        """Build the requested shares, each with its complement."""
        settings = self.settings
        korean = np.array([cell.language is Language.ko for cell in self.cells])
        text_only = np.array([not cell.has_image for cell in self.cells])
        kinds: list[tuple[str, float | None, np.ndarray]] = [
            (f"data.share.kinds.{kind}", share, np.array([cell.kind is SampleKind(kind) for cell in self.cells]))
            for kind, share in settings.share_kinds.items()
        ]
        return [
            *_build_partition([("data.share.ko", settings.share_ko, korean)]),
            *_build_partition([("data.share.text_only", settings.share_text_only, text_only)]),
            *_build_partition(kinds),
        ]

    def _get_cell_key(self, cell: MixtureCell) -> str:
        return f"{self.source_names[cell.source]}\0{cell.language}\0{cell.has_image}\0{cell.kind}"


class _CellSampler:
    """Endless sample sequence of one cell: pass after pass, each shuffled with a seed of its own.

    A pass is shuffled by sorting the raw numbers of a bit generator: numpy guarantees that these never change, but it
    does not guarantee this for its permutations.
    """

    def __init__(self, members: np.ndarray, name: str) -> None:
        self.members, self.name = members, name
        self.passes_per_block = max(1, SAMPLES_PER_BLOCK // len(members))  # passes that are shuffled together
        self.block_number, self.block = -1, members

    def get_range(self, first: int, last: int) -> np.ndarray:
        """Return the samples `first` to `last - 1` of the sequence: [last - first] uint32."""
        length, parts = self.passes_per_block * len(self.members), [self.members[:0]]
        while first < last:
            number, offset = divmod(first, length)
            self._load_block(number)
            parts.append(self.block[offset : offset + last - first])
            first += len(parts[-1])
        return np.concatenate(parts)

    def _load_block(self, number: int) -> None:
        if number != self.block_number:
            key = hashlib.sha256(f"{self.name}\0{number * self.passes_per_block}".encode()).digest()
            raw = np.random.PCG64(int.from_bytes(key)).random_raw(self.passes_per_block * len(self.members))
            order = raw.reshape(self.passes_per_block, -1).argsort(axis=1, kind="stable")
            self.block_number, self.block = number, self.members[order].ravel()


def _iter_windows() -> Iterator[tuple[int, int]]:
    """Yield time windows; they are always the same, so that a prefix does not depend on the number of samples."""
    length, max_length = WINDOW_SIZES
    begin = 0
    while True:
        yield begin, begin + length
        begin, length = begin + length, min(2 * length, max_length)


def _build_partition(parts: list[tuple[str, float | None, np.ndarray]]) -> list[TargetShare]:
    """Build the target shares of groups of cells that do not overlap, and of the remaining cells."""
    targets = [TargetShare(f"{name}={share:g}", share, cells) for name, share, cells in parts if share is not None]
    if not targets:
        return []
    names, total = " and ".join(margin.name for margin in targets), sum(margin.share for margin in targets)
    if not all(0 <= margin.share <= 1 for margin in targets) or total > 1 + 1e-9:
        raise UserError(f"{names}: each must be a share from 0 to 1, and together at most 1; they sum to {total:g}.")
    rest = ~np.any([margin.cells for margin in targets], axis=0)
    return [*targets, TargetShare(f"the rest beside {names}, {1 - total:g},", max(0.0, 1 - total), rest)]


def _compute_rest(share: float | None) -> float | None:
    """Return the complement of a share; None if no share is requested."""
    return None if share is None else 1 - share
