"""task=preflight: checks data, settings, memory, time and disk of a run before it starts. Read top to bottom.

Only the few images that are shown are decoded. No weights are read, and no GPU is needed. A problem does not end the checks:
it becomes a finding, and all checks that do not depend on it still run.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime

from lit_vlm.config import Run
from lit_vlm.config.schema import ActivationCheckpointing, StrategyName
from lit_vlm.cost import ModelShape
from lit_vlm.data.plan.plan import Plan
from lit_vlm.engine.preflight.checks import collect_findings
from lit_vlm.engine.preflight.facts import Finding, PreflightFacts, Severity
from lit_vlm.engine.preflight.model import (
    compare_memory,
    compute_flops,
    count_parameters,
    describe_training,
    estimate_disk,
    estimate_time,
    list_parts,
    prepare_meta_stage,
    sum_file_sizes,
)
from lit_vlm.engine.preflight.page import write_preflight_page
from lit_vlm.engine.preflight.samples import prepare_samples
from lit_vlm.engine.preflight.strategy import check_strategy, make_training_setup, summarize_strategy
from lit_vlm.engine.preflight.terminal import print_preflight
from lit_vlm.engine.run_folder import (
    compute_sources_digest,
    describe_parent,
    get_command_line,
    open_run_folder,
    read_manifest_or_empty,
    require_finished_parent,
    require_writable,
)
from lit_vlm.tasks.preflight_data import collect_errors, index_sources, make_plan, open_valid_sources
from lit_vlm.tasks.stage_data import StageData, build_stage_data, get_index_dir
from lit_vlm.tasks.terminal import console
from lit_vlm.tasks.train import make_stage
from lit_vlm.types import Source, UserError

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
