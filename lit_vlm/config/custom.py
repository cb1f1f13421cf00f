"""A class of the user's own, named on the command line by its import path: naming it is the permission to run it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib import import_module
from typing import Any

from lit_vlm.types import UserError


def made_from(setting: str, path: str, fits: Callable[[type], bool], needed: str, remedy: str) -> Any:
    """An object of the class at `package.module.Class`, made without arguments.

    Args:
        setting: for messages.
        fits: whether a class is of the kind that is needed.
        needed, remedy: what it must be and how to get there, as ends of sentences.

    Raises:
        UserError: nothing there, not such a class, or one that needs arguments.
    """
    module, _, name = path.rpartition(".")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        reason = f"{setting}: {path} cannot be imported ({error})"
        raise UserError(f"{reason}. Give the path of a class that Python can import from here.") from error
    if not (inspect.isclass(found) and fits(found)):
        raise UserError(f"{setting}: {path} is not {needed}. {remedy}.")
    try:
        return found()
    except TypeError as error:
        reason = f"{setting}: {path} cannot be made without arguments ({error})"
        raise UserError(f"{reason}. Give its arguments defaults.") from error
