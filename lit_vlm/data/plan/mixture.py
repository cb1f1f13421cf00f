"""Which samples are drawn, and how often: sources by weight or by size, then the shares of Korean, text and kinds.

Samples of one source, language and kind, with or without an image, form a cell. Each cell has a share; cells are
interleaved by their shares, each read pass after pass, each pass in an order of its own.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from lit_vlm.data.index.columns import KINDS, LANGUAGES, Index
from lit_vlm.data.plan.shares import Amount, Margin, MixtureSettings, amounts_of, counts_of, meet, source_shares
from lit_vlm.types import Kind, Language, UserError

__all__ = ["Amount", "Cell", "Mixture", "MixtureSettings"]

WINDOWS = 1 << 10, 1 << 20  # draws sorted at once, the first time and at most
BLOCK = 4096  # passes over a small cell are made together, about so many draws at once
IMAGES = ("text only", "with image")


@dataclass(frozen=True, slots=True)
class Cell:
    """Samples that are alike for the mixture."""

    source: int
    language: Language
    has_image: bool
    kind: Kind
    members: np.ndarray  # [samples] uint32, of the index


class Mixture:
    """Shares of the cells, and the endless sequence of draws.

    The shares of Korean, text-only and kinds are met exactly. Cells start from their source's share in the composition
    that it has and move as little as that asks, so a source's share is kept as nearly as the others allow.

    Nothing of the index is read before it is needed.
    """

    def __init__(self, index: Index, settings: MixtureSettings | None = None) -> None:
        self.index, self.settings = index, settings or MixtureSettings()
        self.names = [source.name for source in index.sources]

    @cached_property
    def sizes(self) -> np.ndarray:
        """[sources] int64, usable samples."""
        return np.bincount(self.index.source_of, minlength=len(self.names))

    @cached_property
    def source_shares(self) -> np.ndarray:
        """[sources] share of the samples drawn that each starts from. UserError: the settings cannot be met."""
        tokens = np.bincount(self.index.source_of, self.index.tokens, minlength=len(self.names))
        return source_shares(self.settings, self.names, self.sizes, tokens)

    @cached_property
    def cells(self) -> list[Cell]:
        """Those that hold a sample, in a fixed order."""
        index = self.index
        shape = (len(self.names), len(LANGUAGES), 2, len(KINDS))
        codes = index.source_of.astype(np.uint16 if math.prod(shape) < 1 << 16 else np.uint32)  # 16 bits sort fast
        for size, column in zip(shape[1:], (index.language, index.images > 0, index.kind), strict=True):
            codes = codes * size + column
        order = np.argsort(codes, kind="stable").astype(np.uint32)
        sizes = np.bincount(codes)
        ends = np.cumsum(sizes)
        cells = []
        for code in np.flatnonzero(sizes).tolist():
            source, language, has_image, kind = (int(part) for part in np.unravel_index(code, shape))
            members = order[ends[code] - sizes[code] : ends[code]]
            cells.append(Cell(source, LANGUAGES[language], bool(has_image), KINDS[kind], members))
        return cells

    @cached_property
    def shares(self) -> np.ndarray:
        """[cells] share of the samples drawn. UserError: the shares asked cannot be met with the samples there are."""
        of = np.array([cell.source for cell in self.cells], dtype=np.int64)
        sizes = np.array([len(cell.members) for cell in self.cells])
        return meet(self.source_shares[of] * sizes / self.sizes[of], self._margins())

    @cached_property
    def epoch_length(self) -> int:
        """Draws of one pass over the mixture: the counts of its sources, or with weights their sizes."""
        amounts = amounts_of(self.settings, self.names)
        if any(amount.weight is not None for amount in amounts):
            return int(self.sizes[self.source_shares > 0].sum())
        return max(1, round(float(counts_of(amounts, self.sizes).sum())))

    def draws(self, count: int, seed: int) -> np.ndarray:
        """[count] uint32, the first samples of the endless mixture; the same for any world size.

        A cell of share s is drawn at the times (j + 1/2) / s; sorting all times interleaves the cells as evenly as can
        be, so that every prefix holds each cell's share to within a sample or two.
        """
        cells = [
            (share, _Passes(cell.members, f"{seed}\0{self._name_of(cell)}"))
            for share, cell in zip(self.shares.tolist(), self.cells, strict=True)
            if share > 0
        ]
        drawn, filled = np.empty(count, dtype=np.uint32), 0
        for begin, end in _windows():
            if filled == count:
                break
            times, samples = [], []
            for share, passes in cells:
                first, last = (max(0, math.ceil(time * share - 0.5)) for time in (begin, end))
                times.append((np.arange(first, last) + 0.5) / share)
                samples.append(passes.take(first, last))
            order = np.argsort(np.concatenate(times), kind="stable")[: count - filled]
            drawn[filled : filled + len(order)] = np.concatenate(samples)[order]
            filled += len(order)
        return drawn

    def rows(self, drawn: np.ndarray) -> list[dict[str, Any]]:
        """What was asked beside what these draws hold: a row per source, language, text-only or not, and kind.

        `size` and `size_tokens` are what there is; `asked` is a share, None where nothing was asked, and `asked_in` of
        what; `drawn` counts samples, `samples` and `tokens` are the shares drawn; `repeats` is how often a sample is drawn on average.
        """
        index, settings = self.index, self.settings
        times = np.bincount(drawn, minlength=len(index))
        languages = {language: _rest(settings.share_ko) for language in LANGUAGES} | {Language.ko: settings.share_ko}
        images = dict(zip(IMAGES, (settings.share_text_only, _rest(settings.share_text_only)), strict=True))
        return [
            *self._rows("source", index.source_of, self.names, self._asked_of_sources(), times, settings.weights_in),
            *self._rows("language", index.language, LANGUAGES, languages, times),
            *self._rows("images", index.images > 0, IMAGES, images, times),
            *self._rows("kind", index.kind, KINDS, settings.share_kinds, times),
        ]

    def _rows(
        self,
        group: str,
        codes: np.ndarray,
        names: Sequence[str],
        asked: Mapping[Any, float | None],
        times: np.ndarray,
        asked_in: str = "samples",
    ) -> list[dict[str, Any]]:
        tokens, rows = self.index.tokens, []
        columns = [None, tokens, times, times * tokens]
        sums = np.array([np.bincount(codes, column, minlength=len(names)) for column in columns])
        shares = sums[2:] / np.maximum(sums[2:].sum(axis=1, keepdims=True), 1)
        for number, name in enumerate(names):
            size, size_tokens, drawn = (int(value) for value in sums[:3, number])
            if not size and group != "source":
                continue
            share = asked.get(name)
            row = {"group": group, "name": str(name), "size": size, "size_tokens": size_tokens, "asked": share}
            row |= {"asked_in": None if share is None else asked_in, "drawn": drawn, "repeats": drawn / max(size, 1)}
            rows.append(row | {"samples": float(shares[0, number]), "tokens": float(shares[1, number])})
        return rows

    def _asked_of_sources(self) -> dict[str, float | None]:
        weights = [amount.weight for amount in amounts_of(self.settings, self.names)]
        if all(weight is None for weight in weights):
            return dict(zip(self.names, self.source_shares.tolist(), strict=True))
        whole = sum(weight or 0.0 for weight in weights)
        return {name: (weight or 0.0) / whole for name, weight in zip(self.names, weights, strict=True)}

    def _margins(self) -> list[Margin]:
        """The shares asked, each with its rest."""
        settings = self.settings
        korean = np.array([cell.language is Language.ko for cell in self.cells])
        text_only = np.array([not cell.has_image for cell in self.cells])
        kinds = [
            (f"data.share.kinds.{kind}", share, np.array([cell.kind is Kind(kind) for cell in self.cells]))
            for kind, share in settings.share_kinds.items()
        ]
        return [
            *_partition([("data.share.ko", settings.share_ko, korean)]),
            *_partition([("data.share.text_only", settings.share_text_only, text_only)]),
            *_partition(kinds),
        ]

    def _name_of(self, cell: Cell) -> str:
        return f"{self.names[cell.source]}\0{cell.language}\0{cell.has_image}\0{cell.kind}"


class _Passes:
    """The endless sequence of one cell's draws: pass after pass, each in an order of its own.

    The order sorts a bit generator's raw numbers, which numpy promises to keep for good, unlike its permutations.
    """

    def __init__(self, members: np.ndarray, name: str) -> None:
        self.members, self.name = members, name
        self.passes = max(1, BLOCK // len(members))  # of a block
        self.number, self.block = -1, members

    def take(self, first: int, last: int) -> np.ndarray:
        """[last - first] uint32, the draws from `first` on."""
        length, parts = self.passes * len(self.members), [self.members[:0]]
        while first < last:
            number, offset = divmod(first, length)
            self._read(number)
            parts.append(self.block[offset : offset + last - first])
            first += len(parts[-1])
        return np.concatenate(parts)

    def _read(self, number: int) -> None:
        if number != self.number:
            key = hashlib.sha256(f"{self.name}\0{number * self.passes}".encode()).digest()
            raw = np.random.PCG64(int.from_bytes(key)).random_raw(self.passes * len(self.members))
            order = raw.reshape(self.passes, -1).argsort(axis=1, kind="stable")
            self.number, self.block = number, self.members[order].ravel()


def _windows() -> Iterator[tuple[int, int]]:
    """Stretches of time, always the same ones, so that a prefix does not depend on how much is drawn."""
    length, most = WINDOWS
    begin = 0
    while True:
        yield begin, begin + length
        begin, length = begin + length, min(2 * length, most)


def _partition(parts: list[tuple[str, float | None, np.ndarray]]) -> list[Margin]:
    """The shares asked of parts that do not overlap, and the rest, which all other cells make up."""
    asked = [Margin(f"{name}={share:g}", share, cells) for name, share, cells in parts if share is not None]
    if not asked:
        return []
    names, whole = " and ".join(margin.name for margin in asked), sum(margin.share for margin in asked)
    if not all(0 <= margin.share <= 1 for margin in asked) or whole > 1 + 1e-9:
        raise UserError(f"{names}: each must be a share from 0 to 1, and together at most 1; they sum to {whole:g}.")
    rest = ~np.any([margin.cells for margin in asked], axis=0)
    return [*asked, Margin(f"the rest beside {names}, {1 - whole:g},", max(0.0, 1 - whole), rest)]


def _rest(share: float | None) -> float | None:
    return None if share is None else 1 - share
