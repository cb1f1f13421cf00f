"""task=preflight: checks data, settings, memory, time and disk of a run before it starts. Read top to bottom.

Only the few images that are shown are decoded. No weights are read, and no GPU is needed. A problem does not end the checks:
it becomes a finding, and all checks that do not depend on it still run.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime

from lit_vlm.config import Run
from lit_vlm.config.schema import ActivationCheckpointing, Strategy
from lit_vlm.cost import Shape
from lit_vlm.data.plan.plan import Plan
from lit_vlm.engine.preflight.checks import findings
from lit_vlm.engine.preflight.facts import Facts, Finding, Level
from lit_vlm.engine.preflight.model import (
    bytes_in,
    disk_rows,
    memory_facts,
    outline,
    parameters_of,
    part_rows,
    time_facts,
    training_of,
    work_of,
)
from lit_vlm.engine.preflight.page import write_preflight
from lit_vlm.engine.preflight.samples import show_samples
from lit_vlm.engine.preflight.strategy import of_strategy, situation_of, strategy_facts
from lit_vlm.engine.preflight.terminal import show
from lit_vlm.engine.run_folder import (
    command_line,
    digest_of_sources,
    find_manifest,
    open_run_folder,
    parent_of,
    require_parent,
    require_writable,
)
from lit_vlm.tasks.preflight_data import look, make_plan, noted, opened_sources
from lit_vlm.tasks.stage_data import StageData, stage_data, store_of
from lit_vlm.tasks.terminal import console
from lit_vlm.tasks.train import make_stage
from lit_vlm.types import Source, UserError

ROW_BYTES = 110  # approximate size of a record in the index and of its samples in the plan


def preflight(run: Run) -> None:
    """Collect the facts, show them, and write `preflight.html` and `preflight.json` into the run folder.

    Raises:
        UserError: the run would fail; the findings are shown before.
    """
    require_writable(run.dir)  # the page goes there
    started = time.monotonic()
    facts = Facts(
        name=run.name,
        stage=run.config.stage.name.value,
        command=command_line(),
        moment=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )
    collect(run, facts)
    facts.seconds = time.monotonic() - started
    report_path = write_preflight(run.dir, facts)
    show(facts, report_path, console)
    failures = facts.of_level(Level.failure)
    if failures:
        raise UserError(f"{run.name} would fail; what to do is said above and in {report_path}.")


def collect(run: Run, facts: Facts) -> None:
    """Collect facts about data, mixture, plan, model and machine. Each step uses the results of the earlier steps, if any."""
    config = run.config
    sources, held_out = opened_sources(config, facts)
    data = None
    with noted(facts):
        _meet_run_folder(run, [*sources.values(), *held_out.values()], facts)
    with noted(facts):
        data = stage_data(run, list(sources.values()), list(held_out.values()), _start(run, facts))
    if data is None or not sources:
        return
    look(run, data, sources, facts)
    plan = make_plan(run, data, facts)
    with noted(facts):
        _model(run, data, plan, facts)
    facts.findings += findings(facts, config)
    index = data.datamodule.index
    if index is not None and len(index):
        facts.samples = show_samples(index, data.datamodule.processor, config.preflight.num_shown)


def _start(run: Run, facts: Facts) -> str | None:
    """Return the model that the stage starts from. None, with a finding, if the previous stage has not written it yet."""
    try:
        require_parent(run.init_from)
    except UserError as error:
        if run.config.init_from != "previous":
            raise
        message = f"{error} Until then everything here is counted from the parts in model.*."
        facts.findings.append(Finding(Level.advice, message))
        model = run.config.model
        facts.starts_from = f"{model.vision_tower} and {model.language_model}, until the stage before is there"
        return None
    model = run.config.model
    facts.starts_from = run.init_from or f"{model.vision_tower} and {model.language_model}"
    return run.init_from


def _model(run: Run, data: StageData, plan: Plan | None, facts: Facts) -> None:
    """Estimate parameters, disk, strategy, memory and time. Strategy, memory and time need a plan."""
    config, index_dir = run.config, store_of(run.config)
    stage = outline(make_stage(data.blueprint, config), data.blueprint)
    assert stage.model is not None
    facts.parts = part_rows(stage)
    parameters = parameters_of(stage, config.stage)
    training = training_of(config, parameters)
    index_bytes = max(0.0, ROW_BYTES * sum(row.records for row in facts.sources) - bytes_in(index_dir))
    facts.disk = disk_rows(config, run.dir, index_dir, parameters, index_bytes)
    if plan is None or facts.plan is None:
        return
    shape = stage.model.config.to_dict()
    situation = situation_of(config, Shape.from_config(shape), parameters, training, facts.plan)
    facts.strategy = strategy_facts(config, situation, facts.plan)
    situation = situation.at(ActivationCheckpointing[facts.strategy.level])
    facts.findings += of_strategy(situation, facts.strategy)
    facts.memory = memory_facts(config, situation, Strategy(facts.strategy.name), facts.plan)
    total_flops = float(plan.index.flops(work_of(shape, config, situation.training))[plan.draws()].sum())
    facts.time = time_facts(config, total_flops * facts.plan.steps / plan.num_steps, facts.plan, facts.strategy.share)


def _meet_run_folder(run: Run, sources: list[Source], facts: Facts) -> None:
    """Check the run folder as task=train would: an existing folder may hold another run, or a finished one."""
    if len(sources) < len(run.config.data.sources) + len(run.config.data.validation.sources):
        return
    folder = open_run_folder(
        run.dir,
        run.config,
        name=run.name,
        overwrite=run.config.overwrite,
        data_digest=digest_of_sources(sources),
        # the digest takes long to compute; without a manifest it is not compared
        parent=parent_of(run.init_from) if find_manifest(run.dir) else None,
    )
    if folder.finished:
        message = f"{run.name} is finished already, in {run.dir}: task=train would leave it as it is."
        facts.findings.append(Finding(Level.warning, message, "Start it anew with overwrite=true."))
