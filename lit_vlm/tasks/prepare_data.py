"""Data side of one stage, shared by train, prepare and preflight: from the settings to index, mixture and plan."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

from lit_vlm.config import Run
from lit_vlm.config.schema import (
    DataConfig,
    DebugMode,
    ModelConfig,
    OnBadRecord,
    RunConfig,
    SourceConfig,
    StageConfig,
    StageName,
)
from lit_vlm.cost import Flops
from lit_vlm.data.datamodule import DataModule
from lit_vlm.data.packing.mixture import MixtureSettings, SourceAmount
from lit_vlm.data.packing.mixture_lock import LOCK_FILE, TEMPLATE_DATE_KEY, read_lock_or_empty
from lit_vlm.data.processor import Processor, check_vocabulary
from lit_vlm.data.quarantine import Quarantine, find_missing_image_errors, format_unused_keys
from lit_vlm.data.sources import open_source
from lit_vlm.data.template_date import parse_day
from lit_vlm.distributed.trainer import DEBUG_FAST_STEPS, DEBUG_PROFILE_STEPS
from lit_vlm.files import handle_write_errors
from lit_vlm.model.spec import ModelSpec, load_model_spec
from lit_vlm.model.tiny import make_tiny_parts
from lit_vlm.runs.run_folder import is_rank_zero, read_manifest_or_empty, require_writable
from lit_vlm.tasks.terminal import say
from lit_vlm.types import SampleKind, Source, UserError


@dataclass(slots=True)
class StageData:
    """Data of one stage, not read yet, and the spec of the model that they are tokenized for."""

    run: Run
    sources: list[Source]
    held_out: list[Source]
    spec: ModelSpec
    datamodule: DataModule

    @property
    def configured_sources(self) -> Iterator[tuple[str, SourceConfig, Source]]:
        """Name, settings and data of each training source."""
        for (name, config), source in zip(self.run.config.data.sources.items(), self.sources, strict=True):
            yield name, config, source


def get_index_dir(config: RunConfig) -> Path:
    """Return the folder of the data index."""
    return Path(config.data.index_dir) if config.data.index_dir else Path(config.run_dir) / "index"


def open_sources(run: Run) -> tuple[list[Source], list[Source]]:
    """Open the training sources, and the validation sources if there are separate ones."""
    require_writable(run.dir)
    config, data = run.config, run.config.data
    options: dict[str, Any] = {
        "max_image_pixels": data.max_image_pixels,
        "seed": config.seed,
        "cache": get_index_dir(config),
    }
    sources = [open_source(name, source, **options) for name, source in data.sources.items()]
    held_out = [open_source(name, source, held_out=True, **options) for name, source in data.validation.sources.items()]
    return sources, held_out


def build_stage_data(run: Run, sources: list[Source], held_out: list[Source], init_from: str | None) -> StageData:
    """Build the processor (tokenizer, chat template, tiling) and the data module of a stage. Reads no weights.

    Args:
        init_from: folder or hub id of a whole model; None: the parts that the settings name.
    """
    config = run.config
    spec = load_model_spec(resolve_tiny_parts(config), init_from, config.data.tiling)
    template_date, reason = resolve_template_date(run)
    processor = Processor(spec.tokenizer, spec.images, scaled_decode=config.data.scaled_decode, day=template_date)
    if processor.template.is_date_dependent:
        say(f"the chat template writes today's date; in all that this run reads it is {template_date}, {reason}")
    check_vocabulary(processor)
    datamodule = make_datamodule(run, processor, sources, held_out, spec)
    return StageData(run, sources, held_out, spec, datamodule)


def resolve_template_date(run: Run) -> tuple[date, str]:
    """Resolve the date for a chat template that writes today's date.

    The date stays the same when a run resumes, when it is trained after task=prepare, and when `data.lock` fixes it.

    Returns:
        The date, and the reason as text for the user.
    """
    config, reason = run.config, "as when it was first prepared (model.template_date=... sets another)"
    if config.model.template_date:
        return parse_day(config.model.template_date, "model.template_date"), "by model.template_date"
    manifests = [(read_manifest_or_empty(run.dir), reason), (read_lock_or_empty(run.dir / LOCK_FILE), reason)]
    if config.data.lock:
        manifests.insert(0, (read_lock_or_empty(config.data.lock), "as in data.lock"))
    for manifest, reason in manifests:
        if TEMPLATE_DATE_KEY in manifest:
            return parse_day(str(manifest[TEMPLATE_DATE_KEY]), TEMPLATE_DATE_KEY), reason
    return date.today(), "whatever the day on which it goes on (model.template_date=... sets another)"


def resolve_tiny_parts(config: RunConfig) -> ModelConfig:
    """Make the `tiny` parts and put their folders into the model's settings. UserError if they cannot be written."""
    model = config.model
    if "tiny" in (model.vision_tower, model.language_model):
        folder = Path(config.run_dir) / "parts"
        with handle_write_errors(folder, "The tiny model's parts", "run_dir"):
            vision_tower, language_model = make_tiny_parts(folder, config.seed)
        model.vision_tower = vision_tower if model.vision_tower == "tiny" else model.vision_tower
        model.language_model = language_model if model.language_model == "tiny" else model.language_model
    return model


