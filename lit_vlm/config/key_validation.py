"""Validation of keys, types and choices in overrides and files. Each error suggests the nearest valid name."""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Iterator, Set
from dataclasses import is_dataclass
from enum import Enum
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, cast, get_args, get_origin

import yaml
from hydra.core.default_element import ResultDefault
from hydra.core.override_parser.types import Override
from omegaconf import OmegaConf

from lit_vlm.config.choices import ActivationCheckpointing, Task
from lit_vlm.config.compose import list_choices, list_config_dirs, list_groups
from lit_vlm.config.other_programs import (
    CHOICE_ALIASES,
    VALUE_REMEDIES,
    explain_data_choice,
    explain_model_choice,
    format_key_remedy,
)
from lit_vlm.config.overrides import CHECKPOINTING_ALIASES, parse_override, quote_value
from lit_vlm.config.schema import RunConfig, StageConfig
from lit_vlm.config.settings import (
    describe_type,
    extract_dataclass,
    find_nearest_key,
    get_field_types,
    get_setting_type,
    get_value_type,
    list_settings,
    list_stage_schemas,
)
from lit_vlm.config.yaml_reader import read_settings
from lit_vlm.types import find_nearest, format_suggestion

ADD_SOURCE_HINT = (
    "A source is added by a file (conf/data/<name>.yaml, or your own folder with --config-dir)"
    " or from the ready ones: 'data/source@data.sources=[...]'"
)


def find_value_errors(key: str, value: Any, stage: type[StageConfig] | None) -> Iterator[str]:
    """Yield the errors of a value for a key, down to the leaves of a nested value."""
    hint = get_setting_type(key, stage)
    if hint is None:
        yield _format_unknown_key(key, value, stage)
    elif isinstance(value, dict) and (extract_dataclass(hint) or is_dataclass(get_value_type(hint))):
        for name, item in value.items():
            yield from find_value_errors(f"{key}.{name}", item, stage)
    elif not is_valid_value(hint, value):
        remedy = f" {VALUE_REMEDIES[key]}." if key in VALUE_REMEDIES else _suggest_member(hint, value)
        yield f"{key}: expected {describe_type(hint)}, found {format_value(value)}.{remedy}"


def _format_unknown_key(key: str, value: Any, stage: type[StageConfig] | None) -> str:
    if key == key.upper() and key.isidentifier():
        text = quote_value(value)
        return f"{key} is an environment variable: write it before the command, {key}={text} python run.py ..."
    if remedy := format_key_remedy(key, "" if value is None else str(value)):
        return f"unknown setting {key}. {remedy}."
    owners = [name for name, schema in list_stage_schemas().items() if get_setting_type(key, schema) is not None]
    if owners:
        return f"{key} is a setting of stage={' and '.join(owners)}, and this is another stage."
    parts = key.split(".")
    position = 2 if key.startswith("data.sources.") else 3
    name = parts[position] if len(parts) > position and "sources" in parts else "mine"
    known_settings = list_settings(
        cast(Hashable, stage)
    )  # a class is hashable; mypy checks its instances, which are not
    keys = [setting.key.replace("<name>", name) for setting in known_settings]
    tables = sorted({table for known in keys for table in accumulate(known.split(".")[:-1], "{}.{}".format)})
    nearest_name = find_nearest_key(key, [*get_field_types(RunConfig), *keys, *tables])
    return f"unknown setting {key}.{format_suggestion(nearest_name)}" + (
        "" if nearest_name else " See python run.py --help settings."
    )


def is_valid_value(hint: Any, value: Any) -> bool:
    """Return True if OmegaConf accepts the value with the intended meaning. OmegaConf also accepts 2 or 'yes' for a bool."""
    if hint is Any or (isinstance(value, str) and ("${" in value or value == "???")):
        return True
    if get_origin(hint) in (UnionType, Union):
        return any(is_valid_value(option, value) for option in get_args(hint))
    if get_origin(hint) in (list, tuple):
        kind = get_args(hint)[0]
        return isinstance(value, list) and all(is_valid_value(kind, item) for item in value)
    if get_origin(hint) is dict or is_dataclass(hint):
        return isinstance(value, dict)
    if hint is NoneType or hint is bool:
        return isinstance(value, hint)
    if issubclass(hint, Enum):
        return str(value) in hint.__members__
    if isinstance(value, bool) or value is None:
        return hint is str and value is not None
    return _can_convert(hint, value)


