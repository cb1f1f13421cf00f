"""Registry of the tasks that `task=` can name. A task is imported when it runs, so help and errors do not wait for torch."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from lit_vlm.config.model_folders import require_model_folders
from lit_vlm.config.parse import Run
from lit_vlm.config.schema import Task


def _import_lazily(target: str) -> Callable[[Run], None]:
    """Return a function that imports "module:name" at its first call, then calls it."""

    def run_task(run: Run) -> None:
        if run.config.task is not Task.preflight:  # there it is a finding
            require_model_folders(run)
        module, name = target.split(":")
        getattr(import_module(module), name)(run)

    return run_task


TASKS: dict[Task, Callable[[Run], None]] = {
    Task.pipeline: _import_lazily("lit_vlm.tasks.pipeline:run_pipeline"),
    Task.train: _import_lazily("lit_vlm.tasks.train:train"),
    Task.prepare: _import_lazily("lit_vlm.tasks.prepare:prepare"),
    Task.preflight: _import_lazily("lit_vlm.tasks.preflight:run_preflight"),
    Task.sweep: _import_lazily("lit_vlm.tasks.sweep:run_sweep"),
    Task.submit: _import_lazily("lit_vlm.tasks.submit:submit"),
    Task.prefer: _import_lazily("lit_vlm.tasks.prefer:generate_preferences"),
    Task.export: _import_lazily("lit_vlm.tasks.export:export"),
    Task.sync: _import_lazily("lit_vlm.tasks.sync:sync"),
    Task.chat: _import_lazily("lit_vlm.tasks.chat:run_chat"),
}
