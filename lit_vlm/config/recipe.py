"""Recipes: the ordered stages of a folder of conf/experiment/, and the overrides that apply to each stage."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig

from lit_vlm.config.compose import choices, composed
from lit_vlm.config.overrides import SOURCES, ConfigError, key_of, parsed, with_implied
from lit_vlm.config.schema import Format, StageName, Task
from lit_vlm.config.settings import did_you_mean, nearest
from lit_vlm.types import Kind

_PICK_THE_STAGE = ("task", "recipe", "experiment")
SOURCE_TABLES = ("data.sources.", "data.validation.sources.")


def is_ladder(overrides: list[str]) -> bool:
    """Return True if these overrides run a pipeline, i.e. all stages of a recipe.

    That is task=pipeline (the default), or task=submit without `experiment=` and `stage=`.
    """
    tasks = [str(parsed(text).value()) for text in overrides if key_of(text) == "task"]
    name = tasks[-1] if tasks else Task.pipeline.value
    one_stage = any(key_of(text) in ("experiment", "stage") for text in overrides)
    return name == Task.pipeline.value or (name == Task.submit.value and not one_stage)


def recipes(overrides: list[str] | tuple[str, ...] = ()) -> list[str]:
    """List the folders of conf/experiment/."""
    return sorted({name.rpartition("/")[0] for name in choices("experiment", overrides) if "/" in name})


def stages_of(recipe: str, overrides: list[str] | tuple[str, ...] = ()) -> list[str]:
    """List the stages of a recipe in the order of their file names: tiny/1_align, tiny/2_sft, ...

    Raises:
        ConfigError: the recipe does not exist.
    """
    stages = [name for name in choices("experiment", overrides) if name.rpartition("/")[0] == recipe]
    if not stages:
        offered = recipes(overrides)
        suggestion = did_you_mean(nearest(recipe, offered))
        raise ConfigError([f"recipe={recipe}: there is no such recipe; there are {', '.join(offered)}.{suggestion}"])
    return stages


def experiment_of(overrides: list[str]) -> str | None:
    """Return the experiment in these overrides, or None."""
    named: list[Any] = [parsed(override).value() for override in overrides if key_of(override) == "experiment"]
    return named[-1] if named else None


def stage_before(experiment: str, overrides: list[str] | tuple[str, ...] = ()) -> str | None:
    """Return the previous stage of the same recipe; None for the first stage."""
    stages = stages_of(experiment.rpartition("/")[0], overrides)
    position = stages.index(experiment)
    return stages[position - 1] if position else None


def is_preference(source: DictConfig) -> bool:
    """Return True if a source is known to contain preference pairs."""
    builtin = source.format is Format.builtin and source.path == Kind.preference.value
    return source.format is Format.preference or source.kind == Kind.preference.value or builtin


def overrides_for(overrides: list[str], experiment: str) -> list[str]:
    """Filter the overrides of a pipeline for one stage, without init_from and the keys that select the stage.

    Ready sources and data groups apply to the stages that can use them: preference pairs to dpo, all others to the other
    stages. An override of one source applies to the stages that have this source.
    """
    shared = [text for text in overrides if key_of(text) not in (*_PICK_THE_STAGE, "init_from")]
    data_choices = [text for text in shared if key_of(text) in ("data", SOURCES)]
    source_overrides = [text for text in shared if key_of(text).startswith(SOURCE_TABLES)]
    if data_choices and not _usable(experiment, data_choices, source_overrides, shared):
        return [text for text in shared if text not in data_choices and text not in source_overrides]
    config = _with_data(experiment, data_choices, shared)
    return [text for text in shared if text not in source_overrides or _names_source_of(config, text)]


def _with_data(experiment: str, data: list[str], overrides: list[str]) -> DictConfig:
    folders = [text for text in overrides if key_of(text) == "hydra.searchpath"]
    return composed(with_implied([f"experiment={experiment}", *data, *folders]))


def _names_source_of(config: DictConfig, override: str) -> bool:
    table = next(table for table in SOURCE_TABLES if key_of(override).startswith(table))
    source_names = config.data.sources if table == "data.sources." else config.data.validation.sources
    return key_of(override).removeprefix(table).partition(".")[0] in source_names


def _usable(experiment: str, chosen: list[str], sources: list[str], overrides: list[str]) -> bool:
    config = _with_data(experiment, chosen, overrides)
    config = _with_data(experiment, [*chosen, *(text for text in sources if _names_source_of(config, text))], overrides)
    pairs = [is_preference(source) for source in config.data.sources.values()]
    return any(pairs) if config.stage.name is StageName.dpo else not (pairs and all(pairs))
