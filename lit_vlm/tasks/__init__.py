"""Registry of the tasks that `task=` can name. A task is imported when it runs, so help and errors do not wait for torch."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from lit_vlm.config.parse import Run
from lit_vlm.config.schema import Task


def _late(place: str) -> Callable[[Run], None]:
    """Return a function that imports "module:name" at its first call, then calls it."""

    def task(run: Run) -> None:
        module, name = place.split(":")
        getattr(import_module(module), name)(run)

    return task


TASKS: dict[Task, Callable[[Run], None]] = {
    Task.pipeline: _late("lit_vlm.tasks.pipeline:pipeline"),
    Task.train: _late("lit_vlm.tasks.train:train"),
    Task.prepare: _late("lit_vlm.tasks.prepare:prepare"),
    Task.preflight: _late("lit_vlm.tasks.preflight:preflight"),
    Task.sweep: _late("lit_vlm.tasks.sweep:sweep"),
    Task.submit: _late("lit_vlm.tasks.submit:submit"),
    Task.prefer: _late("lit_vlm.tasks.prefer:prefer"),
    Task.export: _late("lit_vlm.tasks.export:export"),
    Task.sync: _late("lit_vlm.tasks.sync:sync"),
    Task.chat: _late("lit_vlm.tasks.chat:chat"),
}
