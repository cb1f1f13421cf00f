"""Data side of preflight: checks the sources, the mixture and the plan of the steps."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from lit_vlm.config import Run
from lit_vlm.config.choices import ActivationCheckpointing, StageName, StrategyName
from lit_vlm.config.model_folders import require_model_folders
from lit_vlm.config.schema import CheckpointConfig, DataConfig, ModelConfig, SourceConfig, StageConfig, TrainerConfig
from lit_vlm.config.task_settings import PreflightConfig
from lit_vlm.cost import ModelShape, ParameterCounts
from lit_vlm.cost.strategy import make_training_setup
from lit_vlm.data.index.sample_index import SampleIndex
from lit_vlm.data.packing.mixture import MixtureSettings, SourceAmount
from lit_vlm.data.packing.mixture_lock import compare_locks, read_lock
from lit_vlm.data.packing.mixture_shares import resolve_amounts
from lit_vlm.data.packing.plan import Plan
from lit_vlm.data.quarantine import find_wrong_image_roots
from lit_vlm.data.selection import require_contamination_search
from lit_vlm.data.sources import open_source
from lit_vlm.data.training_data import TrainingData
from lit_vlm.formatting import format_count
from lit_vlm.model.spec import load_model_spec
from lit_vlm.reports.preflight.checks import check_bad_records, collect_findings
from lit_vlm.reports.preflight.estimates import (
    check_strategy,
    compare_memory,
    compute_flops,
    estimate_disk,
    estimate_time,
    get_planned_device,
    list_parts,
    sum_file_sizes,
    summarize_strategy,
)
from lit_vlm.reports.preflight.facts import Finding, PreflightFacts, Severity, ShareRow, SourceRow
from lit_vlm.reports.preflight.report import print_preflight, write_preflight_page
from lit_vlm.reports.preflight.samples import collect_bad_examples, prepare_samples
from lit_vlm.reports.preflight.statistics import (
    build_histograms,
    count_duplicates_between_sources,
    fill_source_rows,
    subsample_source,
    summarize_plan,
)
from lit_vlm.runs.run_folder import (
    describe_parent,
    get_command_line,
    open_run_folder,
    read_manifest_or_empty,
    require_finished_parent,
    require_writable,
    to_plain,
)
from lit_vlm.tasks.measure_model import MeasuredModel, get_largest_micro_batch, load_or_measure
from lit_vlm.tasks.mixture_lock import build_mixture_lock
from lit_vlm.tasks.open_run import RunPlace, Sources
from lit_vlm.tasks.prepare_data import (
    Indexes,
    StageData,
    build_indexes,
    build_stage_data,
    find_image_root_errors,
    make_training_data,
    require_record_type,
    resolve_tiny_parts,
)
from lit_vlm.tasks.terminal import console, show_progress
from lit_vlm.types import Fault, RecordError, Source, UserError

MAX_SAMPLE_STEPS = 300  # steps to plan if only a sample is indexed; its micro-batches are like those of all data


def open_valid_sources(
    data: DataConfig, index_dir: Path, seed: int, facts: PreflightFacts
) -> tuple[dict[str, Source], dict[str, Source]]:
    """Open the training and validation sources, by name. A source that cannot be opened becomes a finding."""
    try:
        require_contamination_search(data)
    except UserError as error:  # the selections are wrong alike, so none is opened
        facts.findings.append(Finding(Severity.failure, str(error)))
        return {}, {}

    def open_each(table: dict[str, SourceConfig], held_out: bool) -> dict[str, Source]:
        sources = {}
        for name, source in table.items():
            with collect_errors(facts):
                sources[name] = open_source(
                    name,
                    source,
                    max_image_pixels=data.max_image_pixels,
                    seed=seed,
                    held_out=held_out,
                    cache=index_dir,
                )
        return sources

    return open_each(data.sources, False), open_each(data.validation.sources, True)


def find_missing_images(
    training: Mapping[str, Source], validation: Mapping[str, Source], data: DataConfig, facts: PreflightFacts
) -> bool:
    """Find sources of which every image is missing; each becomes a finding, and nothing is said of the data."""
    found = find_wrong_image_roots(list(training.values()), data.sources)
    for name, (message, count) in found.items():
        faults = {Fault.missing.value: count}
        facts.sources.append(SourceRow(name, len(training[name]), count, quarantined=faults, image_root_error=message))
    others = find_wrong_image_roots(list(validation.values()), data.validation.sources, "data.validation.sources")
    facts.findings += [Finding(Severity.failure, message) for message, _ in (found | others).values()]
    return bool(found or others)


def index_sources(
    stage_data: StageData,
    sources: dict[str, Source],
    data: DataConfig,
    stage: StageName,
    index_dir: Path,
    max_samples: int,
    facts: PreflightFacts,
) -> Indexes | None:
    """Index small sources completely, and a sample of large sources that have no index yet. Fill the facts about the data.

    Args:
        max_samples: preflight.max_samples.

    Returns:
        The indexes; None, with a finding, if they cannot be built.
    """
    training_data, indexes = stage_data.training_data, None
    with collect_errors(facts):
        processor = training_data.processor
        training_data.sources = [
            subsample_source(source, processor, index_dir, max_samples) for source in training_data.sources
        ]
        if not isinstance(training_data.validation, float | int):
            training_data.validation = [
                subsample_source(source, processor, index_dir, max_samples) for source in training_data.validation
            ]
        with show_progress("look at") as on_progress:
            indexes = build_indexes(training_data, on_progress=on_progress)
    if indexes is None:
        return None
    index, held_out = indexes.training, indexes.held_out
    facts.sources = [
        _make_source_row(data.sources[name], source, seen)
        for (name, source), seen in zip(sources.items(), training_data.sources, strict=True)
    ]
    facts.held_out = len(held_out)
    fill_source_rows(facts.sources, index, held_out, index.errors)
    image_root_errors = find_image_root_errors(indexes, data)
    for row in facts.sources:
        row.image_root_error = image_root_errors.get(row.name, "")
    held_out_errors = _collect_held_out_errors(data, index, held_out, image_root_errors, facts)
    facts.bad = collect_bad_examples([*index.errors, *held_out_errors])
    scales = np.array([row.scale for row in facts.sources])
    if len(index):
        caps = {"tokens": data.tokens_per_micro_batch, "tiles": data.tiles_per_micro_batch}
        facts.histograms = build_histograms(index, scales, caps)
        num_duplicates = count_duplicates_between_sources(index)
        if num_duplicates:
            message = f"{format_count(num_duplicates, 'record says', 'records say')}, with the same images, what a record of another source says."
            facts.findings.append(Finding(Severity.warning, message))
    with collect_errors(facts):
        require_record_type(stage, indexes)
    return indexes


def _make_source_row(config: SourceConfig, source: Source, indexed: Source) -> SourceRow:
    return SourceRow(
        source.name,
        records=len(source),
        looked_at=len(indexed),
        # for a part of a source the expected number is unknown
        expected=None if config.fraction or config.num_samples else config.expected_records,
        licence=config.licence,
        homepage=config.homepage,
    )


def _collect_held_out_errors(
    data: DataConfig,
    index: SampleIndex,
    held_out: SampleIndex,
    image_root_errors: Mapping[str, str],
    facts: PreflightFacts,
) -> list[tuple[str, RecordError]]:
    """Collect the unusable records of separate validation sources. They have no row in the mixture, so findings name them."""
    if held_out.sources is index.sources:
        return []
    rows = [SourceRow(f"{source.name} (validation)", len(source), len(source)) for source in held_out.sources]
    errors = [(f"{name} (validation)", error) for name, error in held_out.errors]
    fill_source_rows(rows, held_out, index.select(np.arange(0)), errors)
    for row in rows:
        row.image_root_error = image_root_errors.get(row.name, "")
    facts.findings += [finding for row in rows for finding in check_bad_records(row, data)]
    return errors


def make_plan(
    stage_data: StageData,
    indexes: Indexes | None,
    data: DataConfig,
    *,
    seed: int,
    max_epochs: float,
    world_size: int,
    facts: PreflightFacts,
) -> Plan | None:
    """Make the plan of the whole run, or of its first steps if only a sample is indexed. None, with a finding, if it fails."""
    training_data = stage_data.training_data
    if indexes is None or not len(indexes.training):
        if not any(row.image_root_error for row in facts.sources):
            facts.findings.append(
                Finding(Severity.failure, "No record of the sources can be used.", "See what is wrong with each.")
            )
        return None
    with collect_errors(facts):
        training_data.mixture_settings, passes = _resolve_mixture(training_data, facts)
        steps = training_data.max_steps
        if facts.estimated:
            steps = steps or _estimate_steps(data, indexes.training, passes * max_epochs)
            training_data.max_steps, training_data.store = min(steps, MAX_SAMPLE_STEPS), None
        plan = training_data.make_plan(world_size)
        _check_mixture_lock(stage_data, plan, data, seed, facts)
        facts.plan = summarize_plan(plan, steps if facts.estimated and steps else plan.num_steps)
        _fill_shares(plan, facts)
        return plan
    return None


def _resolve_mixture(training_data: TrainingData, facts: PreflightFacts) -> tuple[MixtureSettings, float]:
    """Resolve the mixture of the sources that could be opened, in sizes of the whole sources.

    For a source of which only a sample is indexed, the index does not hold the true size, so its amount becomes a count.

    Returns:
        The mixture settings, and the number of samples of one pass.
    """
    settings, names = training_data.mixture_settings, [row.name for row in facts.sources]
    settings = replace(settings, sources={name: settings.sources.get(name, SourceAmount()) for name in names})
    sizes = [(row.usable - row.held_out) * row.scale for row in facts.sources]
    amounts = resolve_amounts(settings, names)
    if any(amount.weight is not None for amount in amounts):
        return settings, sum(size for size, amount in zip(sizes, amounts, strict=True) if amount.weight)
    counts = {
        name: round(size * (1 if amount.repeat is None else amount.repeat)) if amount.count is None else amount.count
        for name, size, amount in zip(names, sizes, amounts, strict=True)
    }
    if facts.estimated:
        settings = replace(settings, sources={name: SourceAmount(count=number) for name, number in counts.items()})
    return settings, sum(counts.values())


def _estimate_steps(data: DataConfig, index: SampleIndex, samples: float) -> int:
    """Estimate the optimizer steps of `samples` samples."""
    if data.global_batch_tokens:
        return max(1, round(samples * float(index.tokens.mean()) / data.global_batch_tokens))
    return max(1, math.ceil(samples / data.global_batch_size))


def _check_mixture_lock(stage_data: StageData, plan: Plan, data: DataConfig, seed: int, facts: PreflightFacts) -> None:
    """Compare the data with `data.lock`; differences become a finding. A sample of the data is not compared."""
    lock = data.lock
    if not lock or len(stage_data.sources.training) < len(data.sources):
        return
    if facts.estimated:
        message = f"The data are not compared with data.lock={lock}: not all records were looked at."
        facts.findings.append(Finding(Severity.advice, message, "task=prepare reads all of them."))
        return
    with collect_errors(facts):
        current = build_mixture_lock(stage_data, plan.index, data, seed)
        changes = "".join(f"\n  {change}" for change in compare_locks(read_lock(lock), current))
        if changes:
            message = f"The data are not those of data.lock={lock}:{changes}"
            facts.findings.append(
                Finding(
                    Severity.failure, message, "\nBring them back, or take data.lock away to train on what is there."
                )
            )


def _fill_shares(plan: Plan, facts: PreflightFacts) -> None:
    """Fill the planned share of each source and group: samples, tokens, passes."""
    assert facts.plan is not None
    for row in plan.mixture.summarize(plan.get_sample_sequence()):
        if row["group"] != "source":
            names = ("group", "name", "size", "asked", "samples", "tokens")
            facts.shares.append(ShareRow(**{name: row[name] for name in names}))
            continue
        source = next(source for source in facts.sources if source.name == row["name"])
        source.asked, source.asked_in = row["asked"], row["asked_in"]
        source.share_samples, source.share_tokens = row["samples"], row["tokens"]
        size = (source.usable - source.held_out) * source.scale
        source.passes = row["samples"] * facts.plan.samples / max(size, 1)


@contextmanager
def collect_errors(facts: PreflightFacts) -> Iterator[None]:
    """Turn a UserError of the block into a finding; the checks continue after the block."""
    try:
        yield
    except UserError as error:
        finding = Finding(Severity.failure, str(error))
        if finding not in facts.findings:
            facts.findings.append(finding)


BYTES_PER_RECORD = 110  # approximate size of a record in the index and of its samples in the plan


def run_preflight(run: Run) -> None:
    """Collect the facts, show them, and write `preflight.html` and `preflight.json` into the run folder.

    Each step uses the results of the earlier steps, if any.

    Raises:
        UserError: the run would fail; the findings are shown before.
    """
    require_writable(run.dir)  # the page goes there
    config, data, stage, trainer = run.config, run.config.data, run.config.stage, run.config.trainer
    started, seed, preflight = time.monotonic(), config.seed, config.preflight
    facts = PreflightFacts(
        name=run.name,
        stage=stage.name.value,
        command=get_command_line(),
        moment=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )
    place = RunPlace.from_settings(run.name, run.dir, config.run_dir, data.index_dir)
    training, validation = open_valid_sources(data, place.index_dir, seed, facts)
    is_without_images = find_missing_images(training, validation, data, facts)
    sources, stage_data = Sources(list(training.values()), list(validation.values())), None
    with collect_errors(facts):
        if len(training) == len(data.sources) and len(validation) == len(data.validation.sources):
            settings = to_plain(asdict(config))
            _check_run_folder(place, settings, sources, run.init_from, facts, overwrite=config.overwrite)
    with collect_errors(facts):
        require_model_folders(run)
    if is_without_images:
        _show_facts(facts, run.dir)  # raises
    with collect_errors(facts):
        is_chained = config.init_from == "previous"
        init_from = _resolve_init_from(run.init_from, config.model, facts, is_chained=is_chained)
        model = resolve_tiny_parts(config.model, place.parts_dir, seed)
        spec = load_model_spec(model, init_from, data.tiling)
        options: dict[str, Any] = {"data": data, "stage": stage, "trainer": trainer, "seed": seed}
        date = model.template_date
        stage_data = build_stage_data(
            place, sources, spec, template_date=date, debug=config.debug, make=make_training_data, **options
        )
    if stage_data is not None and training:
        indexes = index_sources(stage_data, training, data, stage.name, place.index_dir, preflight.max_samples, facts)
        world_size = preflight.world_size or trainer.devices * trainer.num_nodes
        plan = make_plan(
            stage_data, indexes, data, seed=seed, max_epochs=trainer.max_epochs, world_size=world_size, facts=facts
        )
        with collect_errors(facts):
            measured = load_or_measure(spec, stage, seed=seed, folder=place.index_dir)
            facts.parts = list_parts(measured.part_summary, stage)
            _estimate_disk(place, measured.parameters, config.checkpoint, trainer.precision, facts)
            _estimate_resources(measured, plan, stage, trainer, preflight, facts)
        if indexes is not None and config.evaluate.files is not None:
            from lit_vlm.tasks.preflight_contamination import check_contamination  # hashes of pictures: half a second

            files, looked_at = Path(config.evaluate.files), stage_data.training_data.sources
            with collect_errors(facts):
                check_contamination(
                    files, config.benchmarks, looked_at, place.index_dir, data, preflight.num_shown, facts
                )
        facts.findings += collect_findings(facts, data, stage, trainer.precision)
        if indexes is not None and len(indexes.training):
            index = plan.index if plan is not None else indexes.training
            facts.samples = prepare_samples(index, stage_data.training_data.processor, preflight.num_shown)
    facts.seconds = time.monotonic() - started
    _show_facts(facts, run.dir)


def _show_facts(facts: PreflightFacts, run_dir: Path) -> None:
    """Write the page and show the facts. UserError if the run would fail."""
    report_path = write_preflight_page(run_dir, facts)
    print_preflight(facts, report_path, console)
    if facts.get_findings(Severity.failure):
        raise UserError(f"{facts.name} would fail; what to do is said above and in {report_path}.")


def _resolve_init_from(
    init_from: str | None, model: ModelConfig, facts: PreflightFacts, *, is_chained: bool
) -> str | None:
    """Return the model that the stage starts from. None, with a finding, if the previous stage has not written it yet.

    Args:
        is_chained: the setting is init_from=previous.
    """
    parts = f"{model.vision_tower} and {model.language_model}"
    try:
        require_finished_parent(init_from)
    except UserError as error:
        if not is_chained:
            raise
        message = f"{error} Until then everything here is counted from the parts in model.*."
        facts.findings.append(Finding(Severity.advice, message))
        facts.starts_from = f"{parts}, until the stage before is there"
        return None
    facts.starts_from = init_from or parts
    return init_from


def _estimate_disk(
    place: RunPlace, parameters: ParameterCounts, checkpoint: CheckpointConfig, precision: str, facts: PreflightFacts
) -> None:
    """Estimate the disk space of the run."""
    index_bytes = BYTES_PER_RECORD * sum(row.records for row in facts.sources) - sum_file_sizes(place.index_dir)
    facts.disk = estimate_disk(checkpoint, precision, place.dir, place.index_dir, parameters, max(0.0, index_bytes))


def _estimate_resources(
    measured: MeasuredModel,
    plan: Plan | None,
    stage: StageConfig,
    trainer: TrainerConfig,
    preflight: PreflightConfig,
    facts: PreflightFacts,
) -> None:
    """Estimate strategy, memory and time. They need a plan."""
    if plan is None or facts.plan is None:
        return
    setup = make_training_setup(
        ModelShape.from_config(measured.model_config),
        measured.parameters,
        get_largest_micro_batch(facts.plan),
        world_size=facts.plan.world_size,
        num_micro_batches=facts.plan.k,
        stage=stage,
        trainer=trainer,
        preflight=preflight,
    )
    facts.strategy = summarize_strategy(setup, facts.plan, trainer.strategy, stage.activation_checkpointing)
    setup = setup.replace_level(ActivationCheckpointing[facts.strategy.level])
    facts.findings += check_strategy(setup, facts.strategy)
    facts.memory = compare_memory(
        setup, StrategyName(facts.strategy.name), facts.plan, get_planned_device(preflight, trainer)
    )
    flops = compute_flops(measured.model_config, stage, setup.training)
    total_flops = float(plan.index.compute_flops(flops)[plan.get_sample_sequence()].sum())
    facts.time = estimate_time(
        preflight, trainer, total_flops * facts.plan.steps / plan.num_steps, facts.plan, facts.strategy.share
    )


def _check_run_folder(
    place: RunPlace,
    settings: dict[str, Any],
    sources: Sources,
    init_from: str | None,
    facts: PreflightFacts,
    *,
    overwrite: bool,
) -> None:
    """Check the run folder as task=train would: an existing folder may hold another run, or a finished one."""
    folder = open_run_folder(
        place.dir,
        settings,
        name=place.name,
        overwrite=overwrite,
        data_digest=sources.compute_digest(),
        # the digest takes long to compute; without a manifest it is not compared
        parent=describe_parent(init_from) if read_manifest_or_empty(place.dir) else None,
    )
    if folder.is_finished:
        message = f"{place.name} is finished already, in {place.dir}: task=train would leave it as it is."
        facts.findings.append(Finding(Severity.warning, message, "Start it anew with overwrite=true."))