def _can_convert(hint: type, value: Any) -> bool:
    if (hint is int and isinstance(value, float)) or not isinstance(value, str | int | float):
        return False
    try:
        hint(value)
    except ValueError:
        return False
    return True


def format_value(value: Any) -> str:
    """Format a value as in YAML and on the command line."""
    if isinstance(value, bool) or value is None:
        return "null" if value is None else str(value).lower()
    return repr(value)


def _suggest_member(hint: Any, value: Any) -> str:
    options = [option for option in (get_args(hint) or (hint,)) if inspect.isclass(option) and issubclass(option, Enum)]
    if not options:
        return ""
    if hint is ActivationCheckpointing and isinstance(value, bool):
        return f" What was {format_value(value)} is {CHECKPOINTING_ALIASES[format_value(value)]} now."
    values = value if isinstance(value, list) else [value]
    invalid = [str(item) for item in values if str(item) not in options[0].__members__]
    if not invalid:
        return ""
    alias = CHOICE_ALIASES["task"].get(invalid[0].lower()) if hint is Task else None
    return format_suggestion(alias or find_nearest(invalid[0], list(options[0].__members__)))


def find_choice_errors(override: Override, overrides: list[str]) -> Iterator[str]:
    """Yield an error message for a group or a choice that does not exist."""
    group, value = override.key_or_group, override.value()
    if group not in list_groups(overrides):
        yield f"{override.input_line}: there is no group {group}.{format_suggestion(find_nearest(group, list_groups(overrides)))}"
        return
    offered = list_choices(group, overrides)
    for name in value if isinstance(value, list) else [value]:
        if name is None or name in offered:
            continue
        yield _format_unknown_choice(group, str(name), offered)


def _format_unknown_choice(group: str, name: str, offered: list[str]) -> str:
    stages = [choice for choice in offered if choice.startswith(f"{name}/")]
    if stages:
        return f"{group}={name} is a recipe: name a stage of it ({', '.join(stages)}), or all with recipe={name}."
    explain = {"model": explain_model_choice, "data": explain_data_choice}.get(group)
    if explain and (explanation := explain(name)):
        return explanation
    alias = CHOICE_ALIASES.get(group, {}).get(name.lower())
    if group == "experiment":
        stage = CHOICE_ALIASES["stage"].get(name.lower(), name)
        choices = sorted(offered, key=lambda choice: not choice.startswith("tiny/"))
        alias = next((choice for choice in choices if choice.endswith(f"_{stage}")), None)
    suggestion = format_suggestion(alias or find_nearest(name, offered))
    return f"{group}={name}: there is no such choice; there are {', '.join(offered)}.{suggestion}"


def find_override_errors(
    text: str, stage: type[StageConfig] | None, sources: dict[str, set[str]] | None, null_groups: Set[str] = frozenset()
) -> Iterator[str]:
    """Yield the errors of one override that sets a value.

    Args:
        text: the override.
        stage: the schema of the selected stage.
        sources: source names by the key of their table (data.sources, data.validation.sources); None if they are unknown.
        null_groups: keys of groups that no file sets, e.g. data.sources.mine.mapping.
    """
    override = parse_override(text)
    key = override.key_or_group
    if override.is_sweep_override():
        yield f"{text}: a comma makes a sweep, which needs -m; a text with a comma needs quotes: {key}=\"'...'\"."
    elif sources is not None and (source_errors := list(_find_source_name_errors(override, sources))):
        yield from source_errors
    elif unset_groups := [
        group for group in null_groups if f"{key}.".startswith(f"{group}.") and override.value() is not None
    ]:
        yield from find_value_errors(key, override.value(), stage)
        yield f"{key}: {unset_groups[0]} is null, and a command line cannot begin it. Begin it in a file, or use data=mapped."
    elif override.is_delete():
        if not (_split_source_key(key)[0] or key.startswith("trainer.extra.")):
            yield f"{text}: only a source or an entry of trainer.extra can be taken away."
    else:
        yield from find_value_errors(key, override.value(), stage)
        if override.is_add() and get_setting_type(key, stage) is not None:
            yield f"{text}: {key} is a setting already; leave out the +."


