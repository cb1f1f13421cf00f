"""Parsing of overrides to a Run: a typed plain config, its name and its folder; or all errors at once."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

from hydra.core.default_element import ResultDefault
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from yaml import YAMLError

from lit_vlm.config.choices import Format, Task
from lit_vlm.config.compose import compose_config, compute_defaults_list, is_group_choice, list_groups
from lit_vlm.config.curation import get_contamination_selection
from lit_vlm.config.key_validation import find_choice_errors, find_file_errors, find_override_errors
from lit_vlm.config.overrides import (
    ConfigError,
    add_implied_overrides,
    get_override_key,
    parse_arguments,
    parse_override,
    split_sweep_values,
)
from lit_vlm.config.pipeline import build_stage_overrides, find_pipeline_errors
from lit_vlm.config.recipe import SOURCE_TABLE_PREFIXES, get_experiment, is_pipeline, list_stages
from lit_vlm.config.run_name import get_previous_stage_folder, get_run_name
from lit_vlm.config.schema import RunConfig, SourceConfig, StageConfig
from lit_vlm.config.settings import list_settings, list_stage_schemas
from lit_vlm.config.sweep_overrides import get_sweep_overrides, is_sweep
from lit_vlm.config.tasks import TASKS, find_config_errors
from lit_vlm.redaction import find_secret_errors, find_typed_secret_errors
from lit_vlm.types import UserError


@dataclass(frozen=True, slots=True)
class Run:
    """A job: its config, its name and its folder."""

    config: RunConfig
    experiment: str | None  # e.g. tiny/2_sft
    name: str  # e.g. tiny/2_sft or tiny/2_sft-3fa2b1c0
    dir: Path  # run_dir/name, absolute
    overrides: list[str]  # as given, and valid as overrides of another run
    init_from: str | None  # a folder or a hub id; "previous" is resolved


def parse(arguments: list[str]) -> Run:
    """Parse overrides to a Run. This imports no heavy library and creates no folder.

    Args:
        arguments: overrides as on the command line, or one JSON object.

    Raises:
        ConfigError: lists every error in the overrides, in the selected files, and between settings.
    """
    ensure_no_typed_secrets(arguments)
    given = parse_arguments(arguments)
    overrides = add_implied_overrides(given)
    if is_sweep(overrides):
        overrides = get_sweep_overrides(overrides)
    override_errors = collect_override_errors(overrides)
    if is_pipeline(overrides):
        # What to do with a setting of one stage is of no use for a setting that does not exist.
        valid = [text for text in given if not override_errors.get(text)]
        override_errors |= {
            f"pipeline {position}": [error] for position, error in enumerate(find_pipeline_errors(valid))
        }
    if override_errors:
        raise ConfigError(
            [
                *(error for errors in override_errors.values() for error in errors),
                *_find_remaining_errors(overrides, override_errors),
            ]
        )
    if is_pipeline(overrides):
        # Each source belongs to some of the stages, and every stage is checked separately.
        config = _convert_to_run_config(
            _compose_overrides(
                [text for text in overrides if not get_override_key(text).startswith(SOURCE_TABLE_PREFIXES)]
            )
        )
        _validate_stages(list_stages(config.recipe, given), given, config.task)
    else:
        config = _convert_to_run_config(_compose_overrides(overrides))
        if errors := find_secret_errors(asdict(config)) or find_config_errors(config):
            raise ConfigError(errors)
    return _create_run(config, overrides, given)


def ensure_no_typed_secrets(arguments: list[str]) -> None:
    """Raise ConfigError for arguments that contain a secret, before anything prints or writes them."""
    if errors := find_typed_secret_errors(arguments):
        raise ConfigError(errors)


def collect_override_errors(overrides: list[str], *, is_multirun: bool = False) -> dict[str, list[str]]:
    """Collect the errors of overrides in key, type or choice.

    Args:
        overrides: overrides as `add_implied_overrides` returns them.
        is_multirun: check each value of a comma list separately, as -m runs them.

    Returns:
        Errors by override; those of the selected files under "files".
    """
    if is_multirun:
        values = [value for text in overrides for value in split_sweep_values(text)]
        overrides = [text for text in values if not parse_override(text).is_sweep_override()]  # Hydra expands ranges
    own_groups = list_groups(overrides)
    choices = [
        text
        for text in overrides
        if is_group_choice(text, own_groups) and not get_override_key(text).startswith(("hydra.", "hydra/"))
    ]
    found = {text: list(find_choice_errors(parse_override(text), overrides)) for text in choices}
    folders = [text for text in overrides if get_override_key(text) == "hydra.searchpath"]
    # After an invalid choice the selected files are unknown; the other overrides are checked without them.
    has_wrong_choice = any(found.values())
    selected = folders + ([] if has_wrong_choice else _keep_last_choices(choices))
    stage, found["files"] = _check_config_files(selected)
    source_names, null_groups = None, set[str]()
    if not (has_wrong_choice or found["files"] or is_pipeline(overrides)):
        source_names, null_groups = _collect_source_names(selected)
    for text in overrides:
        if text not in choices and not get_override_key(text).startswith(("hydra.", "hydra/")):
            found[text] = list(
                find_override_errors(text, None if has_wrong_choice else stage, source_names, null_groups)
            )
    return {text: errors for text, errors in found.items() if errors}


def _find_remaining_errors(overrides: list[str], override_errors: dict[str, list[str]]) -> list[str]:
    """Find contradictions between the valid settings. A setting that is not set may be the intent of an invalid override."""
    try:
        config = _convert_to_run_config(_compose_overrides([text for text in overrides if text not in override_errors]))
    except ConfigError:
        return []
    return [error for error in find_config_errors(config) if "is not set" not in error]


def _keep_last_choices(choosing: list[str]) -> list[str]:
    return list({get_override_key(text): text for text in choosing}.values())


def _check_config_files(chosen: list[str]) -> tuple[type[StageConfig] | None, list[str]]:
    """Check the selected files. Return the config class of their stage (None: not known) and the errors."""
    try:
        files: list[ResultDefault] = compute_defaults_list(chosen)
        selected = {file.config_path for file in files}
        schemas = [schema for name, schema in list_stage_schemas().items() if f"schema/stage/{name}" in selected]
        stage = schemas[-1] if schemas else StageConfig
        return stage, [file_error for file in files for file_error in find_file_errors(file, stage, chosen)]
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        return None, [_format_hydra_error(error)]


def _collect_source_names(chosen: list[str]) -> tuple[dict[str, set[str]], set[str]]:
    """Return the source names by the key of their table, and the keys of mappings that are null."""
    data = _compose_overrides(chosen).data
    tables = {"data.sources": data.sources, "data.validation.sources": data.validation.sources}
    null = {f"{key}.{name}.mapping" for key, table in tables.items() for name in table if table[name].mapping is None}
    return {key: set(table) for key, table in tables.items()}, null


def _compose_overrides(overrides: list[str]) -> DictConfig:
    try:
        return compose_config(overrides)
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise ConfigError([_format_hydra_error(error)]) from error


def _format_hydra_error(error: Exception) -> str:
    """Format an error of Hydra or YAML in one line, without the list of object types."""
    text = str(error.__cause__ or error) if "Error merging" in str(error) else str(error)
    lines = [
        line.strip() for line in text.splitlines() if not re.match(r"\s*(object_type|full_key|reference_type)", line)
    ]
    return " ".join(line for line in lines if line)


def _convert_to_run_config(config: DictConfig) -> RunConfig:
    """Convert the composed config to typed objects: every value is set and folders are absolute."""
    try:
        run_config = OmegaConf.to_object(config)
    except MissingMandatoryValue:
        help_texts = {row.key: row.comment or "it has no default" for row in list_settings()}
        raise ConfigError(
            [
                f"{key} is not set: {help_texts.get(key, 'it has no default')}. Set {key}=..."
                for key in sorted(OmegaConf.missing_keys(config))
            ]
        ) from None
    except OmegaConfBaseException as error:  # an interpolation of a missing key
        raise ConfigError([_format_hydra_error(error)]) from error
    assert isinstance(run_config, RunConfig)
    run_config.stage.adam_betas = cast(
        tuple[float, float], tuple(run_config.stage.adam_betas)
    )  # its length is checked later
    return make_paths_absolute(run_config)


def make_paths_absolute(config: RunConfig) -> RunConfig:
    """Make paths relative to the current folder absolute, so that a later change of the working directory has no effect."""
    for source in [*config.data.sources.values(), *config.data.validation.sources.values()]:
        _make_source_paths_absolute(source)
    model = config.model
    model.vision_tower, model.language_model = map(resolve_model_name, (model.vision_tower, model.language_model))
    if model.chat_template not in (None, "chatml"):
        model.chat_template = _make_absolute(model.chat_template)
    if model.projector_weights is not None:
        model.projector_weights = _make_absolute(model.projector_weights)
    if model.new_tokens_from is not None:
        model.new_tokens_from = _make_absolute(model.new_tokens_from)
    config.run_dir = _make_absolute(config.run_dir)
    if config.data.drop_contaminated:
        for name, source in config.data.sources.items():
            source.selection = source.selection or get_contamination_selection(config.run_dir, name)
    if config.init_from is not None and "://" not in config.init_from:  # an endpoint's URL stays as it is
        config.init_from = resolve_model_name(config.init_from)
    for name in ("files", "environment"):
        if (path := getattr(config.evaluate, name)) is not None:
            setattr(config.evaluate, name, _make_absolute(path))
    config.image = [path if "://" in path else _make_absolute(path) for path in config.image]
    config.sync = [_make_absolute(path) for path in config.sync]
    config.prefer.output = _make_absolute(config.prefer.output)
    if config.curate.output is not None:
        config.curate.output = _make_absolute(config.curate.output)
    if config.curate.model is not None:
        config.curate.model = _make_absolute(config.curate.model)
    if config.curate.capfilt.captioner is not None:
        config.curate.capfilt.captioner = _make_absolute(config.curate.capfilt.captioner)
    if config.curate.balance.concepts is not None:
        config.curate.balance.concepts = _make_absolute(config.curate.balance.concepts)
    if config.generate.output is not None:
        config.generate.output = _make_absolute(config.generate.output)
    if config.prefer.judge is not None:
        config.prefer.judge = resolve_model_name(config.prefer.judge)
    for name in ("answers", "against", "output", "prompt", "image_root"):
        if (path := getattr(config.judge, name)) is not None:
            setattr(config.judge, name, _make_absolute(path))
    for field in config.stage.MODEL_FIELDS:
        if (folder := getattr(config.stage, field)) is not None:
            setattr(config.stage, field, resolve_model_name(folder))
    return config


def _make_source_paths_absolute(source: SourceConfig) -> None:
    if source.path is not None and source.format not in (Format.builtin, Format.digits):
        source.path = _make_absolute(source.path)
    for name in ("selection", "generated"):
        if (path := getattr(source, name)) is not None:
            setattr(source, name, _make_absolute(path))
    if isinstance(source.image_root, list):
        source.image_root = [_make_absolute(root) if isinstance(root, str) else root for root in source.image_root]
    elif isinstance(source.image_root, str | int):  # a folder may be called 5
        source.image_root = _make_absolute(str(source.image_root))


def resolve_model_name(name: str) -> str:
    """Resolve a model name: a folder to its absolute path; a hub id (`owner/model`), "tiny" or "previous" unchanged."""
    if name in ("tiny", "previous"):
        return name
    local = name.startswith(("/", ".", "~")) or name.count("/") > 1 or Path(name).is_dir()
    return _make_absolute(name) if local else name


def _resolve_previous(overrides: list[str]) -> str:
    """Resolve init_from=previous to an existing folder.

    This is the previous stage with the same overrides. If that was not run, it is the previous stage of the plain recipe, if
    that was run: `experiment=tiny/2_sft trainer.max_steps=50` works after a plain `python run.py`.
    """
    with_overrides = Path(_make_absolute(get_previous_stage_folder(overrides)))
    plain_overrides = [
        text for text in overrides if get_override_key(text) in ("experiment", "task", "run_dir", "hydra.searchpath")
    ]
    plain = Path(_make_absolute(get_previous_stage_folder(plain_overrides)))
    return str(plain if plain.is_dir() and not with_overrides.is_dir() else with_overrides)


def _make_absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute())


def _validate_stages(stages: list[str], given: list[str], task: Task) -> None:
    """Parse every stage before the first one starts: an error in the last stage would otherwise appear hours later."""
    stages_by_error: dict[str, list[str]] = {}
    used: set[str] = set()
    for stage in stages:
        try:
            overrides = build_stage_overrides(given, stage)
            used.update(overrides)
            parse(
                [
                    f"task={(Task.submit if task is Task.submit else Task.train).value}",
                    f"experiment={stage}",
                    *overrides,
                ]
            )
        except ConfigError as error:
            for message in error.errors:
                stages_by_error.setdefault(message, []).append(stage)
    unused = [text for text in given if text not in used and get_override_key(text).startswith(("data.", "data/"))]
    if unused and not stages_by_error:
        stages_by_error = {f"{text}: no stage of this recipe has such a source.": stages for text in unused}
    if stages_by_error:
        raise ConfigError(
            [
                message if failed_stages == stages else f"{', '.join(failed_stages)}: {message}"
                for message, failed_stages in stages_by_error.items()
            ]
        )


def _create_run(config: RunConfig, overrides: list[str], given: list[str]) -> Run:
    if is_pipeline(overrides):
        return Run(config, None, config.recipe, Path(config.run_dir) / config.recipe, given, config.init_from)
    get_task_run_name = TASKS[config.task].get_run_name
    name = get_run_name(overrides) if get_task_run_name is None else get_task_run_name(config)
    init_from = config.init_from
    if init_from == "previous":
        try:
            init_from = _resolve_previous(overrides)
        except UserError as error:
            raise ConfigError([str(error)]) from None
    return Run(config, get_experiment(overrides), name, Path(config.run_dir) / name, given, init_from)
