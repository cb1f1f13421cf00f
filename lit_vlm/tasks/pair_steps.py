"""Steps of a stage of image-text pairs that differ from those of the other stages. `train_pairs.py` calls them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, cast

import lightning as L
import numpy as np
import torch
from rich.table import Table

from callbacks import Heartbeat, Report
from callbacks.captions import Captions, PairExport, ValidationPulse
from lit_vlm.checkpoint.index import RunFingerprint
from lit_vlm.config.choices import DEBUG_FAST_STEPS, DebugMode
from lit_vlm.config.pair_stages import PairStageConfig
from lit_vlm.config.schema import DataConfig, StageConfig, TrainerConfig, ValidationConfig
from lit_vlm.data.augmentation import Augmentation
from lit_vlm.data.index.sample_index import SampleIndex
from lit_vlm.data.pair_data import PairDataModule, PairProcessor
from lit_vlm.formatting import format_count
from lit_vlm.runs.run_folder import RunFolder, extract_identity
from lit_vlm.tasks.open_run import RunPlace, Sources
from lit_vlm.tasks.pair_models import PairModel, PairParts, build_pair_model, resolve_pair_parts
from lit_vlm.tasks.prepare_data import (
    StageData,
    apply_quarantine,
    build_indexes,
    get_max_steps,
    make_mixture_settings,
)
from lit_vlm.tasks.terminal import console, say
from lit_vlm.tasks.train_steps import PreparedData
from lit_vlm.types import RecordError, UserError

CHAT_CALLBACKS = ("export", "samples", "language_loss")  # they need a model that answers prompts
MAX_CHECKED_TEXTS = 256  # texts of a source whose unknown tokens are counted
MAX_UNKNOWN = 0.1  # share of unknown tokens above which the tokenizer does not know the language


def prepare_pair_data(
    place: RunPlace,
    sources: Sources,
    parts: PairParts,
    data: DataConfig,
    stage: StageConfig,
    trainer: TrainerConfig,
    *,
    seed: int,
    debug: DebugMode | None,
) -> PreparedData:
    """Index the pairs, put unusable records into quarantine, and check that steps can be made of them.

    Raises:
        UserError: records that cannot be used, or too few or only equal pairs.
    """
    assert isinstance(stage, PairStageConfig)
    module = PairDataModule(
        PairProcessor(parts.tokenizer, parts.tokenize, parts.image_size),
        sources.training,
        sources.validation or data.validation.fraction,
        num_workers=data.num_workers,
        prefetch_factor=data.prefetch_factor,
        pin_memory=trainer.accelerator != "cpu" and torch.cuda.is_available(),
        augmentation=Augmentation(stage.min_crop_area, stage.random_flips, stage.rand_augment),
        global_batch_size=data.global_batch_size,
        mixture=make_mixture_settings(data),
        max_steps=get_max_steps(trainer.max_steps, debug),
        max_epochs=trainer.max_epochs,
        seed=seed,
        store=place.index_dir,
        index_workers=data.index_workers or os.cpu_count() or 1,
        ledger=place.dir / "ledger.jsonl",
    )
    stage_data = StageData(sources, cast(Any, parts), cast(Any, module))
    indexes = build_indexes(module)
    quarantined = apply_quarantine(module, indexes, data, place.dir)
    require_pairs(indexes.training, data.global_batch_size, stage)
    require_known_texts(indexes.training, parts)
    return PreparedData(stage_data, indexes, quarantined, indexes.training.compute_image_digest())


def require_pairs(index: SampleIndex, global_batch_size: int, stage: PairStageConfig) -> None:
    """Require a step's number of pairs, and different ones where a loss compares them.

    Raises:
        UserError: there are too few, or all have one image or one text.
    """
    if len(index) < global_batch_size:
        raise UserError(
            f"data.global_batch_size={global_batch_size:,}: the sources have {format_count(len(index), 'usable pair')}, so a step would read"
            f" pairs twice. Lower it to {len(index):,} or less, or add data."
        )
    if stage.HAS_NEGATIVES and len(np.unique(index.group)) < 2:
        raise UserError(
            "data.sources: all pairs have one image, and image-text matching needs a negative for each pair. Add other images."
        )


def require_known_texts(index: SampleIndex, parts: PairParts) -> None:
    """Require that the tokenizer knows the texts of each source, looking at some of them.

    Raises:
        UserError: too many of a source's tokens are unknown.
    """
    tokenizer: Any = parts.tokenizer
    if tokenizer.unk_token_id is None:
        return
    for number, source in enumerate(index.sources):
        samples = index.find_source_samples(number)[:MAX_CHECKED_TEXTS]
        texts = [record.messages[-1].text for record in _read_records(index, samples)]
        tokens = (
            [token for ids in tokenizer(texts, add_special_tokens=False)["input_ids"] for token in ids] if texts else []
        )
        unknown = tokens.count(tokenizer.unk_token_id) / max(1, len(tokens))
        if unknown > MAX_UNKNOWN:
            raise UserError(
                f"data.sources.{source.name}: {unknown:.0%} of the tokens of its texts are unknown to the tokenizer of"
                f" {parts.text_encoder or parts.language_model or parts.whole}. Choose one that knows the language, e.g. klue/bert-base"
                " for Korean or google-bert/bert-base-multilingual-cased."
            )


def _read_records(index: SampleIndex, samples: np.ndarray) -> list[Any]:
    """Read records; those that cannot be read now are reported when they are trained on."""
    records = []
    for sample in samples.tolist():
        try:
            records.append(index.get_record(sample))
        except RecordError:
            continue
    return records


def build_pair_stage(
    parts: PairParts, prepared: PreparedData, stage: StageConfig, trainer: TrainerConfig, *, seed: int
) -> PairModel:
    """Build the stage with its weights.

    Raises:
        UserError: the parts do not fit together, or weights cannot be read.
    """
    assert isinstance(stage, PairStageConfig)
    plan = prepared.stage_data.training_data.make_plan(trainer.devices * trainer.num_nodes)
    batch_size = plan.global_batch_size or 0
    steps_per_epoch = max(1, round(plan.mixture.epoch_length / batch_size))
    return build_pair_model(parts, stage, plan.num_steps, batch_size, steps_per_epoch, seed)


def make_pair_fingerprint(folder: RunFolder, parts: PairParts, prepared: PreparedData) -> RunFingerprint:
    """Make the fingerprint that ties a checkpoint to this run."""
    manifest = folder.manifest
    return RunFingerprint(
        stage=manifest["stage"],
        settings=extract_identity(manifest["config"]),
        data=manifest["data"]["digest"],
        parent=parts.compute_parent_digest((manifest["parent"] or {}).get("digest") or ""),
        processor=prepared.stage_data.training_data.processor.digest,
        pictures=prepared.image_digest,
    )


def drop_chat_callbacks(chosen: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Drop the callbacks of models that answer prompts; `add_pair_callbacks` adds those in their place."""
    return {name: arguments for name, arguments in chosen.items() if name not in CHAT_CALLBACKS}


