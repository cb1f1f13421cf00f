"""What a run does beside training, in the order in which it is called. Each works in a notebook too."""

from __future__ import annotations

import inspect
from importlib import import_module
from pathlib import Path
from typing import Any

import lightning as L

from callbacks.export import Export
from callbacks.guard import Guard
from callbacks.language_loss import LanguageLoss
from callbacks.report import Report
from callbacks.samples import Samples
from callbacks.throughput import Throughput
from lit_vlm.types import UserError

CALLBACKS: dict[str, type[L.Callback]] = {
    "throughput": Throughput,
    "language_loss": LanguageLoss,
    "guard": Guard,
    "export": Export,
    "samples": Samples,
    "report": Report,
}
# The model is saved before held-out pictures are read once more; the report shows what all others left.
LAST = ("export", "samples", "report")

__all__ = ["CALLBACKS", "Export", "Guard", "LanguageLoss", "Report", "Samples", "Throughput", "make_callbacks"]


def make_callbacks(names: list[str], run_dir: Path, **options: Any) -> list[L.Callback]:
    """The callbacks of these names, in their order, those of `LAST` last.

    Args:
        names: of `CALLBACKS`, or import paths of classes that are constructed without arguments.
        options: arguments for those of ours that know them, as `max_samples` for `samples`.

    Raises:
        UserError: an unknown name, or a path that leads to no callback.
    """
    ordered = sorted(dict.fromkeys(names), key=lambda name: LAST.index(name) if name in LAST else -1)
    return [_make(name, {"run_dir": Path(run_dir), **options}) for name in ordered]


def _make(name: str, options: dict[str, Any]) -> L.Callback:
    if "." in name:
        return _imported(name)
    if name not in CALLBACKS:
        raise UserError(
            f"callbacks: there is no callback {name}; there are {', '.join(CALLBACKS)}, "
            "or the import path of your own class (my_package.MyCallback)."
        )
    known = inspect.signature(CALLBACKS[name]).parameters
    return CALLBACKS[name](**{key: value for key, value in options.items() if key in known})


def _imported(path: str) -> L.Callback:
    module, _, name = path.rpartition(".")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        reason = f"callbacks: {path} cannot be imported ({error})"
        raise UserError(f"{reason}. Give the path of a class that Python can import from here.") from error
    if not (inspect.isclass(found) and issubclass(found, L.Callback)):
        raise UserError(f"callbacks: {path} is not a class of lightning.Callback. Derive it from lightning.Callback.")
    try:
        return found()
    except TypeError as error:
        reason = f"callbacks: {path} cannot be made without arguments ({error})"
        raise UserError(f"{reason}. Give its arguments defaults.") from error
