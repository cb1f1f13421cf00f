"""Measures the model of a stage on torch's `meta` device: parameters, shapes, adapters, frozen parts; no weights, no memory."""

from __future__ import annotations

import copy
import hashlib
import json
import warnings
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from lit_vlm.config.schema import StageConfig
from lit_vlm.cost import MicroBatchSize, ParameterCounts
from lit_vlm.files import handle_write_errors, read_json_or_none, write_json
from lit_vlm.model.parts import PartSummary, get_part, summarize_parts
from lit_vlm.model.spec import ModelSpec
from lit_vlm.reports.preflight.facts import PlanFacts
from lit_vlm.runs.run_folder import to_plain
from lit_vlm.types import ModelPart

if TYPE_CHECKING:
    from lit_vlm.model.classes import VisionLanguageModel

_LAYOUT_VERSION = 1  # increase it when the measured numbers change


@dataclass(frozen=True, slots=True)
class MeasuredModel:
    """Numbers of parameters of a stage's model, by use and by part, and its config."""

    parameters: ParameterCounts
    part_summary: list[PartSummary]
    model_config: dict[str, Any]


def load_or_measure(spec: ModelSpec, config: StageConfig, *, seed: int, folder: Path) -> MeasuredModel:
    """Load the measurement of this model and stage from a cache folder, or measure the model and save the result.

    The classes of the model take some seconds of CPU time to import; a second preflight does without them.

    Raises:
        UserError: see `measure_model`; or the cache folder is not writable.
    """
    facts = [
        _LAYOUT_VERSION,
        {name: version(name) for name in ("torch", "transformers", "peft")},
        spec.config.to_dict(),
        [len(spec.tokenizer), spec.new_tokens, spec.special_tokens],
        to_plain(asdict(config)),
        seed,
    ]
    text = json.dumps(facts, sort_keys=True, default=str)
    path = folder / "models" / f"{hashlib.sha256(text.encode()).hexdigest()}.json"
    try:
        found = read_json_or_none(path)
        parts = [PartSummary(**part) for part in found["part_summary"]]
        return MeasuredModel(ParameterCounts(**found["parameters"]), parts, found["model_config"])
    except (TypeError, KeyError):  # not there, or not whole
        measured = measure_model(spec, config, seed=seed)
    with handle_write_errors(path.parent, "The measured model", "data.index_dir"):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, to_plain(asdict(measured)), durable=False)
    return measured


def measure_model(spec: ModelSpec, config: StageConfig, *, seed: int) -> MeasuredModel:
    """Build the stage's model on torch's `meta` device, prepare it for training, and count its parameters.

    A reference model from another folder is not loaded: it is as large as the model itself, and only its size matters.

    Raises:
        UserError: the settings contradict each other.
    """
    # late: transformers' model classes
    from lit_vlm.model.skeleton import build_on_meta
    from lit_vlm.model.trained_parts import copy_reference_model, prepare_parts, require_frozen_tower

    if config.cache_features:
        require_frozen_tower([ModelPart(name) for name in config.trainable])
    model_config = copy.deepcopy(spec.config)
    model_config.text_config.vocab_size = max(model_config.text_config.vocab_size, len(spec.tokenizer))
    model = build_on_meta(model_config)
    ids = spec.tokenizer.convert_tokens_to_ids
    is_same_size = config.has_reference_model and bool(config.model_folders)
    reference = model if is_same_size else copy_reference_model(model, config)
    with warnings.catch_warnings(action="ignore"):  # transformers' warnings about its own names
        methods = prepare_parts(
            model, config, new_ids=ids(spec.new_tokens), special_ids=ids(spec.special_tokens), seed=seed
        )
    return MeasuredModel(
        count_parameters(model, reference, config), summarize_parts(model, methods), model.config.to_dict()
    )


def count_parameters(
    model: VisionLanguageModel,
    reference: VisionLanguageModel | None,
    config: StageConfig,
) -> ParameterCounts:
    """Count the parameters for the memory estimate: all, trainable, cast by autocast, frozen matrices, reference model.

    Args:
        reference: reference model of a preference stage that is held in memory in addition to the model: a copy, or the
            model of another folder, which is as large as this one. None under LoRA, or if its log-probabilities are cached.
    """
    from lit_vlm.model.skeleton import list_frozen_matrices, list_matrices

    autocast_parts = [part for part in ModelPart if part is not ModelPart.vision_tower or part in config.trainable]
    linear = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and get_part(f"{name}.") in autocast_parts
    ]
    cast = {id(p): p for _, module in linear for p in module.parameters(recurse=False)}
    frozen = list_frozen_matrices(model)
    layers: Any = model.model.language_model.layers
    return ParameterCounts(
        total=sum(p.numel() for p in model.parameters()),
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        autocast=sum(p.numel() for p in cast.values()),
        autocast_frozen=sum(p.numel() for p in cast.values() if not p.requires_grad),
        frozen_matrices=sum(p.numel() for p in frozen),
        autocast_frozen_matrices=sum(p.numel() for p in frozen if id(p) in cast),
        reference=sum(p.numel() for p in reference.parameters()) if reference else 0,
        reference_matrices=sum(p.numel() for p in list_matrices(reference)) if reference else 0,
        largest_layer=max(sum(p.numel() for p in layers[0].parameters()), model.lm_head.weight.numel()),
    )


def get_largest_micro_batch(plan: PlanFacts) -> MicroBatchSize:
    """Return the size of the plan's largest micro-batch."""
    return MicroBatchSize(round(plan.pack_tokens.most), round(plan.pack_tiles.most), plan.most_supervised)
