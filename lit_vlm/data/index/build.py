"""Parallel map over worker processes that survives the death of a worker."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from lit_vlm.data.index.fingerprint import compute_digests, compute_stamp
from lit_vlm.data.index.sample_index import COLUMNS, KINDS, LANGUAGES, LENGTH_POLICY_COLUMNS, SampleIndex
from lit_vlm.data.index.shard_cache import (
    BadRecord,
    Shard,
    ShardCache,
    ShardRange,
    hash_parts,
    list_shard_ranges,
    lock_source,
    open_shard_cache,
)
from lit_vlm.data.lazy_images import compute_image_hash
from lit_vlm.data.processor import Processor
from lit_vlm.types import Fault, Record, RecordError, Source, UserError

Task = TypeVar("Task")
Result = TypeVar("Result")

MAX_WORKER_DEATHS = 3  # deaths in a row without a completed task
_task_function: Callable[[Any], Any]  # of this worker process


def map_parallel(
    function: Callable[[Task], Result], tasks: Sequence[Task], workers: int
) -> Iterator[tuple[Task, Result]]:
    """Map a function over tasks in parallel; yield (task, result) in the order of completion.

    At most two tasks for each worker are submitted at a time. Processes are forked if the system supports it, so neither
    `function` nor its data need to be picklable.

    Raises:
        UserError: workers died MAX_WORKER_DEATHS times in a row.
    """
    remaining, deaths = list(tasks), 0
    while remaining:
        if min(workers, len(remaining)) <= 1 and not deaths:
            yield from ((task, function(task)) for task in remaining)
            return
        try:
            for task, result in _run_pool(function, remaining[:], workers):
                remaining.remove(task)
                deaths = 0
                yield task, result
        except BrokenProcessPool:
            deaths += 1
            if deaths == MAX_WORKER_DEATHS:
                raise UserError(
                    f"Worker processes died {MAX_WORKER_DEATHS} times in a row over {remaining[0]} and what follows it, killed from outside or by "
                    "their memory. Set data.index_workers lower, and look into the system's log."
                ) from None


def _run_pool(function: Callable[[Task], Result], tasks: list[Task], workers: int) -> Iterator[tuple[Task, Result]]:
    """Run a process pool over the tasks; raises BrokenProcessPool if a worker dies."""
    context = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else None)
    pool = ProcessPoolExecutor(min(workers, len(tasks)), context, initializer=_init_worker, initargs=(function,))
    running: dict[Future[Result], Task] = {}
    tasks.reverse()
    try:
        while tasks or running:
            while tasks and len(running) < 2 * workers:
                task = tasks.pop()
                running[pool.submit(_run_task, task)] = task
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _init_worker(function: Callable[[Any], Any]) -> None:
    """Initialise a worker process."""
    global _task_function
    _task_function = function
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and stops its workers
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    """Exit when the parent ends: a killed parent cannot stop its workers, and they would hold its locks for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _run_task(task: Any) -> Any:
    return _task_function(task)


OnProgress = Callable[[str, int, int], None]  # source name, processed records, total records

MAX_UNUSED_KEYS = 30  # unused keys of a source that are listed with their counts
INDEX_VERSION = 2  # increase it when a record is indexed differently
# Faults of the record's text, which the shard's key covers; all others can be repaired without changing the key
TEXT_FAULTS = (Fault.malformed, Fault.placeholders, Fault.no_answer, Fault.overlong, Fault.url)