def make_datamodule(
    run: Run, processor: Processor, sources: list[Source], held_out: list[Source], spec: ModelSpec
) -> DataModule:
    """Make the data module of a stage from the settings and the sources."""
    config = run.config
    data, trainer = config.data, config.trainer
    positions = spec.config.text_config.max_position_embeddings
    return DataModule(
        processor,
        sources,
        held_out or data.validation.fraction,
        global_batch_size=data.global_batch_size,
        global_batch_tokens=data.global_batch_tokens,
        tokens_per_micro_batch=data.tokens_per_micro_batch,
        tiles_per_micro_batch=data.tiles_per_micro_batch,
        max_length=min(data.max_length or positions, positions),
        on_overlong=data.on_overlong,
        mixture=make_mixture_settings(data),
        max_steps=get_max_steps(config),
        max_epochs=trainer.max_epochs,
        num_workers=data.num_workers,
        prefetch_factor=data.prefetch_factor,
        seed=config.seed,
        flops=make_flops(spec, config.stage),
        pin_memory=trainer.accelerator != "cpu" and torch.cuda.is_available(),
        overfit=config.debug is DebugMode.overfit,
        store=get_index_dir(config),
        index_workers=data.index_workers or os.cpu_count() or 1,
        ledger=run.dir / "ledger.jsonl",
        look_ahead=data.on_bad_record is OnBadRecord.quarantine,
    )


def get_max_steps(config: RunConfig) -> int | None:
    """Return the maximum number of optimizer steps; None: trainer.max_epochs decides."""
    if config.debug is DebugMode.fast:
        return DEBUG_FAST_STEPS
    if config.debug is DebugMode.profile:
        return min(DEBUG_PROFILE_STEPS, config.trainer.max_steps or DEBUG_PROFILE_STEPS)
    return config.trainer.max_steps


def make_mixture_settings(data: DataConfig) -> MixtureSettings:
    """Make the mixture settings: amount of each source, unit of the weights, temperature, target shares."""
    return MixtureSettings(
        {name: SourceAmount(source.weight, source.repeat, source.count) for name, source in data.sources.items()},
        weights_in=data.weights_in.value,
        temperature=data.temperature,
        share_ko=data.share.ko,
        share_text_only=data.share.text_only,
        share_kinds={SampleKind(name): share for name, share in data.share.kinds.items()},
    )


def make_flops(spec: ModelSpec, stage: StageConfig) -> Flops:
    """Make the FLOPs estimate of a sample for this model and these trainable parts."""
    trainable = {part.value for part in stage.trainable}
    return Flops.from_config(
        spec.config.to_dict(),
        trains_tower="vision_tower" in trainable,
        trains_language_model="language_model" in trainable,
    )


def resolve_init_from(run: Run) -> str | None:
    """Return the model to start from. None, with a report, if the previous stage has not been run yet."""
    folder = run.init_from and Path(run.init_from)
    if folder and folder.is_absolute() and not folder.is_dir():
        say(f"init_from: {folder} is not there yet; counted for the model's parts instead.")
        return None
    return run.init_from


