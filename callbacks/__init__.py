"""Lightning callbacks of a training run, listed in their calling order. Each also works in a notebook."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import lightning as L

from callbacks.checkpoint import Checkpoint
from callbacks.export import Export, Report
from callbacks.guard import Exchange, Guard
from callbacks.heartbeat import Heartbeat
from callbacks.metrics import LanguageLoss, Metric
from callbacks.out_of_memory import OutOfMemory
from callbacks.preemption import Preemption
from callbacks.profile import Profile
from callbacks.samples import Samples
from callbacks.throughput import Throughput
from lit_vlm.config.callbacks import instantiate
from lit_vlm.types import UserError

CALLBACKS: dict[str, type[L.Callback]] = {
    "guard": Guard,
    "throughput": Throughput,
    "language_loss": LanguageLoss,
    "metric": Metric,
    "out_of_memory": OutOfMemory,
    "checkpoint": Checkpoint,
    "preemption": Preemption,
    "profile": Profile,
    "export": Export,
    "samples": Samples,
    "report": Report,
    "heartbeat": Heartbeat,
}
# The guard exchanges flags between ranks. Callbacks that measure the time after this exchange must come later.
FIRST_CALLBACKS = ("guard",)
# Export saves the model before `samples` reads held-out images again. The report shows the files of all other callbacks.
# The heartbeat is last: it sets the next activity after the other callbacks have finished the same hook.
LAST_CALLBACKS = ("export", "samples", "report", "heartbeat")

__all__ = [
    "CALLBACKS",
    "Checkpoint",
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
    "make_callbacks",
]


def make_callbacks(names: list[str], run_dir: Path, **options: Any) -> list[L.Callback]:
    """Make the named callbacks in the given order, with `FIRST_CALLBACKS` first and `LAST_CALLBACKS` last.

    Without the guard, a plain `Exchange` is added at the front, because signals and due checkpoints need the exchange.

    Args:
        names: keys of `CALLBACKS`, or import paths of classes whose constructors need no arguments.
        run_dir: run folder.
        options: constructor arguments. Each callback of `CALLBACKS` gets those that its signature names, e.g. `max_samples`
            for `samples`.

    Returns:
        The callbacks, each name once.

    Raises:
        UserError: a name is unknown, or an import path does not lead to a callback class.
    """
    order = dict.fromkeys(FIRST_CALLBACKS, -2) | {name: place for place, name in enumerate(LAST_CALLBACKS)}
    ordered = sorted(dict.fromkeys(names), key=lambda name: order.get(name, -1))
    callbacks = [_make_callback(name, {"run_dir": Path(run_dir), **options}) for name in ordered]
    return callbacks if any(isinstance(callback, Exchange) for callback in callbacks) else [Exchange(), *callbacks]


def _make_callback(name: str, options: dict[str, Any]) -> L.Callback:
    if "." in name:
        return _import_callback(name)
    if name not in CALLBACKS:
        raise UserError(
            f"callbacks: there is no callback {name}; there are {', '.join(CALLBACKS)}, "
            "or the import path of your own class (my_package.MyCallback)."
        )
    parameters = inspect.signature(CALLBACKS[name]).parameters
    return CALLBACKS[name](**{key: value for key, value in options.items() if key in parameters})


def _import_callback(path: str) -> L.Callback:
    needed, remedy = "a class of lightning.Callback", "Derive it from lightning.Callback"
    return instantiate("callbacks", path, lambda found: issubclass(found, L.Callback), needed, remedy)
