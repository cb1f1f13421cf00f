"""Balance of a mixture: which records of groups that are too large are left out.

A group is a kind of sample, a language, a range of lengths, a number of tiles, or a combination of them. Records of a group
leave in the order of a number drawn from the seed, their source and position, so a larger group keeps what a smaller one kept.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lit_vlm.anyres import ImageSettings, make_grid_pinpoints
from lit_vlm.config.choices import BalanceGroup
from lit_vlm.config.curation import BalanceConfig
from lit_vlm.curation.concepts import ConceptMatcher, count_concepts, draw_uniform, is_sampled, read_concepts
from lit_vlm.curation.features import OnProgress
from lit_vlm.curation.mixture import (
    CuratedMixture,
    CurationResult,
    Example,
    ResultTable,
    choose_examples,
    map_records,
)
from lit_vlm.curation.text_hashes import list_messages
from lit_vlm.formatting import format_count
from lit_vlm.types import Record, Source

CONCEPTS_KEY = "curate.balance.concepts"
MAX_SHOWN_CONCEPTS = 50  # rows of the table; summary.json counts all records
SHARE_TOLERANCE = 0.005  # difference up to which a share counts as reached
_MEAN = (0.5, 0.5, 0.5)


@dataclass(frozen=True, slots=True)
class ReadGroups:
    """Groups of all records.

    Attributes:
        groups: number of the group of each record, [R]; -1 if it cannot be read.
        names: of the groups, in their order.
        errors: messages of the records that cannot be read, by number.
    """

    groups: np.ndarray
    names: list[str]
    errors: dict[int, str]


@dataclass(frozen=True, slots=True)
class ReadConcepts:
    """Concepts of all records.

    Attributes:
        concepts: texts of the concepts.
        matches: numbers of the concepts that each record names.
        unusable: concepts that no text can name.
        errors: as in `ReadGroups`.
    """

    concepts: list[str]
    matches: list[list[int]]
    unusable: list[str]
    errors: dict[int, str]


# ------------------------------------------------------------------------------------------------------- groups


def read_groups(
    sources: Sequence[Source], settings: BalanceConfig, *, workers: int, on_progress: OnProgress | None = None
) -> ReadGroups:
    """Read the group of each record. Pictures are not decoded; their size is read where tiles are counted."""
    describe = make_describer(settings)
    found, errors = map_records(sources, describe, workers=workers, on_progress=on_progress)
    names = sorted({name for name in found if name is not None}, key=_get_natural_key)
    numbers = {name: number for number, name in enumerate(names)}
    groups = np.array([-1 if name is None else numbers[name] for name in found], np.int64)
    return ReadGroups(groups, names, errors)


def make_describer(settings: BalanceConfig) -> Callable[[Record], str]:
    """Make the function that names the group of a record."""
    pinpoints = make_grid_pinpoints(settings.tile_size, settings.grid)
    images = ImageSettings(settings.tile_size, settings.tile_size, pinpoints, None, _MEAN, _MEAN)

    def describe(record: Record) -> str:
        return "/".join(_describe_property(record, by, settings.lengths, images) for by in settings.by)

    return describe


def _describe_property(record: Record, by: BalanceGroup, lengths: Sequence[int], images: ImageSettings) -> str:
    if by is BalanceGroup.kind:
        return record.kind.value
    if by is BalanceGroup.language:
        return record.language.value
    if by is BalanceGroup.tiles:
        is_single = len(record.images) == 1
        layouts = [
            images.compute_layout(*image.size, single_image=is_single, max_tiles=record.max_tiles)
            for image in record.images
        ]
        return str(sum(layout.num_tiles for layout in layouts))
    length = sum(len(message.text) for message in list_messages(record))
    low = max((edge for edge in lengths if edge <= length), default=0)
    high = min((edge for edge in lengths if edge > length), default=None)
    return f"{low}-{'' if high is None else high - 1}"


def _get_natural_key(name: str) -> list[tuple[bool, int, str]]:
    """Return the sort key of a name in which numbers count as numbers."""
    parts = re.split(r"(\d+)", name)
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in parts]


def compute_targets(counts: np.ndarray, shares: np.ndarray, min_kept: int) -> np.ndarray:
    """Compute how many records of each group stay, so that the groups have their shares of as many records as possible.

    Args:
        counts: records of each group, [G].
        shares: asked share of each group, [G]; NaN: the group has its part of what the others leave.
        min_kept: records that stay at least; where the shares would leave fewer, groups that are too large keep more.

    Returns:
        [G] int64, at most `counts`.
    """
    others = np.isnan(shares)
    rest = max(1 - float(np.nansum(shares)), 0.0)
    asked = np.where(others, rest * counts / max(int(counts[others].sum()), 1), np.nan_to_num(shares))
    is_open = (asked > 0) & (counts > 0)
    if not is_open.any():
        return np.zeros(len(counts), np.int64)
    asked = np.where(is_open, asked / asked[is_open].sum(), 0.0)
    scales = np.sort(counts[is_open] / asked[is_open])  # totals at which one more group is used up
    kept = np.array([np.minimum(counts, asked * scale).sum() for scale in scales])
    total = min(max(float(scales[0]), float(min_kept)), float(kept[-1]))
    scale = np.interp(total, np.concatenate([[0.0], kept]), np.concatenate([[0.0], scales]))
    return np.minimum(np.rint(asked * scale), counts).astype(np.int64)


def balance_groups(
    mixture: CuratedMixture, read: ReadGroups, settings: BalanceConfig, *, seed: int, num_shown: int
) -> CurationResult:
    """Choose the records that leave, so that the groups have the asked shares and no more than the asked number."""
    usable = (read.groups >= 0) & ~mixture.is_out
    counts = np.bincount(read.groups[usable], minlength=len(read.names))
    names = [*read.names, *(name for name in settings.shares if name not in read.names)]
    counts = np.concatenate([counts, np.zeros(len(names) - len(counts), np.int64)])
    limits = np.minimum(counts, settings.max_per_group) if settings.max_per_group else counts
    shares = np.array([settings.shares.get(name, np.nan) for name in names])
    kept = limits
    if settings.shares:
        kept = compute_targets(limits, shares, int(np.ceil(limits.sum() * (1 - settings.max_left_out))))
    left_out = sorted(
        record
        for group in np.flatnonzero(kept < counts).tolist()
        for record in rank_records(mixture, np.flatnonzero(usable & (read.groups == group)), seed)[kept[group] :]
    )
    group_names = [names[read.groups[record]] for record in left_out]
    lines = [mixture.describe(record) | {"group": name} for record, name in zip(left_out, group_names, strict=True)]
    is_kept = usable.copy()
    is_kept[left_out] = False
    kept_records = np.flatnonzero(is_kept).tolist()
    kept_names = [names[read.groups[record]] for record in kept_records]
    return CurationResult(
        left_out,
        lines,
        [(f"left out of {name}", int(counts[n] - kept[n])) for n, name in enumerate(names) if kept[n] < counts[n]],
        show_groups(mixture, left_out, group_names, "left out", num_shown),
        show_groups(mixture, kept_records, kept_names, "stays", num_shown),
        notes=list(describe_missed_shares(names, counts, kept, settings)),
        tables=[make_group_table(names, counts, kept, shares)],
    )


def rank_records(mixture: CuratedMixture, records: np.ndarray, seed: int) -> list[int]:
    """Rank records by numbers drawn from the seed, their sources and positions."""
    return sorted(records.tolist(), key=lambda record: draw_uniform(f"{seed}\0{mixture.get_key(record)}"))


def make_group_table(names: Sequence[str], counts: np.ndarray, kept: np.ndarray, shares: np.ndarray) -> ResultTable:
    """Make the table of the groups: asked beside achieved."""
    rows = [
        (
            name,
            f"{counts[n]:,}",
            f"{counts[n] / max(int(counts.sum()), 1):.1%}",
            "" if np.isnan(shares[n]) else f"{shares[n]:.1%}",
            f"{kept[n]:,}",
            f"{kept[n] / max(int(kept.sum()), 1):.1%}",
        )
        for n, name in enumerate(names)
    ]
    return ResultTable("Groups", ("group", "records", "share", "asked", "kept", "achieved"), rows)


def describe_missed_shares(
    names: Sequence[str], counts: np.ndarray, kept: np.ndarray, settings: BalanceConfig
) -> Iterator[str]:
    """Describe the shares that are not reached: a sentence for each reason."""
    empty = [name for n, name in enumerate(names) if settings.shares.get(name) and not counts[n]]
    if empty:
        yield f"{', '.join(empty)}: no record is in this group, so its share cannot be reached. The others share the whole."
        return
    achieved = dict(zip(names, kept / max(int(kept.sum()), 1), strict=True))
    missed = [name for name, share in settings.shares.items() if abs(achieved[name] - share) > SHARE_TOLERANCE]
    if missed:
        yield (
            f"The asked share of {', '.join(missed)} is not reached: it would leave out more than {settings.max_left_out:.0%} of the "
            "records. curate.balance.max_left_out sets this limit."
        )


def show_groups(
    mixture: CuratedMixture, records: Sequence[int], names: Sequence[str], title: str, count: int
) -> list[Example]:
    """Show some records of each group."""
    named = dict(zip(records, names, strict=True))
    return [Example(named[record], (mixture.show(title, record),)) for record in choose_examples(records, names, count)]


# ----------------------------------------------------------------------------------------------------- concepts


def match_records(
    sources: Sequence[Source], settings: BalanceConfig, *, workers: int, on_progress: OnProgress | None = None
) -> ReadConcepts:
    """Find the concepts that the turns of each record name.

    Raises:
        UserError: the list cannot be read.
    """
    concepts = read_concepts(Path(settings.concepts or ""), CONCEPTS_KEY)
    matcher = ConceptMatcher(concepts)

    def match(record: Record) -> list[int]:
        return matcher.match("\n".join(message.text for message in list_messages(record)))

    found, errors = map_records(sources, match, workers=workers, on_progress=on_progress)
    return ReadConcepts(concepts, [one or [] for one in found], matcher.unusable, errors)


def balance_concepts(
    mixture: CuratedMixture, read: ReadConcepts, settings: BalanceConfig, *, seed: int, num_shown: int
) -> CurationResult:
    """Choose the records that leave by MetaCLIP's rule: one stays if any of its concepts is sampled."""
    usable = ~mixture.is_out
    usable[list(read.errors)] = False
    records = np.flatnonzero(usable).tolist()
    counts = count_concepts([read.matches[record] for record in records], len(read.concepts))
    probabilities = settings.max_per_concept / np.maximum(counts, settings.max_per_concept)
    left_out = [
        record
        for record in records
        if not (
            is_sampled(f"{seed}\0{mixture.get_key(record)}", read.matches[record], probabilities)
            if read.matches[record]
            else settings.keep_unmatched
        )
    ]
    out = set(left_out)
    kept = [record for record in records if record not in out]
    kept_counts = count_concepts([read.matches[record] for record in kept], len(read.concepts))
    num_unmatched = sum(not read.matches[record] for record in records)
    notes = []
    if read.unusable:
        notes.append(
            f"{format_count(len(read.unusable), 'concept')} cannot be found in any text, because they have no noun or word: "
            f"{', '.join(read.unusable[:10])}."
        )
    return CurationResult(
        left_out,
        [
            mixture.describe(record) | {"concepts": [read.concepts[one] for one in read.matches[record]]}
            for record in left_out
        ],
        [
            ("concepts that records name", int((counts > 0).sum())),
            ("concepts of more than max_per_concept records", int((counts > settings.max_per_concept).sum())),
            ("records that name no concept", num_unmatched),
        ],
        show_concepts(mixture, read, left_out, "left out", num_shown),
        show_concepts(mixture, read, kept, "stays", num_shown),
        notes=notes,
        tables=[make_concept_table(read.concepts, counts, kept_counts, probabilities)],
    )


def show_concepts(
    mixture: CuratedMixture, read: ReadConcepts, records: Sequence[int], title: str, count: int
) -> list[Example]:
    """Show some records with their concepts."""
    chosen = choose_examples(records, [""] * len(records), count)
    named = [", ".join(read.concepts[one] for one in read.matches[record]) or "no concept" for record in chosen]
    return [Example(name, (mixture.show(title, record),)) for record, name in zip(chosen, named, strict=True)]


def make_concept_table(
    concepts: Sequence[str], counts: np.ndarray, kept: np.ndarray, probabilities: np.ndarray
) -> ResultTable:
    """Make the table of the most frequent concepts. More records stay than are sampled: others of their concepts keep them."""
    order = np.argsort(-counts, kind="stable")[:MAX_SHOWN_CONCEPTS]
    rows = [
        (
            concepts[n],
            f"{counts[n]:,}",
            f"{probabilities[n]:.3f}",
            f"{counts[n] * probabilities[n]:,.0f}",
            f"{kept[n]:,}",
        )
        for n in order
        if counts[n]
    ]
    return ResultTable("Concepts", ("concept", "records", "probability", "asked", "kept"), rows)
