"""From a trial's values to the words of its command line."""

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
    """Overrides behind `python run.py` for one trial, without its name.

    The words of the file's command come first, then the values, as `${args_json}` would bring them, then what the command
    line gives to every trial; a later one takes the place of an earlier one of the same key.
    """
    own = [_VARIABLE.sub(lambda found: os.environ.get(found[1], ""), word) for word in sweep.words]
    together = {key_of(word): word for word in ["task=train", *own, *value_words(parameters), *given]}
    return list(together.values())


def value_words(parameters: dict[str, Any]) -> list[str]:
    """Overrides of some values, by the way that `${args_json}` takes."""
    return from_json(json.dumps(parameters, ensure_ascii=False))


def command_of(sweep: SweepFile, parameters: dict[str, Any], given: list[str]) -> str:
    """What to paste into a shell to run a trial's values once more, in a folder of its own, with the model at its end."""
    words = [word for word in trial_words(sweep, parameters, given) if key_of(word) != "export"]
    named = any(key_of(word) == "experiment" for word in words)  # which implies the task
    return command_line(word for word in words if not (named and word == "task=train"))


def command_line(words: Iterable[str]) -> str:
    """What to paste into a shell."""
    return f"python run.py {shlex.join(words)}"
