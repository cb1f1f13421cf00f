"""What every sample costs, before anything is trained: one pass over the sources, no pixel decoded.

The pass finds every record that cannot be used; the plan then deals only with good ones, and knows the number of
supervised tokens of each optimizer step before its first backward.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from lit_vlm.cost import Flops
from lit_vlm.data.processor import Processor
from lit_vlm.types import Kind, Language, Record, RecordError, Source, UserError


@dataclass(slots=True)
class Index:
    """Columns over all usable samples of several sources; `source_of[i]`, `position[i]` say where sample i is read."""

    sources: Sequence[Source]
    source_of: np.ndarray
    position: np.ndarray
    tokens: np.ndarray  # of all its segments
    supervised: np.ndarray
    chosen: np.ndarray  # supervised tokens of a pair's chosen answer, else 0
    tiles: np.ndarray
    flops: np.ndarray
    kinds: list[Kind]
    languages: list[Language]
    errors: list[tuple[str, RecordError]] = field(default_factory=list)  # (source name, what is wrong)

    def __len__(self) -> int:
        return len(self.position)

    def record(self, sample: int) -> Record:
        return self.sources[self.source_of[sample]][int(self.position[sample])]

    def of_source(self, number: int) -> np.ndarray:
        """Samples of one source."""
        return np.flatnonzero(self.source_of == number)

    def subset(self, samples: np.ndarray) -> Index:
        columns = {name: getattr(self, name)[samples] for name in COLUMNS}
        kinds, languages = [self.kinds[i] for i in samples], [self.languages[i] for i in samples]
        return Index(self.sources, **columns, kinds=kinds, languages=languages)

    def digest(self) -> str:
        """Changes when the data, the template, the tokenizer or the image settings change what is trained on."""
        hasher = hashlib.sha256()
        for source in self.sources:
            hasher.update(f"{source.name}\0{source.digest}\0".encode())
        for name in ("source_of", "position", "tokens", "supervised", "tiles"):
            hasher.update(getattr(self, name).tobytes())
        return hasher.hexdigest()


COLUMNS = ("source_of", "position", "tokens", "supervised", "chosen", "tiles", "flops")


def build_index(
    sources: Sequence[Source],
    processor: Processor,
    flops: Flops,
    *,
    most_tokens: int,
    most_tiles: int,
    on_progress: Callable[[int], None] | None = None,
) -> Index:
    """Read every record once.

    Args:
        most_tokens: `data.tokens_per_micro_batch`; a sample that needs more is a bad record: it can never be trained.
        most_tiles: `data.tiles_per_micro_batch`, likewise.
    """
    rows: list[tuple] = []
    kinds: list[Kind] = []
    languages: list[Language] = []
    errors: list[tuple[str, RecordError]] = []
    for number, source in enumerate(sources):
        for position in range(len(source)):
            try:
                record = source[position]
                cost = processor.cost(record)
                _check_fits(record, cost.num_tokens, cost.num_tiles, most_tokens, most_tiles)
            except RecordError as error:
                errors.append((source.name, error))
                continue
            work = flops.of(cost.lengths, cost.num_tiles, cost.num_supervised)
            rows.append((number, position, cost.num_tokens, cost.num_supervised, cost.num_chosen, cost.num_tiles, work))
            kinds.append(record.kind)
            languages.append(record.language)
            if on_progress and position % 256 == 0:
                on_progress(len(rows))
    table = list(zip(*rows, strict=True)) if rows else [()] * len(COLUMNS)
    types = (np.int32, np.int64, np.int32, np.int32, np.int32, np.int32, np.float64)
    columns = {name: np.array(values, dtype=t) for name, values, t in zip(COLUMNS, table, types, strict=True)}
    return Index(sources, **columns, kinds=kinds, languages=languages, errors=errors)


def split(index: Index, fraction: float, most: int = 200) -> tuple[Index, Index]:
    """Training and held-out samples: of each source min(fraction, most), chosen by digest, so that neither order nor size matters."""
    held = np.zeros(len(index), dtype=bool)
    for number, source in enumerate(index.sources):
        samples = index.of_source(number)
        keys = np.array([_key(source.name, int(index.position[i])) for i in samples])
        count = min(most, int(len(samples) * fraction))
        held[samples[np.argsort(keys, kind="stable")[:count]]] = True
    return index.subset(np.flatnonzero(~held)), index.subset(np.flatnonzero(held))


def _key(source: str, position: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{source}\0{position}".encode()).digest()[:7], "big")


def _check_fits(record: Record, num_tokens: int, num_tiles: int, most_tokens: int, most_tiles: int) -> None:
    if num_tokens > most_tokens:
        raise RecordError(
            record.origin,
            f"needs {num_tokens} tokens, more than data.tokens_per_micro_batch={most_tokens}",
            "Raise that budget, lower model.max_tiles, or shorten the record",
        )
    if num_tiles > most_tiles:
        raise RecordError(
            record.origin,
            f"needs {num_tiles} image tiles, more than data.tiles_per_micro_batch={most_tiles}",
            "Raise that budget, or lower model.grid",
        )


def require_samples(index: Index, what: str) -> None:
    if not len(index):
        names = ", ".join(source.name for source in index.sources) or "none"
        raise UserError(f"No usable sample for {what} in the sources: {names}. Check data.sources.<name>.path.")
