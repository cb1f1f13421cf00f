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

from lit_vlm.config.yaml_text import quote_text
from lit_vlm.types import UserError

SOURCES = "data/source@data.sources"
CHECKPOINTING = {"true": "full", "false": "none"}  # former values -> levels
_BARE = re.compile(r"[A-Za-z_][A-Za-z0-9_./-]*\Z")
_WORDS = {"null", "true", "false", "inf", "nan", "none"}
_FLAG_WITH_VALUE = re.compile(r"--(cfg|info|package|config-(dir|name|path)|experimental-rerun)=")


class ConfigError(UserError):
    """Error with all faults of a configuration in one message, each fault once."""

    def __init__(self, mistakes: list[str]) -> None:
        self.mistakes = list(dict.fromkeys(mistakes))
        lines = "\n".join(f"- {error}" for error in self.mistakes)
        summary = f"{len(self.mistakes)} mistakes in the configuration:\n{lines}"
        super().__init__(self.mistakes[0] if len(self.mistakes) == 1 else summary)

    def __reduce__(self):
        return type(self), (self.mistakes,)


def read_arguments(arguments: list[str]) -> list[str]:
    """Parse command-line arguments to overrides that Hydra can parse.

    A JSON object (from `${args_json}` of a W&B sweep) becomes one override per key; a folder given with `--config-dir` becomes
    a search path; a value that only lacks quotes is quoted.

    Raises:
        ConfigError: lists every argument that is not an override.
    """
    overrides, errors = [], []
    for argument in _config_dir_as_search_path(arguments):
        try:
            overrides += from_json(argument) if argument.lstrip().startswith("{") else [_readable(argument)]
        except UserError as error:
            errors.append(str(error))
    if errors:
        raise ConfigError(errors)
    return overrides


def parsed(override: str) -> Override:
    """Parse one override with Hydra's parser."""
    return OverridesParser.create().parse_override(override)


def key_of(override: str) -> str:
    """Return the key of an override: `stage.learning_rate` of `++stage.learning_rate=1`."""
    return override.lstrip("+~").partition("=")[0]


def with_implied(overrides: list[str]) -> list[str]:
    """Add the overrides that the given ones imply, first, so that an explicit override wins.

    - `experiment=` selects one stage, so the task is train.
    - Ready sources are used alone unless `data=` is given. `data=` replaces the ready sources of an experiment.
    - `trainer.extra.*`, `data.share.kinds` and `submit.env` have keys that the schema does not list, so they get `++`.
    - `image=photo.jpg` and `sync=runs/a` are lists with one item.
    - Activation checkpointing may still be true or false instead of a level.
    - A value of a text setting is quoted if Hydra would parse it as a number.
    """
    keys = {key_of(override) for override in overrides}
    implied = []
    if "experiment" in keys and "task" not in keys:
        implied.append("task=train")
    if SOURCES in keys and "data" not in keys:
        implied.append("data=ready")
    if "data" in keys and SOURCES not in keys:
        implied.append(f"{SOURCES}=[]")  # instead of an experiment's sources, not beside them
    return implied + [quote_text(_spelled_out(text)) for text in overrides]


def _spelled_out(word: str) -> str:
    if word.startswith(("trainer.extra.", "data.share.kinds", "submit.env.")):
        return f"++{word}"
    key, _, value = word.partition("=")
    if key == "stage.activation_checkpointing" and value.lower() in CHECKPOINTING:
        return f"{key}={CHECKPOINTING[value.lower()]}"
    return (
        f"{key}=[{value}]" if key in ("image", "sync") and value and value[0] != "[" else word
    )  # one is a list of one


def from_json(text: str) -> list[str]:
    """Overrides of a JSON object of settings; keys may be dotted or nested."""
    try:
        settings = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{text!r} begins like a JSON object of settings but is none: {error}.") from None
    return [f"{key}={quote(value)}" for key, value in _flat(settings, "")]


def _flat(settings: dict[str, Any], prefix: str) -> list[tuple[str, Any]]:
    rows = []
    for key, value in settings.items():
        rows += _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else [(prefix + key, value)]
    return rows


def quote(value: Any) -> str:
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
        return "[" + ",".join(map(quote, value)) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{quote(key)}:{quote(item)}" for key, item in value.items()) + "}"
    text = str(value)
    if _BARE.match(text) and text.lower() not in _WORDS:
        return text
    # Inside quotes Hydra un-escapes \' and doubled backslashes only where a quote follows.
    body = re.sub(r"(\\*)'", lambda match: match.group(1) * 2 + "\\'", text)
    return "'" + re.sub(r"(\\+)\Z", lambda match: match.group(1) * 2, body) + "'"


def _readable(argument: str) -> str:
    """The argument, quoted if only its quotes are missing."""
    if argument.startswith("--") and "=" in argument:
        raise UserError(
            f"{argument}: settings are written without dashes: {argument.lstrip('-')}"
            " (in a W&B sweep use ${args_json} or ${args_no_hyphens})."
        )
    key, equals, value = argument.partition("=")
    if not equals and not argument.startswith("~"):
        raise UserError(
            f"{argument!r} is not a setting: write key=value, e.g. task={argument}. See python run.py --help."
        )
    for attempt in (argument, f"{key}={quote(value)}"):
        try:
            parsed(attempt)
            return attempt
        except HydraException:
            # A list or an object with a slip in it is a mistake, not a text.
            if value[:1] in "[{('\"":
                break
    raise UserError(f"{argument}: cannot be read; quote it for Hydra as well as for the shell: {key}=\"'...'\".")


def _config_dir_as_search_path(arguments: list[str]) -> list[str]:
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
    return others + ([f"hydra.searchpath={quote(folders)}"] if folders else [])


def split_flags(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Hydra's own flags (`--cfg job`, `-m`, `-sc`, ...) with their values, and the settings."""
    flags: list[str] = []
    overrides: list[str] = []
    remaining = iter(arguments)
    for argument in remaining:
        if argument in ("--config-dir", "-cd"):
            overrides += [argument, next(remaining, "")]
        elif argument.startswith("-") and (
            not argument.startswith("--") or "=" not in argument or _FLAG_WITH_VALUE.match(argument)
        ):
            (overrides if argument.startswith("--config-dir=") else flags).append(argument)
        elif "=" in argument or argument.startswith(("~", "{", "--")) or not flags:
            overrides.append(argument)
        else:
            flags.append(argument)  # the value of the flag before it
    return flags, overrides
