"""What a run does beside training, in the order in which it is called. Each works in a notebook too."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import lightning as L

from callbacks.checkpoint import Checkpoint
from callbacks.export import Export
from callbacks.guard import Exchange, Guard
from callbacks.heartbeat import Heartbeat
from callbacks.language_loss import LanguageLoss
from callbacks.metric import Metric
from callbacks.out_of_memory import OutOfMemory
from callbacks.preemption import Preemption
from callbacks.profile import Profile
from callbacks.report import Report
from callbacks.samples import Samples
from callbacks.throughput import Throughput
from lit_vlm.config.custom import made_from
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
# The guard's exchange with the other ranks comes before what is measured after it.
FIRST = ("guard",)
# The model is saved before held-out pictures are read once more; the report shows what all others left; the heartbeat says
# what comes next once the others have done what they do in the same place.
LAST = ("export", "samples", "report", "heartbeat")

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
    """The callbacks of these names, in their order, but `FIRST` and `LAST`. Without the guard the ranks exchange all the same.

    Args:
        names: of `CALLBACKS`, or import paths of classes that are constructed without arguments.
        options: arguments for those of ours that know them, as `max_samples` for `samples`.

    Raises:
        UserError: an unknown name, or a path that leads to no callback.
    """
    places = dict.fromkeys(FIRST, -2) | {name: place for place, name in enumerate(LAST)}
    ordered = sorted(dict.fromkeys(names), key=lambda name: places.get(name, -1))
    made = [_make(name, {"run_dir": Path(run_dir), **options}) for name in ordered]
    return made if any(isinstance(callback, Exchange) for callback in made) else [Exchange(), *made]


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
    needed, remedy = "a class of lightning.Callback", "Derive it from lightning.Callback"
    return made_from("callbacks", path, lambda found: issubclass(found, L.Callback), needed, remedy)
