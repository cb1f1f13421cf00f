"""One stage, from settings to a folder that plain transformers loads. Read top to bottom."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from callbacks import make_callbacks
from lit_vlm.config import Run
from lit_vlm.config.schema import DataConfig, Debug, RunConfig, StageConfig, StageName
from lit_vlm.cost import Flops
from lit_vlm.data.datamodule import DataModule
from lit_vlm.data.processor import Processor, check_vocabulary
from lit_vlm.data.quarantine import Quarantine
from lit_vlm.data.sources import open_source
from lit_vlm.engine.report import write_report
from lit_vlm.engine.run_folder import (
    RunFolder,
    digest_of_sources,
    digest_of_weights,
    is_rank_zero,
    open_run_folder,
    parent_of,
    require_parent,
    to_plain,
    write_atomically,
)
from lit_vlm.engine.trainer import FEW_STEPS, make_trainer
from lit_vlm.model.build import Blueprint, draw_up
from lit_vlm.model.tiny import tiny_parts
from lit_vlm.stages import STAGES, Stage
from lit_vlm.types import Source, UserError

console = Console(highlight=False)


def train(run: Run) -> None:
    """Train one stage. A finished run says so and stays as it is; an interrupted one starts its stage again."""
    config = run.config
    require_parent(run.init_from)
    sources, held_out = open_sources(config.data, config.seed)
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

    blueprint = draw_up(with_parts(config, run.dir), run.init_from, config.data.tiling)
    processor = Processor(blueprint.tokenizer, blueprint.images)
    check_vocabulary(processor)
    stage = make_stage(config.stage, blueprint, config)
    datamodule = make_datamodule(config, processor, sources, held_out, flops_of(blueprint, config.stage))
    datamodule.build()
    quarantined = settle(config.data, datamodule, folder)
    require_records_of(config.stage, datamodule)

    callbacks = make_callbacks(config.callbacks, run.dir, max_samples=most_scored(config))
    trainer = make_trainer(config, run.dir, run.name, callbacks)
    plan = datamodule.make_plan(trainer.world_size)
    trainer.log_every_n_steps = min(trainer.log_every_n_steps, plan.num_steps)  # a short run leaves a row, too
    stage.configure_model()
    show_start(run, stage, datamodule)
    # not earlier: a mistake in the data, the model or the trainer's settings leaves an older run as it is
    folder.update(
        trained=[row.as_dict() for row in stage.part_summary],
        data=folder.manifest["data"]
        | {
            "index_digest": datamodule.index.digest(),
            "num_samples": len(datamodule.index),
            "num_held_out": len(datamodule.held_out),
            "mixture": mixture_of(datamodule),
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


def most_scored(config: RunConfig) -> int:
    return FEW_STEPS if config.debug is Debug.fast else config.data.validation.max_samples


def open_sources(data: DataConfig, seed: int) -> tuple[list[Source], list[Source]]:
    """Training sources, and validation sources where there are own ones."""
    options: dict[str, Any] = {"max_image_pixels": data.max_image_pixels, "seed": seed}
    sources = [open_source(name, source, **options) for name, source in data.sources.items()]
    held_out = [open_source(name, source, held_out=True, **options) for name, source in data.validation.sources.items()]
    return sources, held_out


def with_parts(config: RunConfig, run_dir: Path) -> Any:
    """The model's settings with `tiny` parts made and named by their folders."""
    model = config.model
    if "tiny" in (model.vision_tower, model.language_model):
        tower, language = tiny_parts(Path(config.run_dir) / "parts", config.seed)
        model.vision_tower = tower if model.vision_tower == "tiny" else model.vision_tower
        model.language_model = language if model.language_model == "tiny" else model.language_model
    return model


def make_stage(stage: StageConfig, blueprint: Blueprint, config: RunConfig) -> Stage:
    options = to_plain(asdict(stage))
    dtype = "bfloat16" if config.trainer.precision == "bf16-true" else "float32"
    return STAGES[options.pop("name")](
        blueprint, **options, tiling=config.data.tiling.value, dtype=dtype, seed=config.seed
    )