def build_index(
    sources: Sequence[Source],
    processor: Processor,
    *,
    store: Path | None = None,
    workers: int = 1,
    recheck: bool = False,
    on_progress: OnProgress | None = None,
) -> SampleIndex:
    """Build the index with the cost of every record; unusable records are in its `errors`.

    A record with a bad image is read again each time, since the image may have been repaired.

    Args:
        store: cache folder, shared by several processes; None: no cache.
        workers: processes that read.
        recheck: check the time and size of every image file, and read changed ones again.
        on_progress: called after each shard.

    Raises:
        UserError: the store is not writable, workers die repeatedly, or a chat template refuses a conversation.
    """
    cache, shard_ranges = open_shard_cache(store), list[ShardRange]()
    function = partial(_read_if_changed, sources, processor, cache, recheck)
    for source_id, source in enumerate(sources):
        with lock_source(source, store, "index"):
            source_ranges = list_shard_ranges(source_id, source, store)
            due_ranges = [
                shard_range for shard_range in source_ranges if recheck or _is_due(cache, processor, shard_range)
            ]
            done = len(source) - sum(map(len, due_ranges))
            for shard_range, shard in map_parallel(function, due_ranges, workers):
                if shard is not None:
                    cache.put(compute_index_key(processor, shard_range), shard)
                done += len(shard_range)
                if on_progress:
                    on_progress(source.name, done, len(source))
            shard_ranges += source_ranges
    return _load_index(sources, processor, cache, shard_ranges)


def compute_index_key(processor: Processor, shard_range: ShardRange) -> str:
    """Compute the key of a shard of the index."""
    return hash_parts(
        "index", INDEX_VERSION, KINDS, LANGUAGES, list(COLUMNS), processor.digest, shard_range.content_key
    )


def compute_verified_key(shard_range: ShardRange) -> str:
    """Compute the key of the shard in which `verify_images` stores its result: stamps of all records, and bad records."""
    return hash_parts("verified", INDEX_VERSION, shard_range.content_key)


def _is_due(cache: ShardCache, processor: Processor, shard_range: ShardRange) -> bool:
    """Return True if the shard must be read, or some of its records must be checked."""
    shard, verified = cache.get(compute_index_key(processor, shard_range)), cache.get(compute_verified_key(shard_range))
    if shard is None or any(bad.fault not in TEXT_FAULTS for bad in shard.bad_records):
        return True
    return verified is not None and bool(verified.bad_records)


def _read_if_changed(
    sources: Sequence[Source], processor: Processor, cache: ShardCache, recheck: bool, shard_range: ShardRange
) -> Shard | None:
    """Read the shard again if it changed; None if the cached one is still valid."""
    shard, verified = cache.get(compute_index_key(processor, shard_range)), cache.get(compute_verified_key(shard_range))
    source = sources[shard_range.source_id]
    if shard is not None:
        suspects = {bad.position for bad in verified.bad_records} if verified else set()
        if not any(_check_records(source, processor, shard_range, shard, suspects, recheck)):
            return None
    return _read_shard(source, processor, shard_range)


def _check_records(
    source: Source, processor: Processor, shard_range: ShardRange, shard: Shard, suspects: set[int], recheck: bool
) -> Iterator[bool]:
    """Check records again; yield for each of them whether it changed."""
    for bad in shard.bad_records:
        if recheck or bad.fault not in TEXT_FAULTS:
            try:
                processor.compute_cost(source[shard_range.start + bad.position])
                yield True
            except RecordError as error:
                yield error.fault is not bad.fault
    for position, known in zip(shard.columns["position"].tolist(), shard.columns["stamp"].tolist(), strict=True):
        if recheck or position in suspects:
            try:
                yield compute_stamp(source[shard_range.start + position]) != known
            except RecordError:
                yield True


def _read_shard(source: Source, processor: Processor, shard_range: ShardRange) -> Shard:
    """Read the records of a shard and compute their columns."""
    rows: list[tuple[int, ...]] = []
    bad: list[BadRecord] = []
    unused_keys: Counter[str] = Counter()
    for position in range(len(shard_range)):
        try:
            record = source[shard_range.start + position]
            rows.append(_build_row(position, record, processor))
            unused_keys.update(record.unused_keys)
        except RecordError as error:
            bad.append(BadRecord.from_error(position, error))
    values = zip(*rows, strict=True) if rows else [()] * len(COLUMNS)
    return Shard(
        {name: np.array(v, COLUMNS[name]) for name, v in zip(COLUMNS, values, strict=True)}, bad, dict(unused_keys)
    )


