"""Overrides and command lines of trials, built from their values."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterable
from typing import Any

from lit_vlm.config.overrides import get_override_key, parse_json_overrides
from lit_vlm.sweep.file import SweepFile

_ENVIRONMENT_VARIABLE = re.compile(r"\$\{envvar:(\w+)\}")


def build_trial_overrides(sweep: SweepFile, parameters: dict[str, Any], overrides: list[str]) -> list[str]:
    """Build the overrides of one trial for `python run.py`, without its run name.

    The order is: overrides of the file's command, the values (as `${args_json}` gives them), overrides of the command line.
    A later override replaces an earlier one of the same key.
    """
    command_overrides = [
        _ENVIRONMENT_VARIABLE.sub(lambda match: os.environ.get(match[1], ""), override)
        for override in sweep.command_overrides
    ]
    by_key = {
        get_override_key(override): override
        for override in ["task=train", *command_overrides, *build_value_overrides(parameters), *overrides]
    }
    return list(by_key.values())


def build_value_overrides(parameters: dict[str, Any]) -> list[str]:
    """Build the overrides of some values in the same way as `${args_json}`."""
    return parse_json_overrides(json.dumps(parameters, ensure_ascii=False))


def format_trial_command(sweep: SweepFile, parameters: dict[str, Any], overrides: list[str]) -> str:
    """Format the shell command that runs a trial's values again, in its own folder, with the model exported at the end."""
    trial_overrides = [
        override
        for override in build_trial_overrides(sweep, parameters, overrides)
        if get_override_key(override) != "export"
    ]
    # an experiment implies the task
    has_experiment = any(get_override_key(override) == "experiment" for override in trial_overrides)
    return format_command(override for override in trial_overrides if not (has_experiment and override == "task=train"))


def format_command(overrides: Iterable[str]) -> str:
    """Format overrides as a shell command."""
    return f"python run.py {shlex.join(overrides)}"
