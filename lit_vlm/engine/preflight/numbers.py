"""Preflight statistics that need the index and the plan only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from lit_vlm.data.index.columns import KINDS, LANGUAGES, Index
from lit_vlm.data.plan.plan import Plan
from lit_vlm.engine.preflight.facts import Histogram, PlanFacts, SourceRow, Spread
from lit_vlm.types import Fault, Language, RecordError

BINS = 30
LOG_SPAN = 16  # from this ratio of largest to smallest value on, bins are logarithmic
STEPS_SEEN = 200  # of a plan, when its packs are read one by one
MOST_PADDED = 1 << 18  # samples for which the padding of other loaders is computed
GROUP = 50  # batches that a length-grouped loader sorts at once: the number in transformers


def fill_source_rows(
    rows: Sequence[SourceRow], index: Index, held_out: Index, errors: Sequence[tuple[str, RecordError]]
) -> None:
    """Fill in the counts of each source, in the order of `index.sources`. Held-out records of the same source count as usable."""
    shared = held_out.sources is index.sources
    for number, row in enumerate(rows):
        training = index.of_source(number)
        held = held_out.of_source(number) if shared else training[:0]
        row.usable, row.held_out = len(training) + len(held), len(held)
        row.kinds = _counted(index.kind[training], KINDS)
        row.languages = _counted(index.language[training], LANGUAGES)
        for name in ("tokens", "image_tokens", "supervised", "tiles", "images", "normalised"):
            total = int(index.columns[name][training].sum()) + int(held_out.columns[name][held].sum())
            setattr(row, name, total)
        digests = np.concatenate([index.columns["digest"][training], held_out.columns["digest"][held]])
        row.duplicates = len(digests) - len(np.unique(digests))
        row.fewer_tiles = int((index.most_tiles[training] >= 0).sum())
        row.fewer_turns = int((index.turns[training] >= 0).sum())
        row.quarantined = _faults(row.name, errors)
        row.unread = index.unread.get(row.name, {})


def duplicates_between(index: Index) -> int:
    """Count records that equal a record of another source, in text and images."""
    each = [np.unique(index.columns["digest"][index.of_source(number)]) for number in range(len(index.sources))]
    return sum(map(len, each)) - len(np.unique(np.concatenate(each)))


def histograms(index: Index, scales: np.ndarray, caps: Mapping[str, int]) -> list[Histogram]:
    """Build histograms of the training records, each counted once, not as often as the mixture samples it.

    Args:
        scales: [sources] records of the whole source for each record that was read.
        caps: limits of `tokens` and `tiles` of a micro-batch.
    """
    weights, pictures = scales[index.source_of], index.height > 0
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
                _histogram(title, unit, values[selection], index.language[selection], weights[selection], cap)
            )
    return result


def spread(values: np.ndarray) -> Spread:
    """Compute minimum, mean, median, 95th percentile and maximum; zeros for no values."""
    if not len(values):
        return Spread(0, 0, 0, 0, 0)
    median, p95 = np.percentile(values, [50, 95])
    return Spread(float(values.min()), float(values.mean()), float(median), float(p95), float(values.max()))


def plan_facts(plan: Plan, steps: int) -> PlanFacts:
    """Summarize the plan: sums, pack sizes, balance and padding.

    Args:
        steps: optimizer steps of the whole run. If the plan has only the first of them, sums are scaled up.
    """
    index, draws, balance = plan.index, plan.draws().astype(np.int64), plan.balance()
    share, packs = steps / plan.num_steps, balance["num_packs"] - balance["blank_packs"]
    per_pack = len(draws) / max(packs, 1)
    batch = max(2, round(per_pack))
    lengths = index.tokens[draws[:MOST_PADDED]]
    sums = {name: round(int(index.columns[name][draws].sum()) * share) for name in ("tokens", "supervised", "tiles")}
    return PlanFacts(
        steps=steps,
        steps_seen=plan.num_steps,
        samples_per_step=len(draws) / plan.num_steps,
        k=plan.k,
        world_size=plan.world_size,
        samples=round(len(draws) * share),
        **sums,
        pack_tokens=_pack_spread(balance["tokens"]),
        pack_tiles=_pack_spread(balance["tiles"]),
        pack_samples=per_pack,
        most_tokens=plan.most_tokens,
        most_tiles=plan.most_tiles,
        most_supervised=_most_supervised(plan),
        blank=balance["blank_packs"] / balance["num_packs"],
        balance_ranks=balance["ranks"]["mean"],
        balance_micro=balance["micro_steps"]["mean"],
        padding={
            "random batches": padding(lengths, batch),
            "length-grouped batches": padding(lengths, batch, grouped=True),
            "this plan": balance["padding"],
        },
        padding_batch=batch,
    )


def _pack_spread(sizes: Mapping[str, float]) -> Spread:
    return Spread(sizes["p5"], sizes["mean"], sizes["median"], sizes["p95"], sizes["largest"])


def _most_supervised(plan: Plan) -> int:
    """Find the maximum number of supervised tokens in a micro-batch, over at most `MAX_STEPS_SEEN` steps."""
    step_numbers = np.unique(np.linspace(0, plan.num_steps - 1, STEPS_SEEN).astype(int)).tolist()
    packs = [np.array(pack, dtype=np.int64) for number in step_numbers for pack in plan.step(number).packs]
    return max(int(plan.index.supervised[pack].sum()) for pack in packs)


def padding(lengths: np.ndarray, batch: int, *, grouped: bool = False) -> float:
    """Compute the share of padding tokens when each batch is padded to its longest sample.

    Args:
        lengths: [samples] tokens, in the order in which the samples are read.
        batch_size: samples of a batch.
        grouped: first sort chunks of `LENGTH_GROUP_BATCHES` batches by length.
    """
    usable = len(lengths) - len(lengths) % batch
    if not usable:
        return 0.0
    lengths = lengths[:usable]
    if grouped:
        stretch = GROUP * batch
        lengths = np.concatenate([np.sort(lengths[i : i + stretch]) for i in range(0, usable, stretch)])
    slots = lengths.reshape(-1, batch).max(axis=1).sum() * batch
    return float(1 - lengths.sum() / max(slots, 1))


def _counted(codes: np.ndarray, names: Sequence[str]) -> dict[str, int]:
    counts = np.bincount(codes, minlength=len(names)).tolist()
    return dict(Counter({str(name): count for name, count in zip(names, counts, strict=True) if count}).most_common())


def _faults(source: str, errors: Sequence[tuple[str, RecordError]]) -> dict[str, int]:
    """Count the records of a source by their first fault."""
    first: dict[str, Fault] = {}
    for name, error in errors:
        if name == source:
            first.setdefault(error.origin, error.fault)
    return {str(fault): count for fault, count in Counter(first.values()).most_common()}


def _histogram(
    title: str, unit: str, values: np.ndarray, languages: np.ndarray, weights: np.ndarray, cap: int | None
) -> Histogram:
    least, most = float(values.min()), float(values.max())
    log = least > 0 and most / least > LOG_SPAN
    edges = _edges(values, log)
    series = {}
    for number, language in enumerate(LANGUAGES):
        mask = languages == number
        if language is not Language.auto and mask.any():
            counts, _ = np.histogram(values[mask], edges, weights=weights[mask])
            series[str(language)] = [round(count) for count in counts.tolist()]
    shown_cap = cap if cap is not None and cap <= 4 * values.max() else None
    return Histogram(title, unit, edges.tolist(), series, spread(values), log, shown_cap)


def _edges(values: np.ndarray, log: bool) -> np.ndarray:
    least, most = float(values.min()), float(values.max())
    if most - least < BINS + 10:  # one bar for each integer
        return np.arange(least, most + 2) - 0.5
    edges = np.geomspace(least, most + 1, BINS + 1) if log else np.linspace(least, most + 1, BINS + 1)
    return np.unique(np.round(edges)) - 0.5
