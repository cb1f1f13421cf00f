"""Functions of the tasks in `lit_vlm/config/tasks.py`. A task is imported when it runs, so help and errors do not wait for torch."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from lit_vlm.config import tasks
from lit_vlm.config.choices import Task
from lit_vlm.config.model_folders import require_model_folders
from lit_vlm.config.parse import Run
from lit_vlm.config.tasks import TaskEntry
from lit_vlm.imports import pause_collector


def _import_lazily(entry: TaskEntry) -> Callable[[Run], None]:
    """Return a function that imports the function of a task when it is called, then calls it."""

    def run_task(run: Run) -> None:
        module, name = entry.get_function(run.config.stage).split(":")
        if run.config.task is not Task.preflight:  # there it is a finding
            require_model_folders(run)
        with pause_collector():
            function = getattr(import_module(module), name)
        function(run)

    return run_task


TASKS: dict[Task, Callable[[Run], None]] = {task: _import_lazily(entry) for task, entry in tasks.TASKS.items()}
