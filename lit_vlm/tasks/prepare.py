"""task=prepare: all data preparation of a stage that needs no GPU. Read top to bottom."""

from __future__ import annotations

import time

from rich.table import Table

from lit_vlm.config import Run
from lit_vlm.config.schema import OnBadRecord
from lit_vlm.data.index.verify import verify
from lit_vlm.tasks.run_lock import hold_to_lock
from lit_vlm.tasks.stage_data import (
    StageData,
    open_sources,
    parent_or_parts,
    quarantine_of,
    require_records_of,
    settle,
    stage_data,
    store_of,
)
from lit_vlm.tasks.terminal import console, progress_over, say
from lit_vlm.types import counted


def prepare(run: Run) -> None:
    """Index new records, decode every image once, put unusable records into quarantine, build the plan, write mixture.lock.

    After an interruption it resumes where it stopped. A second run looks only at changes.
    """
    config = run.config
    sources, held_out = open_sources(run)
    data = stage_data(run, sources, held_out, parent_or_parts(run))
    datamodule = data.datamodule
    began = time.monotonic()
    with progress_over("index") as on_progress:
        datamodule.build(recheck=True, on_progress=on_progress)
    say(f"indexed in {time.monotonic() - began:.1f} s, in {store_of(config)}")
    if config.data.verify:
        began = time.monotonic()
        with progress_over("decode") as on_progress:
            workers = datamodule.index_workers
            verify([*sources, *held_out], store_of(config), workers=workers, on_progress=on_progress)
        datamodule.rebuild()  # without the records whose images do not decode
        say(f"every picture decoded in {time.monotonic() - began:.1f} s")
    show_sources(data)
    settle(data)
    require_records_of(config.stage, datamodule)
    num_devices = config.trainer.devices * config.trainer.num_nodes
    plan = datamodule.make_plan(num_devices)
    balance = f"; their work is balanced to {plan.balance()['micro_steps']['mean']:.1%}" if num_devices > 1 else ""
    say(f"{counted(plan.num_steps, 'step')}; k = {plan.k} on {counted(num_devices, 'device')}{balance}")
    hold_to_lock(data)
    aside = (
        f" Set aside: {run.dir / 'quarantine.jsonl'}  " if config.data.on_bad_record is OnBadRecord.quarantine else ""
    )
    say(f"data of {run.name}: prepared.{aside} Lock: {run.dir / 'mixture.lock'}")


def show_sources(data: StageData) -> None:
    """Show a table of the sources: records, usable records, and the faults of the others."""
    index, held_out = data.datamodule.index, data.datamodule.held_out
    assert index is not None and held_out is not None
    parts = [index, held_out] if held_out.sources is index.sources else [index]
    quarantine, totals = quarantine_of(data.datamodule)
    fault_counts = quarantine.table()
    table = Table(title=f"{data.run.name}: sources", title_justify="left")
    for heading in ("source", "records", "usable", "set aside", "NFC changed", "tokens", "tiles"):
        table.add_column(heading, justify="left" if heading in ("source", "set aside") else "right")
    for number, (name, config, source) in enumerate(data.configs):
        expected = None if config.fraction or config.num_samples else config.expected_records
        records = f"{len(source):,}" if expected in (None, len(source)) else f"{len(source):,} of {expected:,}"
        quarantined = ", ".join(f"{count:,} {fault}" for fault, count in fault_counts.get(name, {}).items()) or "none"
        usable = totals[name] - quarantine.counts().get(name, 0)
        columns = ("normalised", "tokens", "tiles")
        column_sums = [
            sum(int(getattr(part, column)[part.of_source(number)].sum()) for part in parts) for column in columns
        ]
        table.add_row(name, records, f"{usable:,}", quarantined, *(f"{column_sum:,}" for column_sum in column_sums))
    console.print(table)
