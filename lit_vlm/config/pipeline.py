"""Overrides of the stages of a pipeline, which runs each stage in its own process."""

from __future__ import annotations

from pathlib import Path

from lit_vlm.config.compose import compose_config
from lit_vlm.config.overrides import ConfigError, add_implied_overrides, get_override_key, parse_override, quote_value
from lit_vlm.config.recipe import filter_overrides_for_stage, get_previous_stage, list_recipes
from lit_vlm.config.run_name import get_hf_folder, get_previous_stage_folder, is_same_folder
from lit_vlm.types import find_nearest, format_suggestion


def find_pipeline_errors(overrides: list[str]) -> list[str]:
    """Return the errors of pipeline overrides: an unknown recipe, and overrides of one stage that would apply to all."""
    stage_overrides = [
        text for text in overrides if get_override_key(text) == "stage" or get_override_key(text).startswith("stage.")
    ]
    errors = []
    if stage_overrides:
        errors.append(
            f"{' '.join(stage_overrides)}: a pipeline trains stages that differ in just this. Run one stage with it:"
            f" python run.py experiment=<recipe>/<stage> {' '.join(stage_overrides)}"
        )
    if any(get_override_key(text) == "run_name" for text in overrides):
        errors.append("run_name names one run, a pipeline makes several: give them a folder with run_dir=runs/<name>.")
    recipe_names = [str(parse_override(text).value()) for text in overrides if get_override_key(text) == "recipe"]
    offered = list_recipes(overrides)
    if recipe_names and recipe_names[-1] not in offered:
        suggestion = format_suggestion(find_nearest(recipe_names[-1], offered))
        errors.append(
            f"recipe={recipe_names[-1]}: there is no such recipe; there are {', '.join(offered)}.{suggestion}"
        )
    return errors


def build_stage_overrides(overrides: list[str], experiment: str) -> list[str]:
    """Build the overrides with which a pipeline starts a stage: `python run.py experiment=<experiment> <overrides>`.

    `init_from=` applies to the first stage. A later stage that starts from `previous` gets the folder explicitly if its own
    overrides would resolve to another one (dpo does not have the data overrides of earlier stages; trials of a sweep have
    a run id in their names).

    Raises:
        ConfigError: an override that belongs to a single stage.
    """
    if errors := find_pipeline_errors(overrides):
        raise ConfigError(errors)
    selected = filter_overrides_for_stage(overrides, experiment)
    previous = get_previous_stage(experiment, overrides)
    if previous is None:
        return selected + [text for text in overrides if get_override_key(text) == "init_from"]
    all_overrides = add_implied_overrides([f"experiment={experiment}", *selected])
    if compose_config(all_overrides).init_from != "previous":
        return selected
    folder = get_hf_folder(
        add_implied_overrides([f"experiment={previous}", *build_stage_overrides(overrides, previous)])
    )
    return (
        selected
        if is_same_folder(folder, get_previous_stage_folder(all_overrides))
        else [*selected, f"init_from={quote_value(Path(folder).as_posix())}"]
    )
