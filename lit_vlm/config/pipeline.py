"""Overrides of the stages of a pipeline, which runs each stage in its own process."""

from __future__ import annotations

from pathlib import Path

from lit_vlm.config.compose import composed
from lit_vlm.config.identity import hf_folder, previous_folder, same_folder
from lit_vlm.config.overrides import ConfigError, key_of, parsed, quote, with_implied
from lit_vlm.config.recipe import overrides_for, recipes, stage_before
from lit_vlm.config.settings import did_you_mean, nearest


def wrong_for_pipeline(overrides: list[str]) -> list[str]:
    """Return the errors of pipeline overrides: an unknown recipe, and overrides of one stage that would apply to all."""
    stage_overrides = [text for text in overrides if key_of(text) == "stage" or key_of(text).startswith("stage.")]
    errors = []
    if stage_overrides:
        errors.append(
            f"{' '.join(stage_overrides)}: a pipeline trains stages that differ in just this. Run one stage with it:"
            f" python run.py experiment=<recipe>/<stage> {' '.join(stage_overrides)}"
        )
    if any(key_of(text) == "run_name" for text in overrides):
        errors.append("run_name names one run, a pipeline makes several: give them a folder with run_dir=runs/<name>.")
    recipe_names = [str(parsed(text).value()) for text in overrides if key_of(text) == "recipe"]
    offered = recipes(overrides)
    if recipe_names and recipe_names[-1] not in offered:
        suggestion = did_you_mean(nearest(recipe_names[-1], offered))
        errors.append(
            f"recipe={recipe_names[-1]}: there is no such recipe; there are {', '.join(offered)}.{suggestion}"
        )
    return errors


def pipeline_overrides(overrides: list[str], experiment: str) -> list[str]:
    """Build the overrides with which a pipeline starts a stage: `python run.py experiment=<experiment> <overrides>`.

    `init_from=` applies to the first stage. A later stage that starts from `previous` gets the folder explicitly if its own
    overrides would resolve to another one (dpo does not have the data overrides of earlier stages; trials of a sweep have
    a run id in their names).

    Raises:
        ConfigError: an override that belongs to a single stage.
    """
    if errors := wrong_for_pipeline(overrides):
        raise ConfigError(errors)
    selected = overrides_for(overrides, experiment)
    previous = stage_before(experiment, overrides)
    if previous is None:
        return selected + [text for text in overrides if key_of(text) == "init_from"]
    all_overrides = with_implied([f"experiment={experiment}", *selected])
    if composed(all_overrides).init_from != "previous":
        return selected
    folder = hf_folder(with_implied([f"experiment={previous}", *pipeline_overrides(overrides, previous)]))
    return (
        selected
        if same_folder(folder, previous_folder(all_overrides))
        else [*selected, f"init_from={quote(Path(folder).as_posix())}"]
    )
