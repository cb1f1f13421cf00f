"""Lightning callbacks of a training run, listed in their calling order. Each also works in a notebook."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import lightning as L

from callbacks.benchmarks import Benchmarks
from callbacks.checkpoint import Checkpoint
from callbacks.exam import Exam
from callbacks.export import Export, Report
from callbacks.guard import Exchange, Guard
from callbacks.heartbeat import Heartbeat
from callbacks.metrics import LanguageLoss, Metric
from callbacks.out_of_memory import OutOfMemory
from callbacks.preemption import Preemption
from callbacks.profile import Profile
from callbacks.samples import Samples
from callbacks.throughput import Throughput
from lit_vlm.config import callbacks as registry
from lit_vlm.config.user_classes import find_argument_errors, import_class, inspect_class, instantiate
from lit_vlm.types import UserError

__all__ = [
    "Benchmarks",
    "Checkpoint",
    "Exam",
    "Exchange",
    "Export",
    "Guard",
    "Heartbeat",
    "LanguageLoss",
    "Metric",
    "OutOfMemory",
    "Preemption",
    "Profile",
    "Report",
    "Samples",
    "Throughput",
    "get_callback_class",
    "make_callbacks",
]


def get_callback_class(name: str) -> type[L.Callback]:
    """Import the class of a callback in the registry."""
    module, _, class_name = registry.CALLBACKS[name].class_path.rpartition(".")
    return getattr(import_module(module), class_name)


def make_callbacks(
    chosen: Sequence[str] | Mapping[str, Mapping[str, Any]], run_dir: Path, **options: Any
) -> list[L.Callback]:
    """Make callbacks in the given order; those with an order of their own in the registry come first or last.

    Without the guard, a plain `Exchange` is added at the front, because signals and due checkpoints need the exchange.

    Args:
        chosen: names of the registry, or import paths of classes; as a mapping with their arguments.
        run_dir: run folder.
        options: constructor arguments. Each callback of the registry gets those that its signature names, e.g.
            `max_samples` for `samples`.

    Returns:
        The callbacks, each name once.

    Raises:
        UserError: a name is unknown, an import path does not lead to a callback class, or an argument does not exist.
    """
    arguments = dict(chosen) if isinstance(chosen, Mapping) else {name: {} for name in chosen}
    order = {name: entry.order for name, entry in registry.CALLBACKS.items()}
    callbacks = [
        _make_callback(name, arguments[name], {"run_dir": Path(run_dir), **options})
        for name in sorted(arguments, key=lambda name: order.get(name, 0))
    ]
    return callbacks if any(isinstance(callback, Exchange) for callback in callbacks) else [Exchange(), *callbacks]


def check_user_callbacks(chosen: Mapping[str, Mapping[str, Any]]) -> None:
    """Import the user's own callbacks and check their arguments.

    Raises:
        UserError: a class does not exist, is no callback, or does not have an argument.
    """
    for name, arguments in chosen.items():
        if name not in registry.CALLBACKS:
            target = import_class("callbacks", name, _is_callback, *EXPECTED_CLASS)
            if errors := list(find_argument_errors(name, arguments, inspect_class(target))):
                raise UserError(f"callbacks: {errors[0]}")


EXPECTED_CLASS = ("a class of lightning.Callback", "Derive it from lightning.Callback")


def _is_callback(found: type) -> bool:
    return issubclass(found, L.Callback)


def _make_callback(name: str, arguments: Mapping[str, Any], options: dict[str, Any]) -> L.Callback:
    if "." in name:
        return instantiate("callbacks", name, _is_callback, *EXPECTED_CLASS, arguments)
    if name not in registry.CALLBACKS:
        raise UserError(
            f"callbacks: there is no callback {name}; there are {', '.join(registry.CALLBACKS)}, "
            "or the import path of your own class (my_package.MyCallback)."
        )
    callback_class = get_callback_class(name)
    parameters = inspect.signature(callback_class).parameters
    return callback_class(**{key: value for key, value in options.items() if key in parameters}, **arguments)
