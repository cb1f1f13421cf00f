"""What every sample costs, as columns: what the mixture, the plan and preflight look at instead of the data.

`index_store` makes them in one pass over the sources, no pixel decoded. The plan then deals only with records that can
be used, and knows the number of supervised tokens of each optimizer step before its first backward.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from lit_vlm.cost import Flops
from lit_vlm.data.readers.record import first_turns
from lit_vlm.types import Kind, Language, Record, RecordError, Sample, Source, UserError

KINDS = tuple(Kind)  # codes of the column `kind`
LANGUAGES = tuple(Language)  # codes of the column `language`

# A row per usable record. Tokens are counted over all segments: those of a pair are its prompt and its two answers.
COLUMNS: dict[str, type[np.generic]] = {
    "position": np.uint32,  # in its source
    "tokens": np.int32,
    "image_tokens": np.int32,
    "supervised": np.int32,
    "chosen": np.int32,  # supervised tokens of a pair's chosen answer; 0 for samples
    "squares": np.int64,  # twice the pairs of tokens that attention looks at: of a segment alone, its length squared
    "longest": np.int32,  # most tokens that a segment sees, its prefix with it
    "tiles": np.int32,  # tower inputs, base views included
    "images": np.int16,
    "height": np.int32,  # of the first image, in pixels after EXIF rotation; 0 without one
    "width": np.int32,
    "kind": np.uint8,
    "language": np.uint8,
    "normalised": np.bool_,  # Unicode's NFC changed its text
    "digest": np.uint64,  # of what the record says and of the names (or bytes) of its images
    "group": np.uint64,  # of its images alone, else of its text: records of one group are held out together
    "content": np.uint64,  # of the bytes of its picture files, see `content.py`; 0 where nothing lies in files
    "stamp": np.uint64,  # of the size and time of these files, see `fingerprint.stamp`
}
# Other stamps are no other data: a copy has its own.
OF_CONTENT = tuple(sorted(name for name in COLUMNS if name != "stamp"))
# How a record that is too long was made to fit (`lengths.py`); -1: as it is.
FITTED: dict[str, type[np.generic]] = {"most_tiles": np.int16, "turns": np.int16}


@dataclass(slots=True)
class Index:
    """Columns over the usable records of several sources; sample i is `sources[source_of[i]][position[i]]`."""

    sources: Sequence[Source]
    source_of: np.ndarray  # [samples] int16
    columns: dict[str, np.ndarray]  # those of COLUMNS and FITTED, [samples] each
    errors: list[tuple[str, RecordError]] = field(default_factory=list)  # (source name, what is wrong)
    fitted: Counter[tuple[str, str]] = field(default_factory=Counter)  # over-long ones of (source name, what was done)
    unread: dict[str, dict[str, int]] = field(
        default_factory=dict
    )  # source name -> key that nothing is read from -> records

    def __len__(self) -> int:
        return len(self.source_of)

    def __getattr__(self, name: str) -> np.ndarray:
        if name in COLUMNS or name in FITTED:
            return self.columns[name]
        raise AttributeError(name)

    def record(self, sample: int) -> Record:
        """The record as it is trained on: with the tiles and turns that the length policy left it."""
        record = self.sources[self.source_of[sample]][int(self.position[sample])]
        most_tiles, turns = int(self.most_tiles[sample]), int(self.turns[sample])
        if most_tiles >= 0:
            record = replace(record, max_tiles=most_tiles)
        if turns >= 0 and isinstance(record, Sample):
            record = first_turns(record, turns)
        return record

    def kind_of(self, sample: int) -> Kind:
        return KINDS[self.kind[sample]]

    def language_of(self, sample: int) -> Language:
        return LANGUAGES[self.language[sample]]

    def of_source(self, number: int) -> np.ndarray:
        """Samples of one source."""
        return np.flatnonzero(self.source_of == number)

    def flops(self, flops: Flops) -> np.ndarray:
        """[samples] float64."""
        return flops.of(self.tokens, self.squares, self.tiles, self.supervised)

    def subset(self, samples: np.ndarray) -> Index:
        columns = {name: column[samples] for name, column in self.columns.items()}
        return Index(self.sources, self.source_of[samples], columns, unread=self.unread)

    def keys(self, samples: Any) -> np.ndarray:
        """[samples] uint64, of what they say, which pictures they have, and as how many tokens and tiles."""
        lengths = [self.columns[name][samples].astype(np.uint64) for name in ("tokens", "supervised", "tiles")]
        key = self.columns["digest"][samples]
        for number, column in enumerate(lengths, 1):  # sums of odd multiples wrap around and stay apart
            key = key + column * np.uint64(0x9E3779B97F4A7C15) * np.uint64(2 * number + 1)
        return key

    def digest(self) -> str:
        """Changes when the data, the template, the tokenizer or the image settings change what is trained on."""
        hasher = hashlib.sha256()
        for source in self.sources:
            hasher.update(f"{source.name}\0".encode())
        for column in (self.source_of, *(self.columns[name] for name in sorted((*OF_CONTENT, *FITTED)))):
            hasher.update(np.ascontiguousarray(column).tobytes())
        return hasher.hexdigest()

    def digest_of_pictures(self) -> str:
        """Changes when a picture's file holds something else."""
        return hashlib.sha256(np.ascontiguousarray(self.columns["content"]).tobytes()).hexdigest()


def groups_of(index: Index) -> list[Language | Kind]:
    """The languages and kinds that it holds."""
    languages, kinds = np.unique(index.language).tolist(), np.unique(index.kind).tolist()
    return [*(LANGUAGES[code] for code in languages), *(KINDS[code] for code in kinds)]


def split(index: Index, fraction: float, most: int = 200) -> tuple[Index, Index]:
    """Training and held-out samples: of each source min(fraction, most), chosen by digest, so that neither order nor
    size matters. Records of one image stay together, so that no held-out picture is trained on; only where each image
    has more records than are held out, which would leave none, they are parted."""
    held = np.zeros(len(index), dtype=bool)
    for number in range(len(index.sources)):
        samples = index.of_source(number)
        count = min(most, int(len(samples) * fraction))
        groups, sizes = np.unique(index.group[samples], return_counts=True)
        groups, sizes = groups[sizes <= count], sizes[sizes <= count]
        few = groups[np.cumsum(sizes) <= count]  # digests are even, so the lowest are as good as any
        if len(few):
            held[samples[np.isin(index.group[samples], few)]] = True
        else:
            held[samples[np.argsort(index.columns["digest"][samples], kind="stable")[:count]]] = True
    training = index.subset(np.flatnonzero(~held))
    training.errors, training.fitted = index.errors, index.fitted
    return training, index.subset(np.flatnonzero(held))


def require_samples(index: Index, what: str) -> None:
    if not len(index):
        names = ", ".join(source.name for source in index.sources) or "none"
        raise UserError(f"No usable sample for {what} in the sources: {names}. Check data.sources.<name>.path.")