def _build_row(position: int, record: Record, processor: Processor) -> tuple[int, ...]:
    """Build the row of one record, in the order of COLUMNS."""
    files_stamp = compute_stamp(record)  # taken first: a file that changes during reading is then detected as changed
    content = compute_image_hash(record) if files_stamp else 0  # keeps the headers, so each file is opened once
    cost = processor.compute_cost(record)
    return (
        position,
        cost.num_tokens,
        cost.num_image_tokens,
        cost.num_supervised,
        cost.num_chosen,
        cost.squares,
        cost.max_context_tokens,
        cost.num_tiles,
        cost.num_images,
        *cost.size,
        KINDS.index(record.kind),
        LANGUAGES.index(record.language),
        record.nfc_changed,
        *compute_digests(record),
        content,
        files_stamp,
    )


def _load_index(
    sources: Sequence[Source], processor: Processor, cache: ShardCache, shard_ranges: list[ShardRange]
) -> SampleIndex:
    """Load all shards into one array for each column."""
    max_samples = sum(map(len, shard_ranges))  # upper limit; memory pages without records are never touched
    columns = {name: np.empty(max_samples, dtype) for name, dtype in COLUMNS.items()}
    source_ids = np.empty(max_samples, np.int16)
    errors: list[tuple[str, RecordError]] = []
    unused_keys: dict[str, Counter[str]] = {source.name: Counter() for source in sources}
    filled = 0
    for shard_range in shard_ranges:
        shard = _load_usable_shard(cache, processor, shard_range)
        stop = filled + len(shard.columns["position"])
        for name, column in columns.items():
            column[filled:stop] = shard.columns[name]
        columns["position"][filled:stop] += np.uint32(shard_range.start)
        source_ids[filled:stop] = shard_range.source_id
        source = sources[shard_range.source_id]
        unused_keys[source.name].update(shard.unused_keys)
        errors += [(source.name, bad.to_error(source, shard_range.start)) for bad in shard.bad_records]
        filled = stop
    used = {name: column[:filled] for name, column in columns.items()}
    fitted = {name: np.full(filled, -1, dtype) for name, dtype in LENGTH_POLICY_COLUMNS.items()}
    counts = {name: _select_most_frequent(keys) for name, keys in unused_keys.items() if keys}
    return SampleIndex(sources, source_ids[:filled], {**used, **fitted}, errors, unused_keys=counts)


def _select_most_frequent(keys: Counter[str]) -> dict[str, int]:
    """Select the most frequent keys; some data sets have keys that occur in one record only."""
    found = dict(keys.most_common(MAX_UNUSED_KEYS))
    if len(keys) > MAX_UNUSED_KEYS:
        found[f"{len(keys) - MAX_UNUSED_KEYS:,} other keys"] = keys.total() - sum(found.values())
    return found


def _load_usable_shard(cache: ShardCache, processor: Processor, shard_range: ShardRange) -> Shard:
    """Load a shard without the records whose images, in their current state, `verify_images` found broken."""
    shard, verified = cache.get(compute_index_key(processor, shard_range)), cache.get(compute_verified_key(shard_range))
    if shard is None:
        raise UserError("The index was removed or damaged while it was being read. Start again.")
    if verified is None or not verified.bad_records:
        return shard
    position, stamps = shard.columns["position"], shard.columns["stamp"]
    is_unchanged = verified.columns["stamp"][position] == stamps
    is_broken = is_unchanged & np.isin(position, [bad.position for bad in verified.bad_records])
    broken_positions = set(position[is_broken].tolist())
    bad = [*shard.bad_records, *(record for record in verified.bad_records if record.position in broken_positions)]
    columns = {name: column[~is_broken] for name, column in shard.columns.items()}
    return Shard(columns, sorted(bad, key=lambda record: record.position), shard.unused_keys)
