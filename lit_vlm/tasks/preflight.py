"""Data side of preflight: checks the sources, the mixture and the plan of the steps."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np

from lit_vlm.config import Run
from lit_vlm.config.model_folders import require_model_folders
from lit_vlm.config.schema import ActivationCheckpointing, RunConfig, SourceConfig, StrategyName
from lit_vlm.cost import ModelShape
from lit_vlm.data.datamodule import DataModule
from lit_vlm.data.index.sample_index import SampleIndex
from lit_vlm.data.packing.mixture import MixtureSettings, SourceAmount
from lit_vlm.data.packing.mixture_lock import compare_locks, read_lock
from lit_vlm.data.packing.mixture_shares import resolve_amounts
from lit_vlm.data.packing.plan import Plan
from lit_vlm.data.sources import open_source
from lit_vlm.formatting import format_count
from lit_vlm.reports.preflight.checks import check_bad_records, collect_findings
from lit_vlm.reports.preflight.estimates import (
    check_strategy,
    compare_memory,
    compute_flops,
    count_parameters,
    describe_training,
    estimate_disk,
    estimate_time,
    list_parts,
    make_training_setup,
    prepare_meta_stage,
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
    compute_sources_digest,
    describe_parent,
    get_command_line,
    open_run_folder,
    read_manifest_or_empty,
    require_finished_parent,
    require_writable,
)
from lit_vlm.tasks.mixture_lock import build_mixture_lock
from lit_vlm.tasks.prepare_data import (
    StageData,
    build_stage_data,
    find_image_root_errors,
    get_index_dir,
    require_record_type,
)
from lit_vlm.tasks.terminal import console, show_progress
from lit_vlm.tasks.train import make_stage
from lit_vlm.types import RecordError, Source, UserError

MAX_SAMPLE_STEPS = 300  # steps to plan if only a sample is indexed; its micro-batches are like those of all data


def open_valid_sources(config: RunConfig, facts: PreflightFacts) -> tuple[dict[str, Source], dict[str, Source]]:
    """Open the training and validation sources, by name. A source that cannot be opened becomes a finding."""

    def open_each(table: dict[str, SourceConfig], held_out: bool) -> dict[str, Source]:
        sources = {}
        for name, source in table.items():
            with collect_errors(facts):
                sources[name] = open_source(
                    name,
                    source,
                    max_image_pixels=config.data.max_image_pixels,
                    seed=config.seed,
                    held_out=held_out,
                    cache=get_index_dir(config),
                )
        return sources

    return open_each(config.data.sources, False), open_each(config.data.validation.sources, True)


def index_sources(run: Run, data: StageData, sources: dict[str, Source], facts: PreflightFacts) -> None:
    """Index small sources completely, and a sample of large sources that have no index yet. Fill the facts about the data."""
    config, datamodule, index_dir = run.config, data.datamodule, get_index_dir(run.config)
    with collect_errors(facts):
        max_samples = config.preflight.max_samples
        processor = datamodule.processor
        datamodule.sources = [
            subsample_source(source, processor, index_dir, max_samples) for source in datamodule.sources
        ]
        if not isinstance(datamodule.validation, float | int):
            datamodule.validation = [
                subsample_source(source, processor, index_dir, max_samples) for source in datamodule.validation
            ]
        with show_progress("look at") as on_progress:
            datamodule.build_indexes(on_progress=on_progress)
        assert datamodule.index is not None and datamodule.held_out is not None
    index, held_out = datamodule.index, datamodule.held_out
    if index is None or held_out is None:
        return
    facts.sources = [
        _make_source_row(config.data.sources[name], source, seen)
        for (name, source), seen in zip(sources.items(), datamodule.sources, strict=True)
    ]
    facts.held_out = len(held_out)
    fill_source_rows(facts.sources, index, held_out, index.errors)
    image_root_errors = find_image_root_errors(datamodule, config.data)
    for row in facts.sources:
        row.image_root_error = image_root_errors.get(row.name, "")
    held_out_errors = _collect_held_out_errors(config, index, held_out, image_root_errors, facts)
    facts.bad = collect_bad_examples([*index.errors, *held_out_errors])
    scales = np.array([row.scale for row in facts.sources])
    if len(index):
        caps = {"tokens": config.data.tokens_per_micro_batch, "tiles": config.data.tiles_per_micro_batch}
        facts.histograms = build_histograms(index, scales, caps)
        num_duplicates = count_duplicates_between_sources(index)
        if num_duplicates:
            message = f"{format_count(num_duplicates, 'record says', 'records say')}, with the same images, what a record of another source says."
            facts.findings.append(Finding(Severity.warning, message))
    with collect_errors(facts):
        require_record_type(config.stage, datamodule)


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
    config: RunConfig,
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
    facts.findings += [finding for row in rows for finding in check_bad_records(row, config.data)]
    return errors


def make_plan(run: Run, data: StageData, facts: PreflightFacts) -> Plan | None:
    """Make the plan of the whole run, or of its first steps if only a sample is indexed. None, with a finding, if it fails."""
    config, datamodule = run.config, data.datamodule
    world_size = config.preflight.world_size or config.trainer.devices * config.trainer.num_nodes
    if datamodule.index is None or not len(datamodule.index):
        if not any(row.image_root_error for row in facts.sources):
            facts.findings.append(
                Finding(Severity.failure, "No record of the sources can be used.", "See what is wrong with each.")
            )
        return None
    with collect_errors(facts):
        datamodule.mixture_settings, passes = _resolve_mixture(datamodule, facts)
        steps = datamodule.max_steps
        if facts.estimated:
            steps = steps or _estimate_steps(config, datamodule, passes)
            datamodule.max_steps, datamodule.store = min(steps, MAX_SAMPLE_STEPS), None
        plan = datamodule.make_plan(world_size)
        _check_mixture_lock(run, data, facts)
        facts.plan = summarize_plan(plan, steps if facts.estimated and steps else plan.num_steps)
        _fill_shares(plan, facts)
        return plan
    return None


def _resolve_mixture(datamodule: DataModule, facts: PreflightFacts) -> tuple[MixtureSettings, float]:
    """Resolve the mixture of the sources that could be opened, in sizes of the whole sources.

    For a source of which only a sample is indexed, the index does not hold the true size, so its amount becomes a count.

    Returns:
        The mixture settings, and the number of samples of one pass.
    """
    settings, names = datamodule.mixture_settings, [row.name for row in facts.sources]
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


def _estimate_steps(config: RunConfig, datamodule: DataModule, samples: float) -> int:
    """Estimate the optimizer steps of `max_epochs` passes over `samples` samples."""
    samples *= config.trainer.max_epochs
    if config.data.global_batch_tokens:
        assert datamodule.index is not None
        return max(1, round(samples * float(datamodule.index.tokens.mean()) / config.data.global_batch_tokens))
    return max(1, math.ceil(samples / config.data.global_batch_size))


def _check_mixture_lock(run: Run, data: StageData, facts: PreflightFacts) -> None:
    """Compare the data with `data.lock`; differences become a finding. A sample of the data is not compared."""
    lock = run.config.data.lock
    if not lock or len(data.sources) < len(run.config.data.sources):
        return
    if facts.estimated:
        message = f"The data are not compared with data.lock={lock}: not all records were looked at."
        facts.findings.append(Finding(Severity.advice, message, "task=prepare reads all of them."))
        return
    with collect_errors(facts):
        changes = "".join(f"\n  {change}" for change in compare_locks(read_lock(lock), build_mixture_lock(data)))
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

    Raises:
        UserError: the run would fail; the findings are shown before.
    """
    require_writable(run.dir)  # the page goes there
    started = time.monotonic()
    facts = PreflightFacts(
        name=run.name,
        stage=run.config.stage.name.value,
        command=get_command_line(),
        moment=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )
    collect_facts(run, facts)
    facts.seconds = time.monotonic() - started
    report_path = write_preflight_page(run.dir, facts)
    print_preflight(facts, report_path, console)
    failures = facts.get_findings(Severity.failure)
    if failures:
        raise UserError(f"{run.name} would fail; what to do is said above and in {report_path}.")