def get_max_captions(
    chosen: Mapping[str, Any], stage: StageConfig, validation: ValidationConfig, debug: DebugMode | None
) -> int | None:
    """Return the maximum number of captions that are scored, for each kind and language; None: the stage writes none."""
    if "samples" not in chosen or not (isinstance(stage, PairStageConfig) and stage.WRITES_CAPTIONS):
        return None
    return DEBUG_FAST_STEPS if debug is DebugMode.fast else validation.max_samples


def add_pair_callbacks(
    callbacks: list[L.Callback], place: RunPlace, model: PairModel, *, max_captions: int | None, export: bool
) -> list[L.Callback]:
    """Add export and captions before the report, which shows what they write."""
    own: list[L.Callback] = [ValidationPulse()]
    own += [PairExport(place.dir, model.save)] if export else []
    own += [Captions(place.dir, max_captions)] if max_captions is not None else []
    position = next(number for number, one in enumerate(callbacks) if isinstance(one, Report | Heartbeat))
    return [*callbacks[:position], *own, *callbacks[position:]]


def list_pair_remarks(prepared: PreparedData, parts: PairParts) -> list[str]:
    """List what is remarkable about the data: texts that are as long as the limit, and equal images."""
    index = prepared.indexes.training
    remarks = [f"images of {parts.image_size} pixels"]
    longest = int(index.tokens.max())
    _, mask = parts.tokenize(["a"])
    if mask.shape[1] == longest:  # all texts are padded to one length, and the longest one fills it
        cut = int((index.tokens == longest).sum())
        remarks.append(f"{format_count(cut, 'text')} of {len(index):,} fill stage.max_text_tokens and may be cut")
    images = len(np.unique(index.group))
    if images < len(index):
        remarks.append(f"{images:,} different images; pairs of one image are no negatives of each other")
    return remarks


def show_preflight(
    place: RunPlace, prepared: PreparedData, parts: PairParts, stage: StageConfig, trainer: TrainerConfig
) -> None:
    """Show records, batches and parts of a stage that could train."""
    index, held_out = prepared.indexes.training, prepared.indexes.held_out
    world_size = trainer.devices * trainer.num_nodes
    plan = prepared.stage_data.training_data.make_plan(world_size)
    table = Table(title=f"{place.name}: image-text pairs", title_justify="left")
    for heading in ("source", "records", "usable", "set aside"):
        table.add_column(heading, justify="left" if heading == "source" else "right")
    for number, source in enumerate(index.sources):
        usable = len(index.find_source_samples(number))
        usable += 0 if prepared.indexes.has_own_validation else len(held_out.find_source_samples(number))
        aside = prepared.quarantined.get(source.name, 0)
        table.add_row(source.name, f"{len(source):,}", f"{usable:,}", f"{aside:,}")
    console.print(table)
    for name in ("whole", "vision_tower", "text_encoder", "language_model"):
        if value := getattr(parts, name):
            say(f"{name.replace('_', ' ').replace('whole', 'starts from')}: {value}")
    for remark in list_pair_remarks(prepared, parts):
        say(remark)
    assert plan.global_batch_size is not None
    negatives = (
        f", {plan.global_batch_size - 1:,} others for each pair to compare with"
        if getattr(stage, "HAS_NEGATIVES", False)
        else ""
    )
    say(
        f"{format_count(plan.num_steps, 'step')} of {format_count(plan.global_batch_size, 'pair')}{negatives}, on"
        f" {format_count(world_size, 'rank')}; {format_count(len(held_out), 'pair')} held out"
    )
    say(f"{place.name} can train: all checks that training makes before its first step passed")


__all__ = [
    "add_pair_callbacks",
    "build_pair_stage",
    "drop_chat_callbacks",
    "get_max_captions",
    "list_pair_remarks",
    "make_pair_fingerprint",
    "prepare_pair_data",
    "resolve_pair_parts",
    "show_preflight",
]
