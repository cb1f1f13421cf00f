"""Table of all settings: key, type, default and help text of each, the nearest valid key, and the settings of a stored run."""

from __future__ import annotations

import difflib
import inspect
import io
import itertools
import tokenize
from collections.abc import Iterator, Mapping
from dataclasses import MISSING as REQUIRED
from dataclasses import Field, dataclass, fields, is_dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lit_vlm.config import choices, curation, mapping, pair_stages, schema, task_settings
from lit_vlm.config.other_programs import KEY_ALIASES
from lit_vlm.config.pair_stages import PAIR_STAGE_CONFIGS
from lit_vlm.config.ranges import NumberRange
from lit_vlm.config.schema import STAGE_CONFIGS, RunConfig, StageConfig
from lit_vlm.types import UserError, find_nearest


@dataclass(frozen=True, slots=True)
class Setting:
    """A row of the table. `<name>` in a key is a placeholder for the name of a source."""

    key: str
    type: Any
    default: Any
    comment: str
    group: str = ""  # name of the dataclass that contains the setting
    range: NumberRange | None = None  # range of a number, or of each number in a list


def get_stage_config_class(name: str | None) -> type[StageConfig]:
    """Return the config dataclass of a stage; the plain one for an unknown name."""
    return list_stage_schemas().get(name or "", StageConfig)


@cache
def get_field_types(owner: type) -> dict[str, Any]:
    """Return the types of a config dataclass by field name."""
    hints = get_type_hints(owner)
    return {field.name: hints[field.name] for field in fields(owner)}


@cache
def list_stage_schemas() -> dict[str, type[StageConfig]]:
    """List the config classes of the stages by the name under which conf/stage/ refers to them."""
    configs = {**STAGE_CONFIGS, **PAIR_STAGE_CONFIGS}
    own = {stage.value: schema for stage, schema in configs.items() if schema is not StageConfig}
    return {"base": StageConfig, **own}


@cache
def list_settings(stage: type[StageConfig] | None = None) -> tuple[Setting, ...]:
    """List all settings in the order of the schema: of one stage's config class, or of all of them."""
    settings = (row for schema in _list_schemas(stage) for row in _iterate_settings(RunConfig, "", schema))
    rows = {row.key: row for row in settings}
    order = {field.name: number for number, field in enumerate(fields(RunConfig))}
    return tuple(sorted(rows.values(), key=lambda row: order[row.key.partition(".")[0]]))


def _list_schemas(stage: type[StageConfig] | None) -> list[type[StageConfig]]:
    return list(list_stage_schemas().values()) if stage is None else [stage]


def _iterate_settings(owner: type, prefix: str, stage: type[StageConfig]) -> Iterator[Setting]:
    comments = read_field_comments()
    for field in fields(owner):
        key, hint = prefix + field.name, get_field_types(owner)[field.name]
        hint = stage if hint is StageConfig else hint
        if (group := extract_dataclass(hint)) is not None:
            yield from _iterate_settings(group, f"{key}.", stage)
        elif is_dataclass(get_value_type(hint)):
            yield from _iterate_settings(get_value_type(hint), f"{key}.<name>.", stage)
        else:
            defining_class = next(
                base for base in owner.__mro__ if field.name in base.__dict__.get("__annotations__", {})
            )
            yield Setting(
                key,
                hint,
                get_default(field),
                comments.get((defining_class.__name__, field.name), ""),
                owner.__name__,
                field.metadata.get("range"),
            )


def get_default(field: Field) -> Any:
    """Return the default of a field; "???" for a required setting."""
    return field.default_factory() if field.default_factory is not REQUIRED else field.default


def extract_dataclass(hint: Any) -> Any:
    """Extract the dataclass X from the type X or X | None; None for any other type."""
    options = get_args(hint) if get_origin(hint) in (UnionType, Union) else (hint,)
    return next((option for option in options if is_dataclass(option)), None)


def get_setting_type(key: str, stage: type[StageConfig] | None = None) -> Any:
    """Return the type of a setting of one stage's config class, or of any; None if the setting does not exist."""
    types = (_find_setting_type(key, schema) for schema in _list_schemas(stage))
    return next((hint for hint in types if hint is not None), None)


def _find_setting_type(key: str, stage: type[StageConfig]) -> Any:
    hint: Any = RunConfig
    for word in key.split("."):
        if hint is Any:
            return Any
        group = extract_dataclass(hint)
        hint = get_field_types(cast(type, group)).get(word) if group is not None else get_value_type(hint)
        if hint is None:
            return None
        hint = stage if hint is StageConfig else hint
    return hint


def get_value_type(hint: Any) -> Any:
    """Return X of dict[str, X]; None for any other type."""
    return get_args(hint)[1] if get_origin(hint) is dict else None


