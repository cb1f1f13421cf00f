"""Instantiation of a user's own class by its import path. Naming the class on the command line is the permission to run it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib import import_module
from typing import Any

from lit_vlm.types import UserError


def instantiate(setting: str, class_path: str, is_valid: Callable[[type], bool], expected: str, remedy: str) -> Any:
    """Instantiate the class at `package.module.Class` without arguments.

    Args:
        setting: key of the setting, for messages.
        is_valid: returns True if a class is of the required type.
        expected, remedy: what the class must be and how to correct the setting, as ends of sentences.

    Raises:
        UserError: the class does not exist, is of another type, or needs arguments.
    """
    module, _, name = class_path.rpartition(".")
    try:
        target = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        reason = f"{setting}: {class_path} cannot be imported ({error})"
        raise UserError(f"{reason}. Give the path of a class that Python can import from here.") from error
    if not (inspect.isclass(target) and is_valid(target)):
        raise UserError(f"{setting}: {class_path} is not {expected}. {remedy}.")
    try:
        return target()
    except TypeError as error:
        reason = f"{setting}: {class_path} cannot be made without arguments ({error})"
        raise UserError(f"{reason}. Give its arguments defaults.") from error
