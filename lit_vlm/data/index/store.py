"""`build_index`: one pass over the sources, no pixel decoded, kept so that no record is ever read twice.

The pass is cut into shards (`shards.py`). What is kept of a shard hangs on its records, the tokenizer, the template
and the image settings; a grown file has new shards only at its end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from lit_vlm.data.content import content_of
from lit_vlm.data.index.columns import COLUMNS, FITTED, KINDS, LANGUAGES, Index
from lit_vlm.data.index.fingerprint import digests, stamp
from lit_vlm.data.index.shards import Bad, Shard, Shelf, Span, alone, key_of, shelf_of, spans_of
from lit_vlm.data.index.workers import parallel
from lit_vlm.data.processor import Processor
from lit_vlm.types import Fault, Record, RecordError, Source, UserError

OnProgress = Callable[[str, int, int], None]  # source name, records done, records in all

MOST_KEYS = 30  # of a source that nothing is read from, named with their counts
INDEX_VERSION = 2  # raise it when a record is indexed differently
# Of the record's text alone, which the shard's key covers; all others may be mended without it
OF_TEXT = (Fault.malformed, Fault.placeholders, Fault.no_answer, Fault.overlong, Fault.url)


def build_index(
    sources: Sequence[Source],
    processor: Processor,
    *,
    store: Path | None = None,
    workers: int = 1,
    recheck: bool = False,
    on_progress: OnProgress | None = None,
) -> Index:
    """What every record costs; those that cannot be used are in the index's `errors`.

    A bad record whose picture is at fault is looked at again each time, for it may have been mended.

    Args:
        store: folder where it is kept for the next start, shared by several processes; None: nothing is kept.
        workers: processes that read.
        recheck: look at the time and size of every picture file, and read again what changed.

    Raises:
        UserError: the store cannot be written to, workers keep dying, or a template refuses the conversations.
    """
    shelf, spans = shelf_of(store), list[Span]()
    work = partial(_refreshed, sources, processor, shelf, recheck)
    for number, source in enumerate(sources):
        with alone(source, store, "index"):
            own = spans_of(number, source, store)
            waiting = [span for span in own if recheck or _is_due(shelf, processor, span)]
            done = len(source) - sum(map(len, waiting))
            for span, shard in parallel(work, waiting, workers):
                if shard is not None:
                    shelf.put(index_key(processor, span), shard)
                done += len(span)
                if on_progress:
                    on_progress(source.name, done, len(source))
            spans += own
    return _load(sources, processor, shelf, spans)


def index_key(processor: Processor, span: Span) -> str:
    return key_of("index", INDEX_VERSION, KINDS, LANGUAGES, list(COLUMNS), processor.digest, span.content)


def verified_key(span: Span) -> str:
    """Of the shard in which `verify` keeps what it found: the stamp of each record, and the bad ones."""
    return key_of("verified", INDEX_VERSION, span.content)


def _is_due(shelf: Shelf, processor: Processor, span: Span) -> bool:
    """Whether the span must be read, or at least some of its records be looked at."""
    shard, verified = shelf.get(index_key(processor, span)), shelf.get(verified_key(span))
    if shard is None or any(bad.fault not in OF_TEXT for bad in shard.bad):
        return True
    return verified is not None and bool(verified.bad)


def _refreshed(
    sources: Sequence[Source], processor: Processor, shelf: Shelf, recheck: bool, span: Span
) -> Shard | None:
    """The span's shard, read anew; None where the one on the shelf still holds."""
    shard, verified = shelf.get(index_key(processor, span)), shelf.get(verified_key(span))
    source = sources[span.source]
    if shard is not None:
        suspects = {bad.position for bad in verified.bad} if verified else set()
        if not any(_changes(source, processor, span, shard, suspects, recheck)):
            return None
    return _read(source, processor, span)


