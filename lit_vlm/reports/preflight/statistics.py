"""Subset of a source without an index, with records that are spread evenly over it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from lit_vlm.data.index.build import compute_index_key
from lit_vlm.data.index.sample_index import KINDS, LANGUAGES, SampleIndex
from lit_vlm.data.index.shard_cache import get_origin, list_shard_ranges, open_shard_cache
from lit_vlm.data.packing.plan import Plan
from lit_vlm.data.processor import Processor
from lit_vlm.reports.preflight.facts import Histogram, PlanFacts, SourceRow, SummaryStats
from lit_vlm.types import Fault, Language, Record, RecordError, Source


class EvenlySpacedSubset:
    """Subset of at most `max_records` records of a source, evenly spaced."""

    def __init__(self, source: Source, max_records: int) -> None:
        self.name, self.source = source.name, source
        places = np.linspace(0, len(source) - 1, min(max_records, len(source)))
        self._positions = np.unique(places.round().astype(np.int64)).tolist()

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, index: int) -> Record:
        return self.source[self._positions[index]]

    def origin(self, index: int) -> str:
        return get_origin(self.source, self._positions[index])

    @property
    def digest(self) -> str:
        return f"{self.source.digest}:{len(self)}"


def is_indexed(source: Source, processor: Processor, store: Path) -> bool:
    """Return whether every shard of the source is in the index cache."""
    shelf = open_shard_cache(store)
    return all(
        shelf.get(compute_index_key(processor, span)) is not None for span in list_shard_ranges(0, source, store)
    )


def subsample_source(source: Source, processor: Processor, store: Path, max_records: int) -> Source:
    """Return the source itself if it is small or indexed, else an evenly spaced subset of `max_records` records."""
    small = len(source) <= max_records
    return source if small or is_indexed(source, processor, store) else EvenlySpacedSubset(source, max_records)


NUM_BINS = 30
LOG_SPAN = 16  # from this ratio of largest to smallest value on, bins are logarithmic
MAX_STEPS_SEEN = 200  # of a plan, when its packs are read one by one
MAX_PADDED_SAMPLES = 1 << 18  # samples for which the padding of other loaders is computed
LENGTH_GROUP_BATCHES = 50  # batches that a length-grouped loader sorts at once: the number in transformers


def fill_source_rows(
    rows: Sequence[SourceRow], index: SampleIndex, held_out: SampleIndex, errors: Sequence[tuple[str, RecordError]]
) -> None:
    """Fill in the counts of each source, in the order of `index.sources`. Held-out records of the same source count as usable."""
    shared = held_out.sources is index.sources
    for number, row in enumerate(rows):
        training = index.find_source_samples(number)
        held = held_out.find_source_samples(number) if shared else training[:0]
        row.usable, row.held_out = len(training) + len(held), len(held)
        row.kinds = _count_by_name(index.kind[training], KINDS)
        row.languages = _count_by_name(index.language[training], LANGUAGES)
        for name in ("tokens", "image_tokens", "supervised", "tiles", "images", "normalised"):
            total = int(index.columns[name][training].sum()) + int(held_out.columns[name][held].sum())
            setattr(row, name, total)
        digests = np.concatenate([index.columns["digest"][training], held_out.columns["digest"][held]])
        row.duplicates = len(digests) - len(np.unique(digests))
        row.fewer_tiles = int((index.most_tiles[training] >= 0).sum())
        row.fewer_turns = int((index.turns[training] >= 0).sum())
        row.quarantined = _count_faults(row.name, errors)
        row.unread = index.unused_keys.get(row.name, {})


def count_duplicates_between_sources(index: SampleIndex) -> int:
    """Count records that equal a record of another source, in text and images."""
    each = [
        np.unique(index.columns["digest"][index.find_source_samples(number)]) for number in range(len(index.sources))
    ]
    return sum(map(len, each)) - len(np.unique(np.concatenate(each)))


def build_histograms(index: SampleIndex, scales: np.ndarray, caps: Mapping[str, int]) -> list[Histogram]:
    """Build histograms of the training records, each counted once, not as often as the mixture samples it.

    Args:
        scales: [sources] records of the whole source for each record that was read.
        caps: limits of `tokens` and `tiles` of a micro-batch.
    """
    weights, pictures = scales[index.source_ids], index.height > 0
    sides = np.sqrt(index.height.astype(np.float64) * index.width).round().astype(np.int64)
    columns = [
        ("Tokens of a sample", "tokens", index.tokens, None, caps["tokens"]),
        ("Supervised tokens of a sample", "tokens", index.supervised, None, None),
        ("Tiles of a sample", "tiles", index.tiles, None, caps["tiles"]),
        ("Size of the first picture, root of height \u00d7 width", "pixels", sides, pictures, None),
    ]
    result = []
    for title, unit, values, mask, cap in columns:
        selection = slice(None) if mask is None else mask
        if len(values[selection]):
            result.append(
                _build_histogram(title, unit, values[selection], index.language[selection], weights[selection], cap)
            )
    return result


def compute_summary_stats(values: np.ndarray) -> SummaryStats:
    """Compute minimum, mean, median, 95th percentile and maximum; zeros for no values."""
    if not len(values):
        return SummaryStats(0, 0, 0, 0, 0)
    median, p95 = np.percentile(values, [50, 95])
    return SummaryStats(float(values.min()), float(values.mean()), float(median), float(p95), float(values.max()))


def summarize_plan(plan: Plan, steps: int) -> PlanFacts:
    """Summarize the plan: sums, pack sizes, balance and padding.

    Args:
        steps: optimizer steps of the whole run. If the plan has only the first of them, sums are scaled up.
    """
    index, draws, balance = plan.index, plan.get_sample_sequence().astype(np.int64), plan.measure_balance()
    share, packs = steps / plan.num_steps, balance["num_packs"] - balance["blank_packs"]
    per_pack = len(draws) / max(packs, 1)
    batch = max(2, round(per_pack))
    lengths = index.tokens[draws[:MAX_PADDED_SAMPLES]]
    sums = {name: round(int(index.columns[name][draws].sum()) * share) for name in ("tokens", "supervised", "tiles")}
    return PlanFacts(
        steps=steps,
        steps_seen=plan.num_steps,
        samples_per_step=len(draws) / plan.num_steps,
        k=plan.accumulate_grad_batches,
        world_size=plan.world_size,
        samples=round(len(draws) * share),
        **sums,
        pack_tokens=_get_pack_stats(balance["tokens"]),
        pack_tiles=_get_pack_stats(balance["tiles"]),
        pack_samples=per_pack,
        most_tokens=plan.max_tokens,
        most_tiles=plan.max_tiles,
        most_supervised=_find_max_supervised(plan),
        blank=balance["blank_packs"] / balance["num_packs"],
        balance_ranks=balance["ranks"]["mean"],
        balance_micro=balance["micro_steps"]["mean"],
        padding={
            "random batches": compute_padding(lengths, batch),
            "length-grouped batches": compute_padding(lengths, batch, grouped=True),
            "this plan": balance["padding"],
        },
        padding_batch=batch,
    )


def _get_pack_stats(sizes: Mapping[str, float]) -> SummaryStats:
    return SummaryStats(sizes["p5"], sizes["mean"], sizes["median"], sizes["p95"], sizes["largest"])


def _find_max_supervised(plan: Plan) -> int:
    """Find the maximum number of supervised tokens in a micro-batch, over at most `MAX_STEPS_SEEN` steps."""
    step_numbers = np.unique(np.linspace(0, plan.num_steps - 1, MAX_STEPS_SEEN).astype(int)).tolist()
    packs = [np.array(pack, dtype=np.int64) for number in step_numbers for pack in plan.get_step(number).packs]
    return max(int(plan.index.supervised[pack].sum()) for pack in packs)


def compute_padding(lengths: np.ndarray, batch_size: int, *, grouped: bool = False) -> float:
    """Compute the share of padding tokens when each batch is padded to its longest sample.

    Args:
        lengths: [samples] tokens, in the order in which the samples are read.
        batch_size: samples of a batch.
        grouped: first sort chunks of `LENGTH_GROUP_BATCHES` batches by length.
    """
    usable = len(lengths) - len(lengths) % batch_size
    if not usable:
        return 0.0
    lengths = lengths[:usable]
    if grouped:
        stretch = LENGTH_GROUP_BATCHES * batch_size
        lengths = np.concatenate([np.sort(lengths[i : i + stretch]) for i in range(0, usable, stretch)])
    slots = lengths.reshape(-1, batch_size).max(axis=1).sum() * batch_size
    return float(1 - lengths.sum() / max(slots, 1))


def _count_by_name(codes: np.ndarray, names: Sequence[str]) -> dict[str, int]:
    counts = np.bincount(codes, minlength=len(names)).tolist()
    return dict(Counter({str(name): count for name, count in zip(names, counts, strict=True) if count}).most_common())


def _count_faults(source: str, errors: Sequence[tuple[str, RecordError]]) -> dict[str, int]:
    """Count the records of a source by their first fault."""
    first: dict[str, Fault] = {}
    for name, error in errors:
        if name == source:
            first.setdefault(error.origin, error.fault)
    return {str(fault): count for fault, count in Counter(first.values()).most_common()}


def _build_histogram(
    title: str, unit: str, values: np.ndarray, languages: np.ndarray, weights: np.ndarray, cap: int | None
) -> Histogram:
    least, most = float(values.min()), float(values.max())
    log = least > 0 and most / least > LOG_SPAN
    edges = _compute_edges(values, log)
    series = {}
    for number, language in enumerate(LANGUAGES):
        mask = languages == number
        if language is not Language.auto and mask.any():
            counts, _ = np.histogram(values[mask], edges, weights=weights[mask])
            series[str(language)] = [round(count) for count in counts.tolist()]
    shown_cap = cap if cap is not None and cap <= 4 * values.max() else None
    return Histogram(title, unit, edges.tolist(), series, compute_summary_stats(values), log, shown_cap)


def _compute_edges(values: np.ndarray, log: bool) -> np.ndarray:
    least, most = float(values.min()), float(values.max())
    if most - least < NUM_BINS + 10:  # one bar for each integer
        return np.arange(least, most + 2) - 0.5
    edges = np.geomspace(least, most + 1, NUM_BINS + 1) if log else np.linspace(least, most + 1, NUM_BINS + 1)
    return np.unique(np.round(edges)) - 0.5
