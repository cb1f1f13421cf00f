"""Sample index: the cost of each sample as columns, used by mixture, plan and preflight instead of the data.

`build_index` computes them in one pass over the sources, without decoding pixels. So the plan contains only usable
records, and knows the number of supervised tokens of each optimizer step before its first backward pass.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from lit_vlm.cost import Flops
from lit_vlm.data.readers.conversation import keep_first_turns
from lit_vlm.types import Language, Record, RecordError, Sample, SampleKind, Source, UserError

KINDS = tuple(SampleKind)  # codes of the column `kind`
LANGUAGES = tuple(Language)  # codes of the column `language`

# One row for each usable record. Tokens are counted over all segments; a pair has its prompt and two answers.
COLUMNS: dict[str, type[np.generic]] = {
    "position": np.uint32,  # in its source
    "tokens": np.int32,
    "image_tokens": np.int32,
    "supervised": np.int32,
    "chosen": np.int32,  # supervised tokens of a pair's chosen answer; 0 for samples
    "squares": np.int64,  # twice the token pairs of causal attention; of a single segment its squared length
    "longest": np.int32,  # maximum tokens that a segment attends to, its prefix included
    "tiles": np.int32,  # inputs of the vision tower, base views included
    "images": np.int16,
    "height": np.int32,  # of the first image, in pixels after EXIF rotation; 0 without one
    "width": np.int32,
    "kind": np.uint8,
    "language": np.uint8,
    "normalised": np.bool_,  # Unicode NFC normalisation changed its text
    "digest": np.uint64,  # of the record's text and the names (or bytes) of its images
    "group": np.uint64,  # of its images, or without images of its text; records of one group are held out together
    "content": np.uint64,  # of the bytes of its image files, see `content.py`; 0 without files
    "stamp": np.uint64,  # of the size and modification time of these files, see `compute_stamp`
}
# Stamps are not part of the content: a copy of a file may have another one.
CONTENT_COLUMNS = tuple(sorted(name for name in COLUMNS if name != "stamp"))
# How the length policy shortened an overlong record (`lengths.py`); -1: unchanged.
LENGTH_POLICY_COLUMNS: dict[str, type[np.generic]] = {"most_tiles": np.int16, "turns": np.int16}


@dataclass(slots=True)
class SampleIndex:
    """Index of the usable samples of several sources, as columns; sample i is `sources[source_ids[i]][position[i]]`."""

    sources: Sequence[Source]
    source_ids: np.ndarray  # [samples] int16
    columns: dict[str, np.ndarray]  # those of COLUMNS and FITTED, [samples] each
    errors: list[tuple[str, RecordError]] = field(default_factory=list)  # (source name, error)
    length_policy_counts: Counter[tuple[str, str]] = field(
        default_factory=Counter
    )  # overlong samples by (source, action)
    unused_keys: dict[str, dict[str, int]] = field(
        default_factory=dict
    )  # source name -> key that is not read -> number of records

    def __len__(self) -> int:
        return len(self.source_ids)

    def __getattr__(self, name: str) -> np.ndarray:
        if name in COLUMNS or name in LENGTH_POLICY_COLUMNS:
            return self.columns[name]
        raise AttributeError(name)

    def get_record(self, sample: int) -> Record:
        """Read the record as it is used in training: with the tiles and turns that the length policy keeps."""
        record = self.sources[self.source_ids[sample]][int(self.position[sample])]
        most_tiles, turns = int(self.most_tiles[sample]), int(self.turns[sample])
        if most_tiles >= 0:
            record = replace(record, max_tiles=most_tiles)
        if turns >= 0 and isinstance(record, Sample):
            record = keep_first_turns(record, turns)
        return record

    def get_kind(self, sample: int) -> SampleKind:
        return KINDS[self.kind[sample]]

    def get_language(self, sample: int) -> Language:
        return LANGUAGES[self.language[sample]]

    def find_source_samples(self, number: int) -> np.ndarray:
        """Find the samples of one source."""
        return np.flatnonzero(self.source_ids == number)

    def compute_flops(self, flops: Flops) -> np.ndarray:
        """Compute the FLOPs of each sample: [samples] float64."""
        return flops.compute(self.tokens, self.squares, self.tiles, self.supervised)

    def select(self, samples: np.ndarray) -> SampleIndex:
        """Select samples into a new index, without its `errors`."""
        columns = {name: column[samples] for name, column in self.columns.items()}
        return SampleIndex(self.sources, self.source_ids[samples], columns, unused_keys=self.unused_keys)

    def compute_keys(self, samples: Any) -> np.ndarray:
        """Compute cache keys [samples] uint64 from text, image names, and numbers of tokens and tiles."""
        lengths = [self.columns[name][samples].astype(np.uint64) for name in ("tokens", "supervised", "tiles")]
        key = self.columns["digest"][samples]
        for number, column in enumerate(lengths, 1):  # sums of odd multiples wrap around and stay distinct
            key = key + column * np.uint64(0x9E3779B97F4A7C15) * np.uint64(2 * number + 1)
        return key

    def compute_digest(self) -> str:
        """Compute a digest of the training data; it also depends on chat template, tokenizer and image settings."""
        hasher = hashlib.sha256()
        for source in self.sources:
            hasher.update(f"{source.name}\0".encode())
        for column in (
            self.source_ids,
            *(self.columns[name] for name in sorted((*CONTENT_COLUMNS, *LENGTH_POLICY_COLUMNS))),
        ):
            hasher.update(np.ascontiguousarray(column).tobytes())
        return hasher.hexdigest()

    def compute_image_digest(self) -> str:
        """Compute a digest of the contents of all image files."""
        return hashlib.sha256(np.ascontiguousarray(self.columns["content"]).tobytes()).hexdigest()


def list_groups(index: SampleIndex) -> list[Language | SampleKind]:
    """List the languages and kinds of the samples."""
    languages, kinds = np.unique(index.language).tolist(), np.unique(index.kind).tolist()
    return [*(LANGUAGES[code] for code in languages), *(KINDS[code] for code in kinds)]


def split_held_out(index: SampleIndex, fraction: float, max_per_source: int = 200) -> tuple[SampleIndex, SampleIndex]:
    """Split an index into training and held-out samples.

    Of each source min(fraction, `max_per_source`) samples are held out. They are selected by digest, so that neither the
    order nor the size of the source matters. Records with the same image stay together, so that no held-out image is
    used in training. They are separated only if each image has more records than are to be held out, which would leave
    none.
    """
    is_held_out = np.zeros(len(index), dtype=bool)
    for number in range(len(index.sources)):
        samples = index.find_source_samples(number)
        count = min(max_per_source, int(len(samples) * fraction))
        groups, sizes = np.unique(index.group[samples], return_counts=True)
        groups, sizes = groups[sizes <= count], sizes[sizes <= count]
        selected = groups[np.cumsum(sizes) <= count]  # digests are uniform, so the lowest are a random choice
        if len(selected):
            is_held_out[samples[np.isin(index.group[samples], selected)]] = True
        else:
            is_held_out[samples[np.argsort(index.columns["digest"][samples], kind="stable")[:count]]] = True
    training = index.select(np.flatnonzero(~is_held_out))
    training.errors, training.length_policy_counts = index.errors, index.length_policy_counts
    return training, index.select(np.flatnonzero(is_held_out))


def require_samples(index: SampleIndex, purpose: str) -> None:
    """Raise UserError if the index has no sample."""
    if not len(index):
        names = ", ".join(source.name for source in index.sources) or "none"
        raise UserError(f"No usable sample for {purpose} in the sources: {names}. Check data.sources.<name>.path.")
