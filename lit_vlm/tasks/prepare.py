"""task=prepare: all data preparation of a stage that needs no GPU. Read top to bottom."""

from __future__ import annotations

import time
from pathlib import Path

from rich.table import Table

from lit_vlm.config import Run
from lit_vlm.config.choices import OnBadRecord
from lit_vlm.config.schema import DataConfig
from lit_vlm.data.index.verify import verify_images
from lit_vlm.formatting import format_count
from lit_vlm.model.spec import load_model_spec
from lit_vlm.tasks.mixture_lock import build_mixture_lock, check_mixture_lock
from lit_vlm.tasks.open_run import RunPlace, Sources, open_sources
from lit_vlm.tasks.prepare_data import (
    Indexes,
    apply_quarantine,
    build_indexes,
    build_stage_data,
    collect_quarantine,
    make_training_data,
    require_record_type,
    resolve_tiny_parts,
)
from lit_vlm.tasks.terminal import console, say, show_progress


def prepare(run: Run) -> None:
    """Index new records, decode every image once, put unusable records into quarantine, build the plan, write mixture.lock.

    After an interruption it resumes where it stopped. A second run looks only at changes.
    """
    config, data = run.config, run.config.data
    place = RunPlace.from_settings(run.name, run.dir, config.run_dir, data.index_dir)
    sources = open_sources(data, place, config.seed)
    model = resolve_tiny_parts(config.model, place.parts_dir, config.seed)
    stage_data = build_stage_data(
        place,
        sources,
        load_model_spec(model, resolve_init_from(run.init_from), data.tiling),
        template_date=model.template_date,
        data=data,
        stage=config.stage,
        trainer=config.trainer,
        seed=config.seed,
        debug=config.debug,
        make=make_training_data,
    )
    training_data = stage_data.training_data
    began = time.monotonic()
    with show_progress("index") as on_progress:
        indexes = build_indexes(training_data, recheck=True, on_progress=on_progress)
    say(f"indexed in {time.monotonic() - began:.1f} s, in {place.index_dir}")
    if data.verify:
        began = time.monotonic()
        with show_progress("decode") as on_progress:
            workers = training_data.index_workers
            verify_images(
                [*sources.training, *sources.validation], place.index_dir, workers=workers, on_progress=on_progress
            )
        training_data.rebuild_indexes()  # without the records whose images do not decode
        indexes = build_indexes(training_data)
        say(f"every picture decoded in {time.monotonic() - began:.1f} s")
    show_sources(run.name, sources, indexes, data)
    apply_quarantine(training_data, indexes, data, run.dir)
    require_record_type(config.stage.name, indexes)
    num_devices = config.trainer.devices * config.trainer.num_nodes
    plan = training_data.make_plan(num_devices)
    balance = (
        f"; their work is balanced to {plan.measure_balance()['micro_steps']['mean']:.1%}" if num_devices > 1 else ""
    )
    say(
        f"{format_count(plan.num_steps, 'step')}; k = {plan.accumulate_grad_batches} on {format_count(num_devices, 'device')}{balance}"
    )
    lock = build_mixture_lock(stage_data, plan.index, data, config.seed)
    check_mixture_lock(lock, data.lock, run.dir, overwrite=config.overwrite)
    aside = f" Set aside: {run.dir / 'quarantine.jsonl'}  " if data.on_bad_record is OnBadRecord.quarantine else ""
    say(f"data of {run.name}: prepared.{aside} Lock: {run.dir / 'mixture.lock'}")


def resolve_init_from(init_from: str | None) -> str | None:
    """Return the model to start from. None, with a report, if the previous stage has not been run yet."""
    folder = init_from and Path(init_from)
    if folder and folder.is_absolute() and not folder.is_dir():
        say(f"init_from: {folder} is not there yet; counted for the model's parts instead.")
        return None
    return init_from


def show_sources(name: str, sources: Sources, indexes: Indexes, data: DataConfig) -> None:
    """Show a table of the sources: records, usable records, and the faults of the others."""
    index, held_out = indexes.training, indexes.held_out
    parts = [index, held_out] if held_out.sources is index.sources else [index]
    quarantine, totals = collect_quarantine(indexes)
    fault_counts = quarantine.count_by_fault()
    table = Table(title=f"{name}: sources", title_justify="left")
    for heading in ("source", "records", "usable", "set aside", "NFC changed", "tokens", "tiles"):
        table.add_column(heading, justify="left" if heading in ("source", "set aside") else "right")
    for number, ((name, config), source) in enumerate(zip(data.sources.items(), sources.training, strict=True)):
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