def collect_facts(run: Run, facts: PreflightFacts) -> None:
    """Collect facts about data, mixture, plan, model and machine. Each step uses the results of the earlier steps, if any."""
    config = run.config
    sources, held_out = open_valid_sources(config, facts)
    data = None
    with collect_errors(facts):
        _check_run_folder(run, [*sources.values(), *held_out.values()], facts)
    with collect_errors(facts):
        data = build_stage_data(run, list(sources.values()), list(held_out.values()), _resolve_init_from(run, facts))
    if data is None or not sources:
        return
    index_sources(run, data, sources, facts)
    plan = make_plan(run, data, facts)
    with collect_errors(facts):
        _estimate_resources(run, data, plan, facts)
    facts.findings += collect_findings(facts, config)
    index = data.datamodule.index
    if index is not None and len(index):
        facts.samples = prepare_samples(index, data.datamodule.processor, config.preflight.num_shown)


def _resolve_init_from(run: Run, facts: PreflightFacts) -> str | None:
    """Return the model that the stage starts from. None, with a finding, if the previous stage has not written it yet."""
    require_model_folders(run)
    try:
        require_finished_parent(run.init_from)
    except UserError as error:
        if run.config.init_from != "previous":
            raise
        message = f"{error} Until then everything here is counted from the parts in model.*."
        facts.findings.append(Finding(Severity.advice, message))
        model = run.config.model
        facts.starts_from = f"{model.vision_tower} and {model.language_model}, until the stage before is there"
        return None
    model = run.config.model
    facts.starts_from = run.init_from or f"{model.vision_tower} and {model.language_model}"
    return run.init_from


