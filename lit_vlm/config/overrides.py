"""Conversion of command-line arguments to Hydra overrides.

Values come from shells and from W&B. Values that are clear to a person but that Hydra's grammar cannot parse (Hangul, a JSON
object) are quoted here.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from lit_vlm.config.argument_errors import find_argument_errors
from lit_vlm.config.callbacks import convert_to_list
from lit_vlm.config.other_programs import format_key_remedy
from lit_vlm.config.yaml_reader import quote_text
from lit_vlm.types import UserError, flatten

SOURCES_KEY = "data/source@data.sources"
CHECKPOINTING_ALIASES = {"true": "full", "false": "none"}  # former values -> levels
_UNQUOTED_TEXT = re.compile(r"[A-Za-z_][A-Za-z0-9_./-]*\Z")
_RESERVED_WORDS = {"null", "true", "false", "inf", "nan", "none"}
HYDRA_FLAGS = set(
    "--help -h --hydra-help --version --resolve --run -r --multirun -m --config-dir -cd".split()
)  # flags without a value, and those that `parse_arguments` reads
HYDRA_FLAGS_WITH_VALUE = set(
    "--cfg -c --package -p --config-path -cp --config-name -cn --shell-completion -sc --experimental-rerun --info -i".split()
)
CONFIG_KINDS = ("job", "hydra", "all")  # values of --cfg


class ConfigError(UserError):
    """Error with all faults of a configuration in one message, each fault once."""

    def __init__(self, errors: list[str]) -> None:
        self.errors = list(dict.fromkeys(errors))
        lines = "\n".join(f"- {error}" for error in self.errors)
        summary = f"{len(self.errors)} mistakes in the configuration:\n{lines}"
        super().__init__(self.errors[0] if len(self.errors) == 1 else summary)

    def __reduce__(self):
        return type(self), (self.errors,)


def parse_arguments(arguments: list[str]) -> list[str]:
    """Parse command-line arguments to overrides that Hydra can parse.

    A JSON object (from `${args_json}` of a W&B sweep) becomes one override per key; a folder given with `--config-dir` becomes
    a search path; a value that only lacks quotes is quoted.

    Raises:
        ConfigError: lists every argument that is not an override.
    """
    given, errors = find_argument_errors(_convert_config_dirs(arguments))
    overrides = []
    for argument in given:
        try:
            overrides += (
                parse_json_overrides(argument) if argument.lstrip().startswith("{") else [_ensure_parsable(argument)]
            )
        except UserError as error:
            errors.append(str(error))
    if errors:
        raise ConfigError(errors)
    return overrides


def parse_override(override: str) -> Override:
    """Parse one override with Hydra's parser."""
    return OverridesParser.create().parse_override(override)


def get_override_key(override: str) -> str:
    """Return the key of an override: `stage.learning_rate` of `++stage.learning_rate=1`."""
    return override.lstrip("+~").partition("=")[0]


def split_sweep_values(override: str) -> list[str]:
    """Split an override with a comma list into one override per value; return any other override unchanged."""
    parsed_sweep = parse_override(override)
    if not parsed_sweep.is_choice_sweep():
        return [override]
    return [f"{override.partition('=')[0]}={value}" for value in parsed_sweep.sweep_string_iterator()]


def add_implied_overrides(overrides: list[str]) -> list[str]:
    """Add the overrides that the given ones imply, first, so that an explicit override wins.

    - `experiment=` selects one stage, so the task is train.
    - Ready sources are used alone unless `data=` is given. `data=` replaces the ready sources of an experiment.
    - `trainer.extra.*`, `data.share.kinds`, `submit.env`, `judge.extra` and `curate.balance.shares` have keys that the schema
      does not list, so they get `++`.
    - `image=photo.jpg` and `sync=runs/a` are lists with one item; `callbacks={name: {argument: value}}` is a list as well.
    - Activation checkpointing may still be true or false instead of a level.
    - A value of a text setting is quoted if Hydra would parse it as a number.
    """
    keys = {get_override_key(override) for override in overrides}
    implied = []
    if "experiment" in keys and "task" not in keys:
        implied.append("task=train")
    if SOURCES_KEY in keys and "data" not in keys:
        implied.append("data=ready")
    if "data" in keys and SOURCES_KEY not in keys:
        implied.append(f"{SOURCES_KEY}=[]")  # instead of an experiment's sources, not beside them
    return implied + [quote_text(_expand_override(text)) for text in overrides]


