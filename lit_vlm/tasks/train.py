"""One stage, from settings to a folder that plain transformers loads. Read top to bottom."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime

import yaml
from rich.table import Table

from callbacks import make_callbacks
from lit_vlm.config import Run
from lit_vlm.config.schema import Debug, RunConfig
from lit_vlm.engine.report import write_report
from lit_vlm.engine.run_folder import (
    digest_of_sources,
    digest_of_weights,
    is_rank_zero,
    open_run_folder,
    parent_of,
    require_parent,
    to_plain,
    write_atomically,
)
from lit_vlm.engine.trainer import FEW_STEPS, leave_process_group, make_trainer
from lit_vlm.model.build import Blueprint
from lit_vlm.stages import STAGES, Stage
from lit_vlm.tasks.run_lock import hold_to_lock
from lit_vlm.tasks.stage_data import StageData, open_sources, require_records_of, settle, stage_data
from lit_vlm.tasks.terminal import console, say


def train(run: Run) -> None:
    """Train one stage. A finished run says so and stays as it is; an interrupted one starts its stage again."""
    config = run.config
    require_parent(run.init_from)
    sources, held_out = open_sources(run)
    folder = open_run_folder(
        run.dir,
        config,
        name=run.name,
        overwrite=config.overwrite,
        data_digest=digest_of_sources([*sources, *held_out]),
        parent=parent_of(run.init_from),
    )
    if folder.finished:
        say(f"{run.name}: finished already, in {folder.path}. Start it anew with overwrite=true.")
        return

    data = stage_data(run, sources, held_out, run.init_from)
    datamodule = data.datamodule
    stage = make_stage(data.blueprint, config)
    datamodule.build()
    quarantined = settle(data)
    require_records_of(config.stage, datamodule)

    callbacks = make_callbacks(config.callbacks, run.dir, max_samples=most_scored(config))
    trainer = make_trainer(config, run.dir, run.name, callbacks)
    plan = datamodule.make_plan(trainer.world_size)
    trainer.log_every_n_steps = min(trainer.log_every_n_steps, plan.num_steps)  # a short run leaves a row, too
    stage.configure_model()
    show_start(data, stage)
    hold_to_lock(data)
    # not earlier: a mistake in the data, the model or the trainer's settings leaves an older run as it is
    folder.update(
        trained=[row.as_dict() for row in stage.part_summary],
        data=folder.manifest["data"]
        | {
            "index_digest": datamodule.index.digest(),
            "num_samples": len(datamodule.index),
            "num_held_out": len(datamodule.held_out),
            "mixture": datamodule.mixture.rows(plan.draws()),
            "quarantined": quarantined,
        },
        plan={
            "steps": plan.num_steps,
            "k": plan.k,
            "global_batch_size": plan.global_batch_size,
            "world_size": plan.world_size,
        },
    )
    if is_rank_zero():
        write_atomically(
            run.dir / "config.yaml", yaml.safe_dump(to_plain(asdict(config)), allow_unicode=True, sort_keys=False)
        )

    trainer.fit(stage, datamodule)

    if is_rank_zero():
        figures = {
            key: value
            for callback in callbacks
            if hasattr(callback, "figures")
            for key, value in callback.figures().items()
        }
        figures |= {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        weights = digest_of_weights(folder.hf) if folder.hf.is_dir() else ""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        folder.update(status="finished", finished=now, figures=figures, weights_digest=weights)
        write_report(run.dir / "report.html", [run.dir], run.name)
        say(f"{run.name}: done. Model: {folder.hf}   Report: {run.dir / 'report.html'}")
    leave_process_group()


def most_scored(config: RunConfig) -> int:
    return FEW_STEPS if config.debug is Debug.fast else config.data.validation.max_samples


def make_stage(blueprint: Blueprint, config: RunConfig) -> Stage:
    options = to_plain(asdict(config.stage))
    dtype = "bfloat16" if config.trainer.precision == "bf16-true" else "float32"
    return STAGES[options.pop("name")](
        blueprint, **options, tiling=config.data.tiling.value, dtype=dtype, seed=config.seed
    )


def show_start(data: StageData, stage: Stage) -> None:
    """What trains, on how much, in how many steps: the last look before time is spent."""
    if not is_rank_zero():
        return
    run, datamodule = data.run, data.datamodule
    table = Table(title=f"{run.name}: what trains", title_justify="left")
    for heading in ("part", "parameters", "trainable", "how"):
        table.add_column(heading, justify="right" if heading in ("parameters", "trainable") else "left")
    for row in stage.part_summary:
        table.add_row(row.part, f"{row.parameters:,}", f"{row.trainable:,}", row.how)
    console.print(table)
    plan, index = datamodule.plan, datamodule.index
    if run.init_from:
        say(f"starts from {run.init_from}")
    say(
        f"{len(index):,} samples, {len(datamodule.held_out):,} held out; {plan.num_steps:,} steps of {plan.global_batch_size} samples"
        f" in {plan.k} micro-batch{'es' if plan.k > 1 else ''} on {plan.world_size} rank{'s' if plan.world_size > 1 else ''}"
    )
