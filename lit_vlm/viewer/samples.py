"""Samples of a mixture for the viewer: filters over the columns of the sample index, and records as the model will see them."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image

from lit_vlm.data.chat_template import TokenSequence
from lit_vlm.data.index.sample_index import KINDS, LANGUAGES, SampleIndex
from lit_vlm.data.processor import Processor
from lit_vlm.data.subsets import find_in_whole
from lit_vlm.types import PreferencePair, Record, Sample
from lit_vlm.viewer.curated import CuratedList
from lit_vlm.viewer.flags import RecordFlags

MAX_SIDE_PX = 1024  # of a picture that is shown; tiles are shown as they are
# A page asks for the rows of one filter, and for the tiles of one record, several times
NUM_CACHED_FILTERS = NUM_CACHED_TILES = 4


@dataclass(frozen=True, slots=True)
class SampleFilter:
    """Filter of samples; None keeps all.

    Attributes:
        part: "training" or "held_out".
        source, kind, language: names.
        min_tokens, max_tokens: both included.
        duplicates: only samples whose text and images are those of another sample.
        flagged: only flagged samples.
        curated: only samples in this list of task=curate.
    """

    part: str = "training"
    source: str | None = None
    kind: str | None = None
    language: str | None = None
    min_tokens: int | None = None
    max_tokens: int | None = None
    duplicates: bool = False
    flagged: bool = False
    curated: str | None = None


class SampleTable:
    """Samples of the training and the held-out index. No record is read until it is shown.

    Args:
        parts: index of each part, by "training" and "held_out".
        flags: flags of the records; None: no record can be flagged.
        curated: lists of task=curate over the sources of `flags`, by name.
    """

    def __init__(
        self,
        parts: dict[str, SampleIndex],
        processor: Processor,
        flags: RecordFlags | None = None,
        curated: Mapping[str, CuratedList] | None = None,
    ) -> None:
        self.parts, self.processor, self.flags, self.curated = parts, processor, flags, dict(curated or {})
        self._find = lru_cache(NUM_CACHED_FILTERS)(self._find_samples)
        self._load_tiles = lru_cache(NUM_CACHED_TILES)(self._load_all_tiles)

    def describe(self) -> dict[str, Any]:
        """Describe the parts: number of samples of each source, kind and language, and of unusable records."""
        return {name: self._describe_part(index) for name, index in self.parts.items()}

    def _describe_part(self, index: SampleIndex) -> dict[str, Any]:
        def count(codes: np.ndarray, names: Sequence[str]) -> dict[str, int]:
            return {
                str(name): int(n) for name, n in zip(names, np.bincount(codes, minlength=len(names)), strict=True) if n
            }

        return {
            "samples": len(index),
            "sources": count(index.source_ids, [source.name for source in index.sources]),
            "kinds": count(index.kind, KINDS),
            "languages": count(index.language, LANGUAGES),
            "curated": {
                name: len(self._find_in_sources(index, found.get_positions)) for name, found in self.curated.items()
            },
            "faults": dict(Counter(error.fault.value for _, error in index.errors)),
        }

    def list_samples(self, wanted: SampleFilter, offset: int, limit: int) -> tuple[int, list[dict[str, Any]]]:
        """List samples that pass a filter, from `offset` on. Returns their number and one row for each of the listed."""
        index = self.parts[wanted.part]
        found = self._find(replace(wanted, flagged=False))  # flags change, so they are not cached
        if wanted.flagged and self.flags is not None:
            flagged = self._find_in_sources(index, self.flags.get_flagged)
            found = np.intersect1d(found, flagged, assume_unique=True)
        return len(found), [self._describe_row(index, int(sample)) for sample in found[offset : offset + limit]]

    def _find_samples(self, wanted: SampleFilter) -> np.ndarray | range:
        """Find the samples that pass a filter, in the order of the index."""
        index = self.parts[wanted.part]
        masks = []
        if wanted.source is not None:
            source_names = [source.name for source in index.sources]
            number = source_names.index(wanted.source) if wanted.source in source_names else -1
            masks.append(index.source_ids == number)
        if wanted.kind is not None:
            masks.append(index.kind == _find_code(KINDS, wanted.kind))
        if wanted.language is not None:
            masks.append(index.language == _find_code(LANGUAGES, wanted.language))
        if wanted.min_tokens is not None:
            masks.append(index.tokens >= wanted.min_tokens)
        if wanted.max_tokens is not None:
            masks.append(index.tokens <= wanted.max_tokens)
        if wanted.curated is not None:
            is_found = np.zeros(len(index), dtype=bool)
            if wanted.curated in self.curated:
                is_found[self._find_in_sources(index, self.curated[wanted.curated].get_positions)] = True
            masks.append(is_found)
        if wanted.duplicates:
            masks.append(find_duplicates(index.columns["digest"]))
        return np.flatnonzero(np.logical_and.reduce(masks)) if masks else range(len(index))

    def _describe_row(self, index: SampleIndex, sample: int) -> dict[str, Any]:
        numbers = {
            name: int(index.columns[name][sample]) for name in ("position", "tokens", "supervised", "tiles", "images")
        }
        source = index.sources[index.source_ids[sample]].name
        return {
            "sample": sample,
            "flagged": self._is_flagged(index, sample),
            "source": source,
            "kind": index.get_kind(sample),
            "language": index.get_language(sample),
            **numbers,
        }

    def list_errors(self, part: str, fault: str | None, offset: int, limit: int) -> tuple[int, list[dict[str, str]]]:
        """List unusable records: their number, and source, location, fault and reason of each of the listed."""
        found = [(name, error) for name, error in self.parts[part].errors if fault in (None, error.fault.value)]
        rows = [
            {"source": name, "origin": error.origin, "fault": error.fault.value, "reason": error.reason}
            for name, error in found[offset : offset + limit]
        ]
        return len(found), rows

    def set_flag(self, part: str, sample: int, is_flagged: bool) -> None:
        """Flag a sample or take its flag away.

        Raises:
            KeyError: the record is of no training source, so that no selection can leave it out.
            UserError: the flags cannot be written.
        """
        found = self._find_flaggable(self.parts[part], sample)
        if self.flags is None or found is None:
            raise KeyError(sample)
        self.flags.set_flag(*found, is_flagged)

    def _is_flagged(self, index: SampleIndex, sample: int) -> bool | None:
        """Return True if a sample is flagged; None if it cannot be."""
        found = self._find_flaggable(index, sample)
        return self.flags.is_flagged(*found) if self.flags is not None and found is not None else None

    def _find_flaggable(self, index: SampleIndex, sample: int) -> tuple[str, int] | None:
        """Find the source of a sample and its position there; None if a selection cannot leave the record out."""
        source = index.sources[index.source_ids[sample]]
        whole, positions = find_in_whole(source, index.columns["position"][sample : sample + 1])
        is_flaggable = self.flags is not None and self.flags.has_source(source.name, whole)
        return (source.name, int(positions[0])) if is_flaggable else None

    def _find_in_sources(self, index: SampleIndex, get_positions: Callable[[str], np.ndarray]) -> np.ndarray:
        """Find the samples at positions of the sources, [n] ascending, without a look at each of the others."""
        found = [np.zeros(0, dtype=np.int64)]
        for source_id, source in enumerate(index.sources):
            own = np.flatnonzero(index.source_ids == source_id)
            whole, positions = find_in_whole(source, index.columns["position"][own])
            if self.flags is not None and self.flags.has_source(source.name, whole):
                found.append(own[np.isin(positions, get_positions(source.name))])
        return np.sort(np.concatenate(found))

    def has_sample(self, part: str, sample: int) -> bool:
        """Return True if there is such a sample."""
        return part in self.parts and 0 <= sample < len(self.parts[part])

    def describe_sample(self, part: str, sample: int) -> dict[str, Any]:
        """Describe a record as the model will see it. RecordError if it cannot be read any more."""
        index = self.parts[part]
        record = index.get_record(sample)
        found = {"curated": self._describe_curated(index, sample)}
        return self._describe_row(index, sample) | describe_record(self.processor, record) | found

    def _describe_curated(self, index: SampleIndex, sample: int) -> dict[str, list[str]]:
        """Describe why the lists of task=curate have a sample, by list; without the lists that do not."""
        place = self._find_flaggable(index, sample)
        found = {name: each.describe(*place) for name, each in self.curated.items()} if place else {}
        return {name: lines for name, lines in found.items() if lines}

    def load_image(self, part: str, sample: int, image: int) -> bytes:
        """Load a picture of a record as PNG, at most `MAX_SIDE_PX` pixels long. RecordError if it cannot be decoded."""
        picture = self.parts[part].get_record(sample).images[image].load()
        picture.thumbnail((MAX_SIDE_PX, MAX_SIDE_PX))
        return encode_png(picture)

    def load_tile(self, part: str, sample: int, image: int, tile: int) -> bytes:
        """Load a tile of a picture as PNG: the pixels that the vision tower gets. RecordError as `load_image`."""
        return encode_png(Image.fromarray(self._load_tiles(part, sample)[image][tile].transpose(1, 2, 0)))

    def _load_all_tiles(self, part: str, sample: int) -> list[np.ndarray]:
        return self.processor.load_tiles(self.parts[part].get_record(sample))


def _find_code(names: Sequence[str], name: str) -> int:
    """Find the code of a name in a column; 255, which no sample has, if there is no such name."""
    return next((code for code, each in enumerate(names) if each == name), 255)


def find_duplicates(digests: np.ndarray) -> np.ndarray:
    """Find the entries of [N] uint64 that are not unique: [N] bool."""
    order = np.argsort(digests, kind="stable")
    is_equal = digests[order][1:] == digests[order][:-1]
    found = np.zeros(len(digests), dtype=bool)
    found[order[1:][is_equal]] = found[order[:-1][is_equal]] = True
    return found


def describe_record(processor: Processor, record: Record) -> dict[str, Any]:
    """Describe a record: its location, its pictures with their tiles, and its token sequences with the supervision mask."""
    layouts = processor.compute_layouts(record)
    sequences = processor.encode_sequences(record, layouts)
    names = ("chosen", "rejected") if isinstance(record, PreferencePair) else ("conversation",)
    if isinstance(record, Sample):
        texts = ["\n".join(message.text for message in record.messages)]
    else:
        prompt = "\n".join(message.text for message in record.prompt)
        texts = [f"{prompt}\n{answer.text}" for answer in (record.chosen, record.rejected)]
    return {
        "id": str(record.id),
        "origin": record.origin,
        "pictures": [
            {"height": image.size[0], "width": image.size[1], "tiles": layout.num_tiles, "tokens": layout.num_tokens}
            for image, layout in zip(record.images, layouts, strict=True)
        ],
        "sequences": [
            {"name": name, "text": text, "num_tokens": sequence.num_tokens, "runs": list_runs(processor, sequence)}
            for name, text, sequence in zip(names, texts, sequences, strict=True)
        ],
    }


def list_runs(processor: Processor, sequence: TokenSequence) -> list[dict[str, Any]]:
    """List the runs of a sequence: neighbouring tokens of one type ("text", "control" or "image") and one supervision mask.

    Control tokens and special tokens of the chat template are "control", so that text which only looks like one differs.
    """
    ids = sequence.input_ids
    special = np.array([*processor.template.control_ids.values(), *processor.tokenizer.all_special_ids])
    types = np.where(ids == processor.image_token_id, 2, np.where(np.isin(ids, special), 1, 0))
    changes = np.flatnonzero((np.diff(types) != 0) | (np.diff(sequence.supervised.astype(int)) != 0)) + 1
    bounds = [0, *changes.tolist(), len(ids)]
    return [
        {
            "type": ("text", "control", "image")[types[start]],
            "supervised": bool(sequence.supervised[start]),
            "num_tokens": stop - start,
            "text": ""
            if types[start] == 2
            else processor.tokenizer.decode(ids[start:stop].tolist(), skip_special_tokens=False),
        }
        for start, stop in zip(bounds, bounds[1:], strict=False)
        if stop > start
    ]


def encode_png(image: Image.Image) -> bytes:
    """Encode an image as PNG."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()
