"""Validation of keys, types and choices in overrides and files. Each error suggests the nearest valid name."""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Iterator, Set
from dataclasses import is_dataclass
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, cast, get_args, get_origin

import yaml
from hydra.core.default_element import ResultDefault
from hydra.core.override_parser.types import Override
from omegaconf import OmegaConf

from lit_vlm.config.compose import choices, config_dirs, groups
from lit_vlm.config.overrides import CHECKPOINTING, parsed
from lit_vlm.config.schema import ActivationCheckpointing, DPOStageConfig, RunConfig, StageConfig
from lit_vlm.config.settings import (
    dataclass_of,
    describe,
    did_you_mean,
    hint_of,
    members,
    nearest,
    nearest_key,
    settings,
    value_type,
)
from lit_vlm.config.yaml_text import read_settings

NEW_SOURCE = (
    "A source is added by a file (conf/data/<name>.yaml, or your own folder with --config-dir)"
    " or from the ready ones: 'data/source@data.sources=[...]'"
)


def mistakes_in(key: str, value: Any, stage: type[StageConfig]) -> Iterator[str]:
    """Yield the errors of a value for a key, down to the leaves of a nested value."""
    hint = hint_of(key, stage)
    if hint is None:
        yield _unknown(key, stage)
    elif isinstance(value, dict) and (dataclass_of(hint) or is_dataclass(value_type(hint))):
        for name, item in value.items():
            yield from mistakes_in(f"{key}.{name}", item, stage)
    elif not fits(hint, value):
        yield f"{key}: expected {describe(hint)}, found {shown(value)}.{_nearest_member(hint, value)}"


def _unknown(key: str, stage: type[StageConfig]) -> str:
    if hint_of(key, DPOStageConfig) is not None:
        return f"{key} is a setting of stage=dpo, and this is another stage."
    parts = key.split(".")
    position = 2 if key.startswith("data.sources.") else 3
    name = parts[position] if len(parts) > position and "sources" in parts else "mine"
    known_settings = settings(cast(Hashable, stage))  # a class is hashable; mypy checks its instances, which are not
    nearest_name = nearest_key(
        key, [*members(RunConfig), *(setting.key.replace("<name>", name) for setting in known_settings)]
    )
    return f"unknown setting {key}.{did_you_mean(nearest_name)}" + (
        "" if nearest_name else " See python run.py --help settings."
    )


def fits(hint: Any, value: Any) -> bool:
    """Return True if OmegaConf accepts the value with the intended meaning. OmegaConf also accepts 2 or 'yes' for a bool."""
    if hint is Any or (isinstance(value, str) and ("${" in value or value == "???")):
        return True
    if get_origin(hint) in (UnionType, Union):
        return any(fits(option, value) for option in get_args(hint))
    if get_origin(hint) in (list, tuple):
        kind = get_args(hint)[0]
        return isinstance(value, list) and all(fits(kind, item) for item in value)
    if get_origin(hint) is dict or is_dataclass(hint):
        return isinstance(value, dict)
    if hint is NoneType or hint is bool:
        return isinstance(value, hint)
    if issubclass(hint, Enum):
        return str(value) in hint.__members__
    if isinstance(value, bool) or value is None:
        return hint is str and value is not None
    return _converts(hint, value)


def _converts(hint: type, value: Any) -> bool:
    if (hint is int and isinstance(value, float)) or not isinstance(value, str | int | float):
        return False
    try:
        hint(value)
    except ValueError:
        return False
    return True


def shown(value: Any) -> str:
    """Format a value as in YAML and on the command line."""
    if isinstance(value, bool) or value is None:
        return "null" if value is None else str(value).lower()
    return repr(value)


def _nearest_member(hint: Any, value: Any) -> str:
    options = [option for option in (get_args(hint) or (hint,)) if inspect.isclass(option) and issubclass(option, Enum)]
    if not options:
        return ""
    if hint is ActivationCheckpointing and isinstance(value, bool):
        return f" What was {shown(value)} is {CHECKPOINTING[shown(value)]} now."
    values = value if isinstance(value, list) else [value]
    invalid = [str(item) for item in values if str(item) not in options[0].__members__]
    return did_you_mean(nearest(invalid[0], list(options[0].__members__))) if invalid else ""


def mistakes_in_choice(override: Override, overrides: list[str]) -> Iterator[str]:
    """Yield an error message for a group or a choice that does not exist."""
    group, value = override.key_or_group, override.value()
    if group not in groups(overrides):
        yield f"{override.input_line}: there is no group {group}.{did_you_mean(nearest(group, groups(overrides)))}"
        return
    offered = choices(group, overrides)
    for name in value if isinstance(value, list) else [value]:
        if name is None or name in offered:
            continue
        stages = [choice for choice in offered if choice.startswith(f"{name}/")]
        if stages:
            yield f"{group}={name} is a recipe: name a stage of it ({', '.join(stages)}), or all with recipe={name}."
        else:
            suggestion = did_you_mean(nearest(str(name), offered))
            yield f"{group}={name}: there is no such choice; there are {', '.join(offered)}.{suggestion}"