def _find_source_name_errors(override: Override, sources: dict[str, set[str]]) -> Iterator[str]:
    """Yield an error message for each unknown source. Only files may add sources, although the schema allows any."""
    key = override.key_or_group
    table, name = _split_source_key(key)
    if table and name not in sources[table]:
        known = ", ".join(sorted(sources[table])) or "none"
        suggestion = format_suggestion(find_nearest(name, sorted(sources[table])))
        yield f"{key}: there is no source {name} here ({known}).{suggestion} {ADD_SOURCE_HINT}."
    elif key in sources and isinstance(value := override.value(), dict) and (added := set(value) - sources[key]):
        yield f"{key}: {', '.join(sorted(added))} cannot be added here. {ADD_SOURCE_HINT}."


def _split_source_key(key: str) -> tuple[str, str]:
    """Split data.sources.mine.path into ("data.sources", "mine"); return empty strings for any other key."""
    for table in ("data.sources", "data.validation.sources"):
        if key.startswith(f"{table}."):
            return table, key.removeprefix(f"{table}.").partition(".")[0]
    return "", ""


def find_file_errors(default: ResultDefault, stage: type[StageConfig] | None, overrides: list[str]) -> Iterator[str]:
    """Yield the errors in the settings of one file of conf/, each with its line number."""
    path = next(
        (file for folder in list_config_dirs(overrides) if (file := folder / f"{default.config_path}.yaml").is_file()),
        None,
    )
    if path is None or str(default.config_path).startswith("hydra/"):
        return  # a schema, or a file of Hydra
    package = default.package or ""
    if package.startswith("experiment"):
        yield f"{_shorten_path(path)}: the first line must be '# @package _global_', or nothing in the file counts."
        return
    stat = path.stat()
    yield from _find_settings_errors(path, package, cast(Hashable, stage), (stat.st_mtime_ns, stat.st_size))


@lru_cache(maxsize=256)
def _find_settings_errors(
    path: Path, package: str, stage: type[StageConfig] | None, _stamp: tuple[int, int]
) -> tuple[str, ...]:
    """Find the errors of a file's settings once for all stages of a pipeline, and anew after the file changed."""
    return tuple(_iterate_settings_errors(path, package, stage))


def _iterate_settings_errors(path: Path, package: str, stage: type[StageConfig] | None) -> Iterator[str]:
    content: Any = OmegaConf.to_container(OmegaConf.create(read_settings(path, package) or {}), resolve=False)
    for name, value in content.items():
        if name == "defaults" or (name == "hydra" and not package):
            continue
        key = f"{package}.{name}".strip(".")
        for leaf, item in _iterate_setting_leaves(key, value, stage):
            for error in find_value_errors(leaf, item, stage):
                line = _find_line(path, leaf.removeprefix(package).strip(".").split("."))
                yield f"{_shorten_path(path)}:{line}: {error}"


def _iterate_setting_leaves(key: str, value: Any, stage: type[StageConfig] | None) -> Iterator[tuple[str, Any]]:
    hint = get_setting_type(key, stage)
    if isinstance(value, dict) and value and (extract_dataclass(hint) or is_dataclass(get_value_type(hint))):
        for name, item in value.items():
            yield from _iterate_setting_leaves(f"{key}.{name}", item, stage)
    elif not (value is None and is_dataclass(hint)):  # `data:` with nothing below it
        yield key, value


def _find_line(path: Path, key_path: list[str]) -> int:
    """Find the line number of a key, counted from 1."""
    node, line = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader), 1
    for name in key_path:
        for key, value in getattr(node, "value", []):
            if key.value == name:
                node, line = value, key.start_mark.line + 1
                break
    return line


def _shorten_path(path: Path) -> str:
    """Return the path relative to the current folder if it is inside it, else the whole path."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