def make_datamodule(
    config: RunConfig, processor: Processor, sources: list[Source], held_out: list[Source], flops: Flops
) -> DataModule:
    data, trainer = config.data, config.trainer
    weights = [source.weight for source in data.sources.values()]
    return DataModule(
        processor,
        sources,
        held_out or data.validation.fraction,
        global_batch_size=data.global_batch_size,
        tokens_per_micro_batch=data.tokens_per_micro_batch,
        tiles_per_micro_batch=data.tiles_per_micro_batch,
        weights=None if None in weights else weights,
        max_steps=FEW_STEPS if config.debug is Debug.fast else trainer.max_steps,
        max_epochs=trainer.max_epochs,
        num_workers=data.num_workers,
        seed=config.seed,
        flops=flops,
        pin_memory=trainer.accelerator == "gpu",
        overfit=config.debug is Debug.overfit,
    )


def flops_of(blueprint: Blueprint, stage: StageConfig) -> Flops:
    trainable = {part.value for part in stage.trainable}
    return Flops.from_config(
        blueprint.config.to_dict(),
        trains_tower="vision_tower" in trainable,
        trains_language_model="language_model" in trainable,
    )


def settle(data: DataConfig, datamodule: DataModule, folder: RunFolder) -> dict[str, int]:
    """Act on the records that cannot be used, before anything is trained; returns their number per source."""
    quarantine = Quarantine()
    totals: Counter[str] = Counter()
    for index in (datamodule.index, datamodule.held_out):
        for source in index.sources:
            totals[source.name] = max(totals[source.name], len(source))
        for name, error in index.errors:
            quarantine.add(name, error)
    if is_rank_zero():
        quarantine.settle(data.on_bad_record, data.max_quarantined, dict(totals), folder.path / "quarantine.jsonl")
    return dict(Counter(name for index in (datamodule.index, datamodule.held_out) for name, _ in index.errors))


def require_records_of(stage: StageConfig, datamodule: DataModule) -> None:
    """Pairs for dpo and conversations for the other stages; with format=auto only the files tell which they are.

    Raises:
        UserError: naming the sources that hold the other kind.
    """
    dpo, wrong = stage.name is StageName.dpo, set()
    for index in (datamodule.index, datamodule.held_out):
        wrong |= {index.sources[number].name for number in set(index.source_of[(index.chosen > 0) != dpo].tolist())}
    names = ", ".join(sorted(wrong))
    if wrong and dpo:
        raise UserError(
            f"data.sources: {names}: no preference pairs, and stage=dpo needs them; choose data=preference."
        )
    if wrong:
        raise UserError(
            f"data.sources: {names}: preference pairs, which stage={stage.name.value} cannot use; choose other data or dpo."
        )


def mixture_of(datamodule: DataModule) -> list[dict[str, Any]]:
    """What was asked for beside what the plan draws, per source."""
    index, plan = datamodule.index, datamodule.plan
    drawn = Counter(int(index.source_of[i]) for step in range(plan.num_steps) for i in plan.samples(step))
    total = sum(drawn.values())
    sizes = [len(index.of_source(number)) for number in range(len(index.sources))]
    weights = datamodule.weights or sizes
    rows = []
    for number, source in enumerate(index.sources):
        members = index.of_source(number)
        kind, language = (index.kinds[members[0]], index.languages[members[0]]) if len(members) else ("", "")
        rows.append(
            {
                "source": source.name,
                "kind": str(kind),
                "language": str(language),
                "size": sizes[number],
                "drawn": drawn[number],
                "asked": weights[number] / sum(weights),
                "share": drawn[number] / total,
            }
        )
    return rows


def show_start(run: Run, stage: Stage, datamodule: DataModule) -> None:
    """What trains, on how much, in how many steps: the last look before time is spent."""
    if not is_rank_zero():
        return
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


def say(text: str) -> None:
    if is_rank_zero():
        console.print(text, soft_wrap=True)
