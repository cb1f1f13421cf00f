"""task=prepare: all data preparation of a stage that needs no GPU. Read top to bottom."""

from __future__ import annotations

import time

from rich.table import Table

from lit_vlm.config import Run
from lit_vlm.config.schema import OnBadRecord
from lit_vlm.data.index.verify import verify_images
from lit_vlm.formatting import format_count
from lit_vlm.tasks.mixture_lock import check_mixture_lock
from lit_vlm.tasks.prepare_data import (
    StageData,
    apply_quarantine,
    build_stage_data,
    collect_quarantine,
    get_index_dir,
    open_sources,
    require_record_type,
    resolve_init_from,
)
from lit_vlm.tasks.terminal import console, say, show_progress


def prepare(run: Run) -> None:
    """Index new records, decode every image once, put unusable records into quarantine, build the plan, write mixture.lock.

    After an interruption it resumes where it stopped. A second run looks only at changes.
    """
    config = run.config
    sources, held_out = open_sources(run)
    data = build_stage_data(run, sources, held_out, resolve_init_from(run))
    datamodule = data.datamodule
    began = time.monotonic()
    with show_progress("index") as on_progress:
        datamodule.build_indexes(recheck=True, on_progress=on_progress)
    say(f"indexed in {time.monotonic() - began:.1f} s, in {get_index_dir(config)}")
    if config.data.verify:
        began = time.monotonic()
        with show_progress("decode") as on_progress:
            workers = datamodule.index_workers
            verify_images([*sources, *held_out], get_index_dir(config), workers=workers, on_progress=on_progress)
        datamodule.rebuild_indexes()  # without the records whose images do not decode
        say(f"every picture decoded in {time.monotonic() - began:.1f} s")
    show_sources(data)
    apply_quarantine(data)
    require_record_type(config.stage, datamodule)
    num_devices = config.trainer.devices * config.trainer.num_nodes
    plan = datamodule.make_plan(num_devices)
    balance = (
        f"; their work is balanced to {plan.measure_balance()['micro_steps']['mean']:.1%}" if num_devices > 1 else ""
    )
    say(
        f"{format_count(plan.num_steps, 'step')}; k = {plan.accumulate_grad_batches} on {format_count(num_devices, 'device')}{balance}"
    )
    check_mixture_lock(data)
    aside = (
        f" Set aside: {run.dir / 'quarantine.jsonl'}  " if config.data.on_bad_record is OnBadRecord.quarantine else ""
    )
    say(f"data of {run.name}: prepared.{aside} Lock: {run.dir / 'mixture.lock'}")


def show_sources(data: StageData) -> None:
    """Show a table of the sources: records, usable records, and the faults of the others."""
    index, held_out = data.datamodule.index, data.datamodule.held_out
    assert index is not None and held_out is not None
    parts = [index, held_out] if held_out.sources is index.sources else [index]
    quarantine, totals = collect_quarantine(data.datamodule)
    fault_counts = quarantine.count_by_fault()
    table = Table(title=f"{data.run.name}: sources", title_justify="left")
    for heading in ("source", "records", "usable", "set aside", "NFC changed", "tokens", "tiles"):
        table.add_column(heading, justify="left" if heading in ("source", "set aside") else "right")
    for number, (name, config, source) in enumerate(data.configured_sources):
        expected = None if config.fraction or config.num_samples else config.expected_records
        records = f"{len(source):,}" if expected in (None, len(source)) else f"{len(source):,} of {expected:,}"
        quarantined = ", ".join(f"{count:,} {fault}" for fault, count in fault_counts.get(name, {}).items()) or "none"
        usable = totals[name] - quarantine.count_by_source().get(name, 0)
        columns = ("normalised", "tokens", "tiles")
        column_sums = [
            sum(int(getattr(part, column)[part.find_source_samples(number)].sum()) for part in parts)
            for column in columns
        ]
        table.add_row(name, records, f"{usable:,}", quarantined, *(f"{column_sum:,}" for column_sum in column_sums))
    console.print(table)