def apply_quarantine(data: StageData) -> dict[str, int]:
    """Apply data.on_bad_record to the unusable records (quarantine or stop), and report length actions and unread keys.

    Returns:
        The number of unusable records of each source.
    """
    config, run = data.run.config.data, data.run
    if errors := find_image_root_errors(data.datamodule, config):
        raise UserError("\n".join(errors.values()))
    quarantine, totals = collect_quarantine(data.datamodule)
    if is_rank_zero():
        quarantine.apply_policy(config.on_bad_record, config.max_quarantined, totals, run.dir / "quarantine.jsonl")
    for line in list_overlong_actions(data.datamodule):
        say(line)
    for name, unread in count_unread_keys(data.datamodule).items():
        say(format_unused_keys(name, unread))
    ledger = data.datamodule.ledger
    if ledger:
        say(f"{len(ledger):,} that turned bad while training left out, see {ledger.path}")
    return quarantine.count_by_source()


def find_image_root_errors(datamodule: DataModule, data: DataConfig) -> dict[str, str]:
    """Find the sources of which nearly all images are missing: error message by the label of the source."""
    index, held_out = datamodule.index, datamodule.held_out
    assert index is not None and held_out is not None
    if not datamodule.has_own_validation:
        return find_missing_image_errors([index, held_out], data.sources)
    errors = find_missing_image_errors([index], data.sources)
    validation = data.validation.sources
    found = find_missing_image_errors([held_out], validation, "data.validation.sources")
    return errors | {f"{name} (validation)": error for name, error in found.items()}


def format_held_out_hint(num_samples: int) -> str:
    """Format the hint for a run of which no sample was held out: a fraction with which some would be."""
    return (
        f"No sample of {num_samples:,} was held out, so nothing says whether the model learned more than these."
        " data.validation.fraction=0.1 holds out a tenth."
    )


def list_overlong_actions(datamodule: DataModule) -> list[str]:
    """List what data.on_overlong did to samples above the token limit: one line for each source and action."""
    assert datamodule.index is not None and datamodule.held_out is not None
    descriptions = {
        "quarantine": "too long, set aside",
        "fewer_tiles": "too long, cut into fewer tiles",
        "cut_turn": "too long, without their last turns",
    }
    parts = (datamodule.index, *([datamodule.held_out] if datamodule.has_own_validation else []))
    actions = [
        (name, action, count) for part in parts for (name, action), count in sorted(part.length_policy_counts.items())
    ]
    return [f"{name}: {count:,} {descriptions[action]} (data.on_overlong)" for name, action, count in actions]


def count_unread_keys(datamodule: DataModule) -> dict[str, dict[str, int]]:
    """Count the records of each source that have keys which are not read: source -> key -> records."""
    assert datamodule.index is not None and datamodule.held_out is not None
    counts = dict(datamodule.index.unused_keys)
    if datamodule.has_own_validation:
        counts |= {f"{name} (validation)": unread for name, unread in datamodule.held_out.unused_keys.items()}
    return counts


def collect_quarantine(datamodule: DataModule) -> tuple[Quarantine, dict[str, int]]:
    """Collect the unusable records.

    The label " (validation)" separates a validation source from a training source of the same name.

    Returns:
        The quarantine, and the number of records of each source.
    """
    assert datamodule.index is not None and datamodule.held_out is not None
    parts = {"": datamodule.index}
    if datamodule.has_own_validation:
        parts[" (validation)"] = datamodule.held_out
    quarantine, totals = Quarantine(), dict[str, int]()
    for label, index in parts.items():
        totals |= {f"{source.name}{label}": len(source) for source in index.sources}
        for name, error in index.errors:
            quarantine.add(f"{name}{label}", error)
    return quarantine, totals


def require_record_type(stage: StageConfig, datamodule: DataModule) -> None:
    """Require preference pairs for dpo and conversations for the other stages. With format=auto only the files show the type.

    Raises:
        UserError: with the sources that hold the wrong type.
    """
    assert datamodule.index is not None and datamodule.held_out is not None
    is_dpo, wrong_sources = stage.name is StageName.dpo, set()
    for index in (datamodule.index, datamodule.held_out):
        wrong_sources |= {
            index.sources[number].name for number in set(index.source_ids[(index.chosen > 0) != is_dpo].tolist())
        }
    names = ", ".join(sorted(wrong_sources))
    if wrong_sources and is_dpo:
        raise UserError(
            f"data.sources: {names}: no preference pairs, and stage=dpo needs them; choose data=preference."
        )
    if wrong_sources:
        raise UserError(
            f"data.sources: {names}: preference pairs, which stage={stage.name.value} cannot use; choose other data or dpo."
        )