@cache
def read_field_comments() -> dict[tuple[str, str], str]:
    """Read the help texts in the modules of the schema: (class, field) -> trailing comment of the field or its closing bracket."""
    comments: dict[tuple[str, str], str] = {}
    owner = name = ""
    depth = 0
    modules = (schema, pair_stages, choices, mapping, curation, task_settings)
    source = "\n".join(inspect.getsource(module) for module in modules)
    tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    for token, following in itertools.pairwise(tokens):
        if token.string == "class":
            owner, name = following.string, ""
        elif token.type == tokenize.NAME and following.string in (":", "=") and token.start[1] == 4 and depth == 0:
            name = token.string
        elif token.type == tokenize.COMMENT and owner and name and token.start[1] > 4:
            comments.setdefault((owner, name), token.string.lstrip("# "))
        depth += (token.string in ("(", "[", "{")) - (token.string in (")", "]", "}"))
    return comments


def describe_type(hint: Any) -> str:
    """Describe a type for users: "a number", "one of align, sft, highres, dpo", ..."""
    if get_origin(hint) in (UnionType, Union):
        return " or ".join(describe_type(option) for option in get_args(hint))
    if hint == list[Any]:
        return "a list"
    if get_origin(hint) is list:
        return f"a list, each {describe_type(get_args(hint)[0])}"
    if get_origin(hint) is tuple:
        return f"a list of {len(get_args(hint))} numbers"
    if inspect.isclass(hint) and issubclass(hint, Enum):
        return "one of " + ", ".join(hint.__members__)
    names = {
        str: "text",
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        NoneType: "null",
        Any: "anything",
    }
    return names.get(hint, "keys and values")


def find_nearest_key(key: str, keys: list[str]) -> str | None:
    """Find the setting that was probably meant: by a known alias, by the last part of the key, or by similarity."""
    last = key.rpartition(".")[2]
    if key in KEY_ALIASES or last in KEY_ALIASES:
        return KEY_ALIASES.get(key) or KEY_ALIASES[last]
    same_name = [candidate for candidate in keys if candidate.rpartition(".")[2] == last]
    if ".lora." in "".join(same_name) and not any(part in key for part in ("vision", "proje")):
        same_name = [candidate for candidate in same_name if "language_model" in candidate]  # what LoRA is used for
    if same_name:
        return find_nearest(key, same_name) or min(same_name, key=len)
    matches = difflib.get_close_matches(key, keys, n=1, cutoff=0.8)
    if matches:
        return matches[0]
    nearest_name = find_nearest(last, sorted({candidate.rpartition(".")[2] for candidate in keys}))
    return (
        find_nearest_key(f"{key.rpartition('.')[0]}.{nearest_name}", keys) if nearest_name else find_nearest(key, keys)
    )


MODEL_KEYS = ("model", "stage", "seed", "run_dir")  # read as a whole; of `data` and `trainer` only single settings


def read_model_config(settings: dict[str, Any], origin: str) -> RunConfig:
    """Read the settings of a stored run that define its model and its trained parts; all others have their defaults.

    Args:
        settings: settings from a manifest, config.yaml or checkpoint.
        origin: where the settings are stored, for the message.

    Raises:
        UserError: the settings do not match this version.
    """
    selected = {key: settings[key] for key in MODEL_KEYS if key in settings}
    for group, names in {"data": ("tiling", "lock"), "trainer": ("precision",)}.items():
        section = settings.get(group) or {}
        selected[group] = {name: section[name] for name in names if name in section}
    try:
        expected = OmegaConf.structured(RunConfig)
        expected.stage = OmegaConf.structured(get_stage_config_class((settings.get("stage") or {}).get("name")))
        config = OmegaConf.to_object(OmegaConf.merge(expected, selected))
    except (OmegaConfBaseException, ValueError, TypeError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{origin}: its settings are not those of this version ({reason}).") from None
    assert isinstance(config, RunConfig)
    return config


ConfigClass = TypeVar("ConfigClass", bound=StageConfig)


def build_stage_config(config_class: type[ConfigClass], settings: Mapping[str, Any]) -> ConfigClass:
    """Build the config of a stage from plain keyword arguments of the same names; None is the default.

    Activation checkpointing is off by default: `auto` needs the memory of a device. True means `full`, False `none`.

    Raises:
        UserError: an unknown name, or a value of another type.
    """
    values = {key: str(value) if isinstance(value, Path) else value for key, value in settings.items()}
    values = {key: value for key, value in values.items() if value is not None}
    level = values.get("activation_checkpointing", False)
    values["activation_checkpointing"] = {True: "full", False: "none"}[level] if isinstance(level, bool) else level
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(config_class), values))
    except OmegaConfBaseException as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise UserError(
            f"stage.{error.full_key}: {reason}. Names and types are those of {config_class.__name__}."
        ) from None
    assert isinstance(config, config_class)
    config.adam_betas = (config.adam_betas[0], config.adam_betas[1])
    return config


def convert_to_plain(config: StageConfig) -> dict[str, Any]:
    """Convert a stage's config to plain containers: its settings by name, without the name of the stage."""
    plain: Any = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    return {key: value for key, value in plain.items() if key != "name"}