def _expand_override(override: str) -> str:
    if override.startswith(
        ("trainer.extra.", "data.share.kinds", "submit.env.", "judge.extra", "curate.balance.shares")
    ):
        return f"++{override}"
    key, _, value = override.partition("=")
    if key == "stage.activation_checkpointing" and value.lower() in CHECKPOINTING_ALIASES:
        return f"{key}={CHECKPOINTING_ALIASES[value.lower()]}"
    if key == "callbacks" and "{" in value:
        return _expand_callbacks(override)
    return (
        f"{key}=[{value}]" if key in ("image", "sync") and value and value[0] != "[" else override
    )  # one is a list of one


def _expand_callbacks(override: str) -> str:
    """Write {name: {argument: value}} as a list. A name that cannot stand in a list is left for the checks."""
    values = [convert_to_list(parse_override(text).value()) for text in split_sweep_values(override)]
    expanded = f"callbacks={','.join(map(quote_value, values))}"
    try:
        parse_override(expanded)
    except HydraException:
        return override
    return expanded


def parse_json_overrides(text: str) -> list[str]:
    """Overrides of a JSON object of settings; keys may be dotted or nested."""
    try:
        settings = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{text!r} begins like a JSON object of settings but is none: {error}.") from None
    if "callbacks" in settings:
        settings["callbacks"] = convert_to_list(settings["callbacks"])
    return [f"{key}={quote_value(value)}" for key, value in flatten(settings).items()]


def quote_value(value: Any) -> str:
    """A plain value in Hydra's grammar, so that it is parsed back to the same value."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(quote_value, value)) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{quote_value(key)}:{quote_value(item)}" for key, item in value.items()) + "}"
    text = str(value)
    if _UNQUOTED_TEXT.match(text) and text.lower() not in _RESERVED_WORDS:
        return text
    # Inside quotes Hydra un-escapes \' and doubled backslashes only where a quote follows.
    body = re.sub(r"(\\*)'", lambda match: match.group(1) * 2 + "\\'", text)
    return "'" + re.sub(r"(\\+)\Z", lambda match: match.group(1) * 2, body) + "'"


def _ensure_parsable(argument: str) -> str:
    """The argument, quoted if only its quotes are missing."""
    key, _, value = argument.partition("=")
    for attempt in (argument, f"{key}={quote_value(value)}"):
        try:
            parse_override(attempt)
            return attempt
        except HydraException:
            # A list or an object with a slip in it is a mistake, not a text.
            if value[:1] in "[{('\"":
                break
    raise UserError(f"{argument}: cannot be read; quote it for Hydra as well as for the shell: {key}=\"'...'\".")


def _convert_config_dirs(arguments: list[str]) -> list[str]:
    """`--config-dir FOLDER` of Hydra, in the form that also works without Hydra's own entry."""
    others, folders, remaining = [], [], iter(arguments)
    for argument in remaining:
        flag, equals, value = argument.partition("=")
        if flag in ("--config-dir", "-cd"):
            folder = Path(value if equals else next(remaining, "")).expanduser().resolve()
            if not folder.is_dir():
                raise UserError(f"--config-dir: there is no folder {folder}.")
            folders.append(f"file://{folder}")
        else:
            others.append(argument)
    return others + ([f"hydra.searchpath={quote_value(folders)}"] if folders else [])


def split_flags(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Split a command line into Hydra's own flags (`--cfg job`, `-m`, `-sc`, ...) with their values, and the settings."""
    flags: list[str] = []
    overrides: list[str] = []
    remaining = iter(arguments)
    takes_value = False  # the argument before is a flag that a value may follow
    for argument in remaining:
        name, equals, _ = argument.partition("=")
        if argument in ("--config-dir", "-cd"):
            overrides += [argument, next(remaining, "")]
            takes_value = False
        elif name in HYDRA_FLAGS | HYDRA_FLAGS_WITH_VALUE and name != "--config-dir":
            flags.append(argument)
            takes_value = not equals and (name in HYDRA_FLAGS_WITH_VALUE or name in ("--help", "-h"))
        elif takes_value and not equals and not argument.startswith(("-", "~", "{")):
            flags.append(argument)
            takes_value = False
        else:
            overrides.append(argument)
            takes_value = False
    return flags, overrides


def ensure_known_config_kind(flags: list[str]) -> None:
    """Raise ConfigError for `--cfg` or `-c` with a file: in other programs `-c` names a file of settings."""
    for flag, value in zip(flags, [*flags[1:], ""], strict=True):
        name, _, given = flag.partition("=")
        if name in ("--cfg", "-c") and (given or value) not in CONFIG_KINDS:
            text = f"{flag} {value}".strip()
            raise ConfigError(
                [
                    f"{text}: shows the settings of a command, and takes one of {', '.join(CONFIG_KINDS)}. {format_key_remedy('config', '')}."
                ]
            )
