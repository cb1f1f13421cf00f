"""Recipes: the ordered stages of a folder of conf/experiment/, and the overrides that apply to each stage."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig

from lit_vlm.config.choices import Format, StageName, Task
from lit_vlm.config.compose import compose_config, list_choices
from lit_vlm.config.overrides import SOURCES_KEY, ConfigError, add_implied_overrides, get_override_key, parse_override
from lit_vlm.types import SampleKind, find_nearest, format_suggestion

_STAGE_SELECTION_KEYS = ("task", "recipe", "experiment")
SOURCE_TABLE_PREFIXES = ("data.sources.", "data.validation.sources.")


def is_pipeline(overrides: list[str]) -> bool:
    """Return True if these overrides run a pipeline, i.e. all stages of a recipe.

    That is task=pipeline (the default), or task=submit without `experiment=` and `stage=`.
    """
    tasks = [str(parse_override(text).value()) for text in overrides if get_override_key(text) == "task"]
    name = tasks[-1] if tasks else Task.pipeline.value
    one_stage = any(get_override_key(text) in ("experiment", "stage") for text in overrides)
    return name == Task.pipeline.value or (name == Task.submit.value and not one_stage)


def list_recipes(overrides: list[str] | tuple[str, ...] = ()) -> list[str]:
    """List the folders of conf/experiment/."""
    return sorted({name.rpartition("/")[0] for name in list_choices("experiment", overrides) if "/" in name})


def list_stages(recipe: str, overrides: list[str] | tuple[str, ...] = ()) -> list[str]:
    """List the stages of a recipe in the order of their file names: tiny/1_align, tiny/2_sft, ...

    Raises:
        ConfigError: the recipe does not exist.
    """
    stages = [name for name in list_choices("experiment", overrides) if name.rpartition("/")[0] == recipe]
    if not stages:
        offered = list_recipes(overrides)
        suggestion = format_suggestion(find_nearest(recipe, offered))
        raise ConfigError([f"recipe={recipe}: there is no such recipe; there are {', '.join(offered)}.{suggestion}"])
    return stages


def get_experiment(overrides: list[str]) -> str | None:
    """Return the experiment in these overrides, or None."""
    named: list[Any] = [
        parse_override(override).value() for override in overrides if get_override_key(override) == "experiment"
    ]
    return named[-1] if named else None


def get_previous_stage(experiment: str, overrides: list[str] | tuple[str, ...] = ()) -> str | None:
    """Return the previous stage of the same recipe; None for the first stage. Stages with one number follow the same one."""
    stages = list_stages(experiment.rpartition("/")[0], overrides)
    before = stages[: stages.index(experiment)]
    number = _get_stage_number(experiment)
    return next((stage for stage in reversed(before) if not number or _get_stage_number(stage) != number), None)


def _get_stage_number(experiment: str) -> str:
    """Return the number with which the name of a stage begins; "" without one."""
    number = experiment.rpartition("/")[2].partition("_")[0]
    return number if number.isdigit() else ""


def is_preference_source(source: DictConfig) -> bool:
    """Return True if a source is known to contain preference pairs."""
    builtin = source.format == Format.builtin and source.path == SampleKind.preference.value
    return source.format == Format.preference or source.kind == SampleKind.preference.value or builtin


def filter_overrides_for_stage(overrides: list[str], experiment: str) -> list[str]:
    """Filter the overrides of a pipeline for one stage, without init_from and the keys that select the stage.

    Ready sources and data groups apply to the stages that can use them: preference pairs to dpo, all others to the other
    stages. An override of one source applies to the stages that have this source.
    """
    shared = [text for text in overrides if get_override_key(text) not in (*_STAGE_SELECTION_KEYS, "init_from")]
    data_choices = [text for text in shared if get_override_key(text) in ("data", SOURCES_KEY)]
    source_overrides = [text for text in shared if get_override_key(text).startswith(SOURCE_TABLE_PREFIXES)]
    if data_choices and not _can_use_data(experiment, data_choices, source_overrides, shared):
        return [text for text in shared if text not in data_choices and text not in source_overrides]
    config = _compose_with_data(experiment, data_choices, shared)
    return [text for text in shared if text not in source_overrides or _is_source_override(config, text)]


def _compose_with_data(experiment: str, data: list[str], overrides: list[str]) -> DictConfig:
    folders = [text for text in overrides if get_override_key(text) == "hydra.searchpath"]
    return compose_config(add_implied_overrides([f"experiment={experiment}", *data, *folders]))


def _is_source_override(config: DictConfig, override: str) -> bool:
    table = next(table for table in SOURCE_TABLE_PREFIXES if get_override_key(override).startswith(table))
    source_names = config.data.sources if table == "data.sources." else config.data.validation.sources
    return get_override_key(override).removeprefix(table).partition(".")[0] in source_names


def _can_use_data(experiment: str, chosen: list[str], sources: list[str], overrides: list[str]) -> bool:
    config = _compose_with_data(experiment, chosen, overrides)
    config = _compose_with_data(
        experiment, [*chosen, *(text for text in sources if _is_source_override(config, text))], overrides
    )
    pairs = [is_preference_source(source) for source in config.data.sources.values()]
    return any(pairs) if config.stage.name is StageName.dpo else not (pairs and all(pairs))
