"""Instantiation of a user's own class by its import path. Naming the class on the command line is the permission to run it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from typing import Any

from lit_vlm.config.settings import find_nearest, format_suggestion
from lit_vlm.types import UserError


def is_class_path(name: str) -> bool:
    """Return True for the import path of a class: names with dots between them (my_package.MyClass)."""
    return "." in name and all(part.isidentifier() for part in name.split("."))


def import_path(setting: str, class_path: str) -> Any:
    """Import what stands at `package.module.Class`.

    Raises:
        UserError: it does not exist, or its module raises.
    """
    module, _, name = class_path.rpartition(".")
    try:
        return getattr(import_module(module), name)
    except Exception as error:  # the module is the user's, and may raise anything
        known = isinstance(error, ImportError | AttributeError | ValueError)
        found = f"{class_path} cannot be imported ({'' if known else f'{type(error).__name__}: '}{error})"
        raise UserError(f"{setting}: {found}. Give the path of a class that Python can import from here.") from error


def instantiate(setting: str, class_path: str, is_valid: Callable[[type], bool], expected: str, remedy: str) -> Any:
    """Instantiate the class at `package.module.Class` without arguments.

    Args:
        setting: key of the setting, for messages.
        is_valid: returns True if a class is of the required type.
        expected, remedy: what the class must be and how to correct the setting, as ends of sentences.

    Raises:
        UserError: the class does not exist, is of another type, or needs arguments.
    """
    target = import_path(setting, class_path)
    if not (inspect.isclass(target) and is_valid(target)):
        raise UserError(f"{setting}: {class_path} is not {expected}. {remedy}.")
    try:
        return target()
    except TypeError as error:
        reason = f"{setting}: {class_path} cannot be made without arguments ({error})"
        raise UserError(f"{reason}. Give its arguments defaults.") from error


ONLY_KEYWORD = "only"  # before other names: only these callbacks
DEFAULT_CALLBACKS = ("throughput", "language_loss", "guard", "samples", "report")
REQUIRED_CALLBACKS = (
    "metric",
    "out_of_memory",
    "checkpoint",
    "preemption",
    "heartbeat",
)  # part of every run, named or not
SETTING_CALLBACKS = {"export": "export", "profile": "trainer.profile"}  # name -> setting that enables it


def choose_callbacks(names: Sequence[str], *, export: bool, profile: bool) -> list[str]:
    """Choose the callbacks of a run.

    User classes and `profile` are added to the default callbacks. If default callbacks are named, only these are used; with
    `only`, no unnamed one is added. The names do not decide whether the model is exported.
    """
    chosen = [name for name in DEFAULT_CALLBACKS if name in names]
    user_classes = [name for name in names if name not in (*DEFAULT_CALLBACKS, *SETTING_CALLBACKS, ONLY_KEYWORD)]
    adds_defaults = bool(user_classes or "profile" in names) and not chosen and ONLY_KEYWORD not in names
    by_setting = {"export": export, "profile": profile or "profile" in names}
    return [
        *(DEFAULT_CALLBACKS if adds_defaults else chosen),
        *user_classes,
        *REQUIRED_CALLBACKS,
        *(name for name, wanted in by_setting.items() if wanted),
    ]


def find_callback_errors(names: Sequence[str]) -> Iterator[str]:
    """Yield an error message for each unknown name that is not an import path, and for repeated names."""
    known = [*DEFAULT_CALLBACKS, *SETTING_CALLBACKS, *REQUIRED_CALLBACKS, ONLY_KEYWORD]
    if repeated := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        yield f"callbacks: {', '.join(map(repr, repeated))} stands there more than once; name each callback once."
    for name in dict.fromkeys(names):
        if name in known:
            continue
        if not name or ("." in name and not all(part.isidentifier() for part in name.split("."))):
            detail = repr(name) if name else "an empty name"
            yield (
                f"callbacks: found {detail}; name one of {', '.join(known)}, or the import path of your own class, names"
                " with dots between them (my_package.MyCallback)."
            )
        elif "." not in name:
            detail = format_suggestion(find_nearest(name, known))
            yield (
                f"callbacks: there is no callback {name}; there are {', '.join(known)},"
                f" or the import path of your own class (my_package.MyCallback).{detail}"
            )
