"""Errors of command-line arguments that are no overrides: flags, words without `=`, spaces around `=`.

One message for each mistake, with the words to write instead. Arguments that belong together are one mistake:
`--lr 1e-4 --epochs 3`, or `experiment = tiny/2_sft`.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from lit_vlm.config.choices import Task
from lit_vlm.config.other_programs import CHOICE_ALIASES, KEY_ALIASES, format_key_remedy
from lit_vlm.config.schema import RunConfig
from lit_vlm.config.settings import find_nearest_key, get_field_types, list_settings
from lit_vlm.config.yaml_reader import is_text_setting

_CONFIG_FILE = re.compile(r"\.ya?ml$", re.IGNORECASE)
_GROUP_NAMES = ("experiment", "data", "model", "stage", "trainer", "logger")
_OVERRIDE = re.compile(r"[+~]*[\w./@<>-]+=[^=].*", re.DOTALL)


def is_override(argument: str) -> bool:
    """Return True if an argument has the form of an override, or of a JSON object of overrides."""
    if argument.lstrip().startswith("{") or argument.startswith("~"):
        return True
    return "=" in argument and not argument.startswith(("-", "="))


def find_argument_errors(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Find the arguments that are no overrides.

    Returns:
        The overrides, and one message for each group of other arguments.
    """
    overrides, errors, position = list[str](), list[str](), 0
    while position < len(arguments):
        end = position + 1
        if arguments[position].startswith("-"):
            while end < len(arguments) and not is_override(arguments[end]):
                end += 1
            errors.append(_format_flags(arguments[position:end]))
        elif (joined := _join_at_equals(arguments, position)) is not None:
            end, override = joined
            errors.append(
                f"{' '.join(arguments[position:end])}: has a space at its '='; write {shlex.quote(override)}, without it."
            )
        elif is_override(arguments[position]):
            while end < len(arguments) and _continues_value(arguments[end], arguments[position:end]):
                end += 1
            if end > position + 1:
                text = " ".join(arguments[position:end])
                errors.append(f"{text}: a value with spaces needs quotes: {shlex.quote(text)}.")
            else:
                overrides.append(arguments[position])
        else:
            errors.append(_format_word(arguments[position]))
        position = end
    return overrides, errors


def suggest_override(key: str, value: str) -> str:
    """Suggest the override for a key that may be another program's; empty if no setting is similar."""
    name = key.replace("-", "_")
    if name in _GROUP_NAMES or name in get_field_types(RunConfig):
        return f"{name}={value}"
    keys = [setting.key.replace("<name>", "mine") for setting in list_settings()]
    if name in keys:
        return f"{name}={value}"
    if format_key_remedy(name, value):
        return ""
    nearest = find_nearest_key(name, [*get_field_types(RunConfig), *keys])
    return f"{nearest}={value}" if nearest else ""


def _format_flags(arguments: list[str]) -> str:
    """Format the message for flags with their values, e.g. `--lr 1e-4 --bf16`."""
    pairs = list[tuple[str, str]]()
    for argument in arguments:
        if argument.startswith("-") and not re.match(r"-[\d.]", argument):
            key, _, value = argument.lstrip("-").partition("=")
            pairs.append((key, value))
        elif pairs:
            key, value = pairs[-1]
            pairs[-1] = key, f"{value} {argument}".strip()
    overrides, remedies = list[str](), list[str]()
    for key, value in pairs:
        if override := suggest_override(key, value or "true"):
            overrides.append(shlex.quote(override) if " " in override else override)
        elif remedy := format_key_remedy(key, value):
            remedies.append(f"{remedy}." if len(pairs) == 1 else f"{key}: {remedy}.")
        else:
            remedies.append(f"There is no setting {key}; python run.py --help settings lists all.")
    text = " ".join(arguments)
    if not overrides:
        return " ".join([f"{text}: no flag of run.py.", *remedies])
    sweep = " (in a W&B sweep use ${args_json} or ${args_no_hyphens})" if "=" in arguments[0] else ""
    return " ".join([f"{text}: settings are written without dashes: {' '.join(overrides)}{sweep}.", *remedies])


def _join_at_equals(arguments: list[str], start: int) -> tuple[int, str] | None:
    """Join `key = value`, `key= value` or `key =value`. Returns the end of these arguments and the override."""
    for size in (3, 2):
        texts = arguments[start : start + size]
        joined = "".join(texts)
        if len(texts) < size or not _OVERRIDE.fullmatch(joined) or is_override(texts[-1]):
            continue
        if (size == 3 and texts[1] == "=") or (size == 2 and (texts[0].endswith("=") or texts[1].startswith("="))):
            return start + size, joined
    return None


def _continues_value(argument: str, before: list[str]) -> bool:
    """Return True if a word continues the value before it: a text, or a list whose bracket is open."""
    if is_override(argument) or argument.startswith("-") or argument in Task.__members__ or argument.endswith(".py"):
        return False
    text = " ".join(before)
    is_open = any(text.count(opening) > text.count(closing) for opening, closing in ("[]", "{}", "()"))
    return is_open or is_text_setting(text.lstrip("+").partition("=")[0], argument)


def _format_word(word: str) -> str:
    """Format the message for a word without `=`."""
    if _CONFIG_FILE.search(word):
        return f"{word}: {format_key_remedy('config', word)}."
    if word.endswith(".py"):
        return f"{word}: the program is named once: python run.py key=value ..."
    return f"{word!r} is not a setting: write key=value, e.g. {_suggest_for_word(word)}. See python run.py --help."


def _suggest_for_word(word: str) -> str:
    task = CHOICE_ALIASES["task"].get(word.lower(), word)
    if task in Task.__members__ and word not in ("sft", "dpo", "align"):
        return f"task={task}"
    stage = CHOICE_ALIASES["stage"].get(word.lower(), word)
    if stage in ("align", "sft", "highres", "dpo"):
        number = ("align", "sft", "highres", "dpo").index(stage) + 1
        return f"experiment=tiny/{number}_{stage}"
    if re.fullmatch(r"[\w-]+/\d_\w+", word):
        return f"experiment={word}"
    key, colon, value = word.partition(":")
    if colon and value and suggest_override(key, value):
        return suggest_override(key, value)
    if Path(word).exists() or re.search(r"\.(jsonl?|csv|tsv|parquet|tar)$", word):
        return f"data=auto data.sources.mine.path={word}"
    if KEY_ALIASES.get(word) or word in get_field_types(RunConfig):
        return f"{KEY_ALIASES.get(word, word)}=..."
    return "task=train"