def _changes(
    source: Source, processor: Processor, span: Span, shard: Shard, suspects: set[int], recheck: bool
) -> Iterator[bool]:
    """For each record that is looked at again, whether it is another."""
    for bad in shard.bad:
        if recheck or bad.fault not in OF_TEXT:
            try:
                processor.cost(source[span.start + bad.position])
                yield True
            except RecordError as error:
                yield error.fault is not bad.fault
    for position, known in zip(shard.columns["position"].tolist(), shard.columns["stamp"].tolist(), strict=True):
        if recheck or position in suspects:
            try:
                yield stamp(source[span.start + position]) != known
            except RecordError:
                yield True


def _read(source: Source, processor: Processor, span: Span) -> Shard:
    rows: list[tuple[int, ...]] = []
    bad: list[Bad] = []
    unread: Counter[str] = Counter()
    for position in range(len(span)):
        try:
            record = source[span.start + position]
            rows.append(_row(position, record, processor))
            unread.update(record.unread)
        except RecordError as error:
            bad.append(Bad.of(position, error))
    values = zip(*rows, strict=True) if rows else [()] * len(COLUMNS)
    return Shard({name: np.array(v, COLUMNS[name]) for name, v in zip(COLUMNS, values, strict=True)}, bad, dict(unread))


def _row(position: int, record: Record, processor: Processor) -> tuple[int, ...]:
    """In the order of COLUMNS."""
    before = stamp(record)  # a file that changes under our hands is then found changed
    cost = processor.cost(record)
    return (
        position,
        cost.num_tokens,
        cost.num_image_tokens,
        cost.num_supervised,
        cost.num_chosen,
        cost.squares,
        cost.longest,
        cost.num_tiles,
        cost.num_images,
        *cost.size,
        KINDS.index(record.kind),
        LANGUAGES.index(record.language),
        record.normalised,
        *digests(record),
        content_of(record) if before else 0,
        before,
    )


def _load(sources: Sequence[Source], processor: Processor, shelf: Shelf, spans: list[Span]) -> Index:
    """All shards in one array per column."""
    most = sum(map(len, spans))  # pages that no record fills are never touched
    columns = {name: np.empty(most, dtype) for name, dtype in COLUMNS.items()}
    source_of = np.empty(most, np.int16)
    errors: list[tuple[str, RecordError]] = []
    unread: dict[str, Counter[str]] = {source.name: Counter() for source in sources}
    filled = 0
    for span in spans:
        shard = _usable(shelf, processor, span)
        to = filled + len(shard.columns["position"])
        for name, column in columns.items():
            column[filled:to] = shard.columns[name]
        columns["position"][filled:to] += np.uint32(span.start)
        source_of[filled:to] = span.source
        source = sources[span.source]
        unread[source.name].update(shard.unread)
        errors += [(source.name, bad.error(source, span.start)) for bad in shard.bad]
        filled = to
    used = {name: column[:filled] for name, column in columns.items()}
    fitted = {name: np.full(filled, -1, dtype) for name, dtype in FITTED.items()}
    counts = {name: _most_frequent(keys) for name, keys in unread.items() if keys}
    return Index(sources, source_of[:filled], {**used, **fitted}, errors, unread=counts)


def _most_frequent(keys: Counter[str]) -> dict[str, int]:
    """Some data sets have keys that each record has for itself."""
    found = dict(keys.most_common(MOST_KEYS))
    if len(keys) > MOST_KEYS:
        found[f"{len(keys) - MOST_KEYS:,} other keys"] = keys.total() - sum(found.values())
    return found


def _usable(shelf: Shelf, processor: Processor, span: Span) -> Shard:
    """The span's shard without the records whose pictures, as they are now, were found broken by `verify`."""
    shard, verified = shelf.get(index_key(processor, span)), shelf.get(verified_key(span))
    if shard is None:
        raise UserError("The index was removed or damaged while it was being read. Start again.")
    if verified is None or not verified.bad:
        return shard
    position, known = shard.columns["position"], shard.columns["stamp"]
    same = verified.columns["stamp"][position] == known
    broken = same & np.isin(position, [bad.position for bad in verified.bad])
    leaving = set(position[broken].tolist())
    bad = [*shard.bad, *(record for record in verified.bad if record.position in leaving)]
    columns = {name: column[~broken] for name, column in shard.columns.items()}
    return Shard(columns, sorted(bad, key=lambda record: record.position), shard.unread)
