"""Data side of one stage, shared by train, prepare, preflight and prefer: from the settings to the indexes."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any, Generic, TypeVar

from lit_vlm.config.choices import DEBUG_FAST_STEPS, DEBUG_PROFILE_STEPS, DebugMode, StageName
from lit_vlm.config.schema import DataConfig, ModelConfig, StageConfig, TrainerConfig
from lit_vlm.cost import Flops
from lit_vlm.data.index.sample_index import SampleIndex
from lit_vlm.data.packing.mixture import MixtureSettings, SourceAmount
from lit_vlm.data.packing.mixture_lock import LOCK_FILE, TEMPLATE_DATE_KEY, read_lock_or_empty
from lit_vlm.data.processor import Processor, check_vocabulary
from lit_vlm.data.quarantine import Quarantine, find_missing_image_errors, format_unused_keys
from lit_vlm.data.template_date import parse_day
from lit_vlm.data.training_data import TrainingData
from lit_vlm.files import handle_write_errors
from lit_vlm.model.spec import ModelSpec
from lit_vlm.model.tiny import make_tiny_parts
from lit_vlm.runs.run_folder import is_rank_zero, read_manifest_or_empty
from lit_vlm.tasks.open_run import RunPlace, Sources
from lit_vlm.tasks.terminal import say
from lit_vlm.types import SampleKind, UserError

Data = TypeVar("Data", bound=TrainingData)


@dataclass(frozen=True, slots=True)
class StageData(Generic[Data]):
    """Data of one stage, not read yet, and the spec of the model that they are tokenized for."""

    sources: Sources
    spec: ModelSpec
    training_data: Data


@dataclass(frozen=True, slots=True)
class Indexes:
    """Indexes of the training and the held-out samples, with the records that cannot be used.

    Attributes:
        has_own_validation: the held-out samples come from separate sources, whose names may equal those of training sources.
    """

    training: SampleIndex
    held_out: SampleIndex
    has_own_validation: bool

    @property
    def parts(self) -> dict[str, SampleIndex]:
        """Index of each group of sources, by the label that its names get in messages."""
        own = {" (validation)": self.held_out} if self.has_own_validation else {}
        return {"": self.training, **own}


def build_stage_data(
    place: RunPlace,
    sources: Sources,
    spec: ModelSpec,
    *,
    template_date: str | None,
    data: DataConfig,
    stage: StageConfig,
    trainer: TrainerConfig,
    seed: int,
    debug: DebugMode | None,
    make: Callable[..., Data],
) -> StageData[Data]:
    """Build the processor (tokenizer, chat template, tiling) and the training data of a stage. Reads no weights and no records.

    Args:
        make: `make_training_data`, or a function with the same arguments.
    """
    day, reason = resolve_template_date(template_date, place.dir, data.lock)
    processor = Processor(spec.tokenizer, spec.images, scaled_decode=data.scaled_decode, day=day)
    if processor.template.is_date_dependent:
        say(f"the chat template writes today's date; in all that this run reads it is {day}, {reason}")
    check_vocabulary(processor)
    made = make(place, sources, spec, processor, data=data, stage=stage, trainer=trainer, seed=seed, debug=debug)
    return StageData(sources, spec, made)


def build_indexes(
    training_data: TrainingData, *, recheck: bool = False, on_progress: Callable[[str, int, int], None] | None = None
) -> Indexes:
    """Build the indexes, see `TrainingData.build_indexes`, or return those that are built already."""
    training_data.build_indexes(recheck=recheck, on_progress=on_progress)
    training, held_out = training_data.index, training_data.held_out
    assert training is not None and held_out is not None
    return Indexes(training, held_out, training_data.has_own_validation)


def resolve_template_date(template_date: str | None, run_dir: Path, lock: str | None) -> tuple[date, str]:
    """Resolve the date for a chat template that writes today's date.

    The date stays the same when a run resumes, when it is trained after task=prepare, and when `data.lock` fixes it.

    Args:
        template_date: model.template_date.
        lock: data.lock.

    Returns:
        The date, and the reason as text for the user.
    """
    reason = "as when it was first prepared (model.template_date=... sets another)"
    if template_date:
        return parse_day(template_date, "model.template_date"), "by model.template_date"
    manifests = [(read_manifest_or_empty(run_dir), reason), (read_lock_or_empty(run_dir / LOCK_FILE), reason)]
    if lock:
        manifests.insert(0, (read_lock_or_empty(lock), "as in data.lock"))
    for manifest, reason in manifests:
        if TEMPLATE_DATE_KEY in manifest:
            return parse_day(str(manifest[TEMPLATE_DATE_KEY]), TEMPLATE_DATE_KEY), reason
    return date.today(), "also when it resumes on another day (model.template_date=... sets another)"


def resolve_tiny_parts(model: ModelConfig, parts_dir: Path, seed: int) -> ModelConfig:
    """Make the parts that are `tiny`; return the settings with their folders. UserError if they cannot be written."""
    if "tiny" not in (model.vision_tower, model.language_model):
        return model
    with handle_write_errors(parts_dir, "The tiny model's parts", "run_dir"):
        vision_tower, language_model = make_tiny_parts(parts_dir, seed)
    return replace(
        model,
        vision_tower=vision_tower if model.vision_tower == "tiny" else model.vision_tower,
        language_model=language_model if model.language_model == "tiny" else model.language_model,
    )


def make_training_data(
    place: RunPlace,
    sources: Sources,
    spec: ModelSpec,
    processor: Processor,
    *,
    data: DataConfig,
    stage: StageConfig,
    trainer: TrainerConfig,
    seed: int,
    debug: DebugMode | None,
) -> TrainingData:
    """Make the training data of a stage from the settings and the sources, without loaders."""
    return TrainingData(
        processor,
        sources.training,
        sources.validation or data.validation.fraction,
        **make_planning_options(place, spec, data=data, stage=stage, trainer=trainer, seed=seed, debug=debug),
    )


def make_planning_options(
    place: RunPlace,
    spec: ModelSpec,
    *,
    data: DataConfig,
    stage: StageConfig,
    trainer: TrainerConfig,
    seed: int,
    debug: DebugMode | None,
) -> dict[str, Any]:
    """Make the keyword arguments of `TrainingData` from the settings."""
    positions = spec.config.text_config.max_position_embeddings
    return {
        "global_batch_size": data.global_batch_size,
        "global_batch_tokens": data.global_batch_tokens,
        "tokens_per_micro_batch": data.tokens_per_micro_batch,
        "tiles_per_micro_batch": data.tiles_per_micro_batch,
        "max_length": min(data.max_length or positions, positions),
        "on_overlong": data.on_overlong,
        "mixture": make_mixture_settings(data),
        "max_steps": get_max_steps(trainer.max_steps, debug),
        "max_epochs": trainer.max_epochs,
        "seed": seed,
        "flops": make_flops(spec, stage),
        "overfit": debug is DebugMode.overfit,
        "store": place.index_dir,
        "index_workers": data.index_workers or os.cpu_count() or 1,
        "ledger": place.dir / "ledger.jsonl",
    }


def get_max_steps(max_steps: int | None, debug: DebugMode | None) -> int | None:
    """Return the maximum number of optimizer steps; None: trainer.max_epochs decides."""
    if debug is DebugMode.fast:
        return DEBUG_FAST_STEPS
    if debug is DebugMode.profile:
        return min(DEBUG_PROFILE_STEPS, max_steps or DEBUG_PROFILE_STEPS)
    return max_steps


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


def apply_quarantine(training_data: TrainingData, indexes: Indexes, data: DataConfig, run_dir: Path) -> dict[str, int]:
    """Apply data.on_bad_record to the unusable records (quarantine or stop), and report length actions and unread keys.

    Returns:
        The number of unusable records of each source.
    """
    if errors := find_image_root_errors(indexes, data):
        raise UserError("\n".join(errors.values()))
    quarantine, totals = collect_quarantine(indexes)
    if is_rank_zero():
        quarantine.apply_policy(data.on_bad_record, data.max_quarantined, totals, run_dir / "quarantine.jsonl")
    for line in list_overlong_actions(indexes):
        say(line)
    for name, unread in count_unread_keys(indexes).items():
        say(format_unused_keys(name, unread))
    ledger = training_data.ledger
    if ledger:
        say(f"{len(ledger):,} that turned bad while training left out, see {ledger.path}")
    return quarantine.count_by_source()


def find_image_root_errors(indexes: Indexes, data: DataConfig) -> dict[str, str]:
    """Find the sources of which nearly all images are missing: error message by the label of the source."""
    if not indexes.has_own_validation:
        return find_missing_image_errors([indexes.training, indexes.held_out], data.sources)
    errors = find_missing_image_errors([indexes.training], data.sources)
    validation = data.validation.sources
    found = find_missing_image_errors([indexes.held_out], validation, "data.validation.sources")
    return errors | {f"{name} (validation)": error for name, error in found.items()}


def format_held_out_hint(num_samples: int) -> str:
    """Format the hint for a run of which no sample was held out: a fraction with which some would be."""
    return (
        f"No sample of {num_samples:,} was held out, so nothing says whether the model learned more than these."
        " data.validation.fraction=0.1 holds out a tenth."
    )


def list_overlong_actions(indexes: Indexes) -> list[str]:
    """List what data.on_overlong did to samples above the token limit: one line for each source and action."""
    descriptions = {
        "quarantine": "too long, set aside",
        "fewer_tiles": "too long, cut into fewer tiles",
        "cut_turn": "too long, without their last turns",
    }
    actions = [
        (name, action, count)
        for index in indexes.parts.values()
        for (name, action), count in sorted(index.length_policy_counts.items())
    ]
    return [f"{name}: {count:,} {descriptions[action]} (data.on_overlong)" for name, action, count in actions]


def count_unread_keys(indexes: Indexes) -> dict[str, dict[str, int]]:
    """Count the records of each source that have keys which are not read: source -> key -> records."""
    return {
        f"{name}{label}": unread for label, index in indexes.parts.items() for name, unread in index.unused_keys.items()
    }


def collect_quarantine(indexes: Indexes) -> tuple[Quarantine, dict[str, int]]:
    """Collect the unusable records.

    The label " (validation)" separates a validation source from a training source of the same name.

    Returns:
        The quarantine, and the number of records of each source.
    """
    quarantine, totals = Quarantine(), dict[str, int]()
    for label, index in indexes.parts.items():
        totals |= {f"{source.name}{label}": len(source) for source in index.sources}
        for name, error in index.errors:
            quarantine.add(f"{name}{label}", error)
    return quarantine, totals


def require_record_type(stage: StageName, indexes: Indexes) -> None:
    """Require preference pairs for dpo and conversations for the other stages. With format=auto only the files show the type.

    Raises:
        UserError: with the sources that hold the wrong type.
    """
    is_dpo, wrong_sources = stage is StageName.dpo, set()
    for index in (indexes.training, indexes.held_out):
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
            f"data.sources: {names}: preference pairs, which stage={stage.value} cannot use; choose other data or dpo."
        )
