"""Validation of the stages' own settings, such as those that TRL's preference losses reject, and of settings without effect."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

from lit_vlm.anyres import Tiling
from lit_vlm.config.choices import Format, StrategyName
from lit_vlm.config.mapping import MappingConfig, RegionTask
from lit_vlm.config.schema import DataConfig, DPOStageConfig, RunConfig, SourceConfig, StageConfig
from lit_vlm.formatting import format_count
from lit_vlm.losses.loss_types import (
    F_DIVERGENCE,
    LABEL_SMOOTHING,
    PREFERENCE_LOSSES,
    find_sorting_losses,
    list_losses_with,
)
from lit_vlm.types import find_nearest, format_suggestion

F_DIVERGENCE_TYPES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")


def find_preference_loss_errors(stage: DPOStageConfig) -> Iterator[str]:
    """Yield an error message for each setting with which TRL cannot compute the loss as intended."""
    names = stage.loss_type
    if not names:
        yield "stage.loss_type: is empty; name a loss, e.g. [sigmoid]."
    for name in names:
        if name not in PREFERENCE_LOSSES:
            detail = format_suggestion(find_nearest(name, list(PREFERENCE_LOSSES)))
            yield f"stage.loss_type: there is no loss {name}; there are {', '.join(PREFERENCE_LOSSES)}.{detail}"
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        yield f"stage.loss_type: names {', '.join(repeated)} twice; give it one weight in loss_weights."
    weights = stage.loss_weights
    if weights is not None and len(weights) != len(names):
        detail = f"{format_count(len(weights), 'weight')} for {format_count(len(names), 'loss', 'losses')}"
        yield f"stage.loss_weights: {detail}; give one for each of loss_type."
    elif weights and not any(weights):
        yield "stage.loss_weights: every weight is 0, so nothing would be learnt."
    if "exo_pair" in names and stage.label_smoothing == 0:
        yield "stage.label_smoothing: must be above 0 for loss_type=exo_pair, found 0; its paper takes 1e-3."
    smoothing_losses = list_losses_with(LABEL_SMOOTHING)
    if stage.label_smoothing and not set(names) & set(smoothing_losses):
        yield (
            f"stage.label_smoothing: has no effect on stage.loss_type={names}; in this TRL {', '.join(smoothing_losses)} look at it."
            " For a DPO loss with flipped labels take loss_type=[robust]."
        )
    yield from _find_divergence_errors(stage)
    yield from _find_weighting_errors(stage)


# Checks of the settings of a stage with a config class of its own
_STAGE_CONFIG_CHECKS: dict[type[StageConfig], Callable[[Any], Iterator[str]]] = {
    DPOStageConfig: find_preference_loss_errors
}


def find_stage_config_errors(stage: StageConfig) -> Iterator[str]:
    """Yield an error message for each invalid setting that only this stage's config class has."""
    if check := _STAGE_CONFIG_CHECKS.get(type(stage)):
        yield from check(stage)


def _find_divergence_errors(stage: DPOStageConfig) -> Iterator[str]:
    divergence = stage.f_divergence_type
    if divergence not in F_DIVERGENCE_TYPES:
        suggestion = format_suggestion(find_nearest(divergence, F_DIVERGENCE_TYPES))
        yield f"stage.f_divergence_type: expected one of {', '.join(F_DIVERGENCE_TYPES)}, found {divergence}.{suggestion}"
        return
    supported = list_losses_with(F_DIVERGENCE)
    unsupported = [name for name in stage.loss_type if name in PREFERENCE_LOSSES and name not in supported]
    if divergence != "reverse_kl" and unsupported:
        yield (
            f"stage.f_divergence_type: {divergence} is defined for {', '.join(supported)}, not for {', '.join(unsupported)}."
            " Leave it at reverse_kl, or take other losses."
        )


def _find_weighting_errors(stage: DPOStageConfig) -> Iterator[str]:
    own = [name for name in stage.loss_type if name in PREFERENCE_LOSSES and PREFERENCE_LOSSES[name].compute]
    if own and stage.ld_alpha is not None:
        yield f"stage.ld_alpha: applies to losses of TRL, not to {', '.join(own)}. Leave one of them out."
    if not stage.use_weighting:
        return
    if own:
        yield f"stage.use_weighting: applies to losses of TRL, not to {', '.join(own)}. Leave one of them out."
    sorting = find_sorting_losses(stage.loss_type)
    if sorting:
        yield (
            f"stage.use_weighting: WPO weights pairs, and {', '.join(sorting)} sorts the pairs' scores, so the weights would fall on"
            " other pairs. Leave one of them out."
        )
    if "sft" in stage.loss_type:
        yield (
            "stage.use_weighting: WPO weights pairs, and the loss type sft has none: TRL cannot compute the two together."
            " Leave one of them out."
        )