def mistakes_in_override(
    text: str, stage: type[StageConfig], sources: dict[str, set[str]] | None, null: Set[str] = frozenset()
) -> Iterator[str]:
    """Yield the errors of one override that sets a value.

    Args:
        text: the override.
        stage: the schema of the selected stage.
        sources: source names by the key of their table (data.sources, data.validation.sources); None if they are unknown.
        null_groups: keys of groups that no file sets, e.g. data.sources.mine.mapping.
    """
    override = parsed(text)
    key = override.key_or_group
    if override.is_sweep_override():
        yield f"{text}: a comma makes a sweep, which needs -m; a text with a comma needs quotes: {key}=\"'...'\"."
    elif sources is not None and (source_errors := list(_wrong_sources(override, sources))):
        yield from source_errors
    elif unset_groups := [
        group for group in null if f"{key}.".startswith(f"{group}.") and override.value() is not None
    ]:
        yield from mistakes_in(key, override.value(), stage)
        yield f"{key}: {unset_groups[0]} is null, and a command line cannot begin it. Begin it in a file, or use data=mapped."
    elif override.is_delete():
        if not (_source_of(key)[0] or key.startswith("trainer.extra.")):
            yield f"{text}: only a source or an entry of trainer.extra can be taken away."
    else:
        yield from mistakes_in(key, override.value(), stage)
        if override.is_add() and hint_of(key, stage) is not None:
            yield f"{text}: {key} is a setting already; leave out the +."


def _wrong_sources(override: Override, sources: dict[str, set[str]]) -> Iterator[str]:
    """Yield an error message for each unknown source. Only files may add sources, although the schema allows any."""
    key = override.key_or_group
    table, name = _source_of(key)
    if table and name not in sources[table]:
        known = ", ".join(sorted(sources[table])) or "none"
        suggestion = did_you_mean(nearest(name, sorted(sources[table])))
        yield f"{key}: there is no source {name} here ({known}).{suggestion} {NEW_SOURCE}."
    elif key in sources and isinstance(value := override.value(), dict) and (added := set(value) - sources[key]):
        yield f"{key}: {', '.join(sorted(added))} cannot be added here. {NEW_SOURCE}."


def _source_of(key: str) -> tuple[str, str]:
    """Split data.sources.mine.path into ("data.sources", "mine"); return empty strings for any other key."""
    for table in ("data.sources", "data.validation.sources"):
        if key.startswith(f"{table}."):
            return table, key.removeprefix(f"{table}.").partition(".")[0]
    return "", ""


def mistakes_in_file(default: ResultDefault, stage: type[StageConfig], overrides: list[str]) -> Iterator[str]:
    """Yield the errors in the settings of one file of conf/, each with its line number."""
    path = next(
        (file for folder in config_dirs(overrides) if (file := folder / f"{default.config_path}.yaml").is_file()), None
    )
    if path is None or str(default.config_path).startswith("hydra/"):
        return  # a schema, or a file of Hydra
    package = default.package or ""
    if package.startswith("experiment"):
        yield f"{_short(path)}: the first line must be '# @package _global_', or nothing in the file counts."
        return
    content: Any = OmegaConf.to_container(OmegaConf.create(read_settings(path, package) or {}), resolve=False)
    for name, value in content.items():
        if name == "defaults" or (name == "hydra" and not package):
            continue
        key = f"{package}.{name}".strip(".")
        for leaf, item in _leaves(key, value, stage):
            for error in mistakes_in(leaf, item, stage):
                line = _line(path, leaf.removeprefix(package).strip(".").split("."))
                yield f"{_short(path)}:{line}: {error}"


def _leaves(key: str, value: Any, stage: type[StageConfig]) -> Iterator[tuple[str, Any]]:
    hint = hint_of(key, stage)
    if isinstance(value, dict) and value and (dataclass_of(hint) or is_dataclass(value_type(hint))):
        for name, item in value.items():
            yield from _leaves(f"{key}.{name}", item, stage)
    elif not (value is None and is_dataclass(hint)):  # `data:` with nothing below it
        yield key, value


def _line(path: Path, words: list[str]) -> int:
    """Find the line number of a key, counted from 1."""
    node, line = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader), 1
    for name in words:
        for key, value in getattr(node, "value", []):
            if key.value == name:
                node, line = value, key.start_mark.line + 1
                break
    return line


def _short(path: Path) -> str:
    """Return the path relative to the current folder if it is inside it, else the whole path."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