def _estimate_resources(run: Run, data: StageData, plan: Plan | None, facts: PreflightFacts) -> None:
    """Estimate parameters, disk, strategy, memory and time. Strategy, memory and time need a plan."""
    config, index_dir = run.config, get_index_dir(run.config)
    stage = prepare_meta_stage(make_stage(data.spec, config), data.spec)
    assert stage.model is not None
    facts.parts = list_parts(stage)
    parameters = count_parameters(stage, config.stage)
    training = describe_training(config, parameters)
    index_bytes = max(0.0, BYTES_PER_RECORD * sum(row.records for row in facts.sources) - sum_file_sizes(index_dir))
    facts.disk = estimate_disk(config, run.dir, index_dir, parameters, index_bytes)
    if plan is None or facts.plan is None:
        return
    shape = stage.model.config.to_dict()
    situation = make_training_setup(config, ModelShape.from_config(shape), parameters, training, facts.plan)
    facts.strategy = summarize_strategy(config, situation, facts.plan)
    situation = situation.replace_level(ActivationCheckpointing[facts.strategy.level])
    facts.findings += check_strategy(situation, facts.strategy)
    facts.memory = compare_memory(config, situation, StrategyName(facts.strategy.name), facts.plan)
    total_flops = float(
        plan.index.compute_flops(compute_flops(shape, config, situation.training))[plan.get_sample_sequence()].sum()
    )
    facts.time = estimate_time(
        config, total_flops * facts.plan.steps / plan.num_steps, facts.plan, facts.strategy.share
    )


def _check_run_folder(run: Run, sources: list[Source], facts: PreflightFacts) -> None:
    """Check the run folder as task=train would: an existing folder may hold another run, or a finished one."""
    if len(sources) < len(run.config.data.sources) + len(run.config.data.validation.sources):
        return
    folder = open_run_folder(
        run.dir,
        run.config,
        name=run.name,
        overwrite=run.config.overwrite,
        data_digest=compute_sources_digest(sources),
        # the digest takes long to compute; without a manifest it is not compared
        parent=describe_parent(run.init_from) if read_manifest_or_empty(run.dir) else None,
    )
    if folder.is_finished:
        message = f"{run.name} is finished already, in {run.dir}: task=train would leave it as it is."
        facts.findings.append(Finding(Severity.warning, message, "Start it anew with overwrite=true."))