_GENERATED_FORMATS = (Format.builtin, Format.digits)
_DEFAULT_SOURCE = SourceConfig()
_DEFAULT_MAPPING = MappingConfig()
# Setting of a mapping -> settings that have no effect without it.
_DEPENDENT_SETTINGS = {
    "regions": ("text", "box", "size", "keep", "skip", "task", "box_format", "box_unit", "box_frame"),
    "join": ("join_item", "join_record"),
}
# Setting -> formats for which it has no effect, and the reason. Descriptive settings of a source (licence, ...) are only
# shown and never checked.
_UNUSED_BY_FORMAT: dict[str, tuple[tuple[Format, ...], str]] = {
    "path": ((Format.digits,), "its pictures are scikit-learn's"),
    "image_root": ((*_GENERATED_FORMATS, Format.webdataset), "its pictures do not lie in files of their own"),
    "hub": ((*_GENERATED_FORMATS, Format.mapped, Format.webdataset), "it is read from path"),
    "columns": ((*_GENERATED_FORMATS, Format.mapped), "its records have no columns of yours"),
    "hub_config": (_GENERATED_FORMATS, "its records are made"),
    "split": (_GENERATED_FORMATS, "it holds out records of its own"),
    "revision": (_GENERATED_FORMATS, "its records are made"),
    "prompts": (_GENERATED_FORMATS, "its records ask already"),
    "kind": ((Format.builtin,), "path says the kind"),
    "markup": (_GENERATED_FORMATS, "its control tokens are none of its text"),
    "marks": (_GENERATED_FORMATS, "its texts are made"),
    "hard": (
        tuple(one for one in Format if one is not Format.builtin),
        "pictures are made larger for format=builtin alone",
    ),
}


def find_unused_data_settings(data: DataConfig) -> Iterator[str]:
    """Yield an error message for each data setting that has no effect, with the reason."""
    for table, sources in (("data.sources", data.sources), ("data.validation.sources", data.validation.sources)):
        for name, source in sources.items():
            yield from _find_unused_source_settings(f"{table}.{name}", source, data)
    for name, source in data.validation.sources.items():
        for setting in ("weight", "repeat", "count"):
            if getattr(source, setting) is not None:
                reason = "each of its records is read once, whatever the others hold"
                yield _format_unused_setting(f"data.validation.sources.{name}.{setting}", reason)
    default = DataConfig()
    if data.validation.sources and data.validation.fraction not in (0, default.validation.fraction):
        yield _format_unused_setting(
            "data.validation.fraction", "data.validation.sources are held out, and nothing else"
        )


def find_unused_stage_settings(config: RunConfig) -> Iterator[str]:
    """Yield an error message for each setting of the loss and the strategy that has no effect because of another setting."""
    stage, trainer, default = config.stage, config.trainer, DPOStageConfig()
    if isinstance(stage, DPOStageConfig):
        if stage.discopop_tau != default.discopop_tau and "discopop" not in stage.loss_type:
            yield _format_unused_setting("stage.discopop_tau", "stage.loss_type names no discopop")
        uses_alpha_divergence = stage.f_divergence_type == "alpha_divergence"
        if stage.f_alpha_divergence_coef != default.f_alpha_divergence_coef and not uses_alpha_divergence:
            yield _format_unused_setting(
                "stage.f_alpha_divergence_coef", "stage.f_divergence_type is not alpha_divergence"
            )
    if trainer.shard_size is not None and trainer.strategy not in (StrategyName.hsdp, StrategyName.auto):
        yield _format_unused_setting(
            "trainer.shard_size", f"trainer.strategy={trainer.strategy.value} has no groups; hsdp has"
        )


def _find_unused_source_settings(key: str, source: SourceConfig, data: DataConfig) -> Iterator[str]:
    changed = {
        field.name for field in fields(source) if getattr(source, field.name) != getattr(_DEFAULT_SOURCE, field.name)
    }
    for setting, (formats, reason) in _UNUSED_BY_FORMAT.items():
        if setting in changed and source.format in formats:
            yield _format_unused_setting(f"{key}.{setting}", f"format={source.format}: {reason}")
    if source.hub is None and source.format not in _GENERATED_FORMATS:
        for setting in sorted({"hub_config", "revision"} & changed):
            yield _format_unused_setting(f"{key}.{setting}", "it is of a dataset of the hub, and hub is not set")
    if "max_tiles" in changed and data.tiling is Tiling.base:
        yield _format_unused_setting(f"{key}.max_tiles", "data.tiling=base cuts no picture into tiles")
    mapping = source.mapping if source.format == Format.mapped else None
    if mapping is None:
        return
    if mapping.labels is None and "image_root" in changed:
        yield _format_unused_setting(
            f"{key}.image_root", "with mapping.labels=null the pictures are the records and lie in path"
        )
    has_question = mapping.questions or (mapping.regions is not None and mapping.task is not RegionTask.referring)
    if has_question and "prompts" in changed:
        yield _format_unused_setting(f"{key}.prompts", "mapping asks a question of each record already")
    for owner, settings in _DEPENDENT_SETTINGS.items():
        if getattr(mapping, owner) is None:
            for setting in settings:
                if getattr(mapping, setting) != getattr(_DEFAULT_MAPPING, setting):
                    yield _format_unused_setting(
                        f"{key}.mapping.{setting}", f"it is of {owner}, and mapping.{owner} is not set"
                    )


def _format_unused_setting(key: str, reason: str) -> str:
    return f"{key}: has no effect here ({reason}). Take it away."
