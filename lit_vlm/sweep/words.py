"""Overrides and command lines of trials, built from their values."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterable
from typing import Any

from lit_vlm.config.overrides import from_json, key_of
from lit_vlm.sweep.file import SweepFile

_VARIABLE = re.compile(r"\$\{envvar:(\w+)\}")


def trial_words(sweep: SweepFile, parameters: dict[str, Any], given: list[str]) -> list[str]:
    """Build the overrides of one trial for `python run.py`, without its run name.

    The order is: overrides of the file's command, the values (as `${args_json}` gives them), overrides of the command line.
    A later override replaces an earlier one of the same key.
    """
    command_overrides = [
        _VARIABLE.sub(lambda match: os.environ.get(match[1], ""), override) for override in sweep.words
    ]
    by_key = {
        key_of(override): override for override in ["task=train", *command_overrides, *value_words(parameters), *given]
    }
    return list(by_key.values())


def value_words(parameters: dict[str, Any]) -> list[str]:
    """Build the overrides of some values in the same way as `${args_json}`."""
    return from_json(json.dumps(parameters, ensure_ascii=False))


def command_of(sweep: SweepFile, parameters: dict[str, Any], given: list[str]) -> str:
    """Format the shell command that runs a trial's values again, in its own folder, with the model exported at the end."""
    trial_overrides = [override for override in trial_words(sweep, parameters, given) if key_of(override) != "export"]
    # an experiment implies the task
    has_experiment = any(key_of(override) == "experiment" for override in trial_overrides)
    return command_line(override for override in trial_overrides if not (has_experiment and override == "task=train"))


def command_line(words: Iterable[str]) -> str:
    """Format overrides as a shell command."""
    return f"python run.py {shlex.join(words)}"
