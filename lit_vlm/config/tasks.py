"""Registry of the tasks that `task=` can name: the function of each, the checks of its settings, and the name of its run.

A function is named by its import path and imported when it runs, so help and errors do not wait for torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from lit_vlm.config import validation
from lit_vlm.config.choices import Task
from lit_vlm.config.endpoint_validation import find_judge_errors
from lit_vlm.config.evaluate_validation import find_evaluate_errors, get_evaluation_name
from lit_vlm.config.pair_stages import is_pair_stage
from lit_vlm.config.ranges import find_range_errors
from lit_vlm.config.schema import RunConfig, StageConfig
from lit_vlm.config.slurm_options import find_submit_errors
from lit_vlm.config.sweep_overrides import find_trial_errors

Check = Callable[[RunConfig], Iterable[str]]


@dataclass(frozen=True, slots=True)
class TaskEntry:
    """A task.

    Attributes:
        function: "module:name" of the function that runs it with a `Run`.
        checks: functions that yield the errors in its settings.
        get_run_name: returns the folder of its run below run_dir; None: that of the stage.
        pair_function: function for a stage that learns from image-text pairs; None: the same one.
        pair_error: reason for which the task does not know such a stage; "": it does.
    """

    function: str
    checks: tuple[Check, ...] = ()
    get_run_name: Callable[[RunConfig], str] | None = None
    pair_function: str | None = None
    pair_error: str = ""

    def get_function(self, stage: StageConfig) -> str:
        """Return the function for this stage."""
        return self.pair_function if self.pair_function and is_pair_stage(stage) else self.function


def _get_task_name(config: RunConfig) -> str:
    return config.task.value


def _get_curate_name(config: RunConfig) -> str:
    return config.run_name or config.task.value


def _get_sweep_name(config: RunConfig) -> str:
    return config.run_name or f"sweeps/{Path(config.sweep or 'sweep').stem}"


TASKS: dict[Task, TaskEntry] = {
    Task.pipeline: TaskEntry("lit_vlm.tasks.pipeline:run_pipeline"),
    Task.train: TaskEntry(
        "lit_vlm.tasks.train:train", validation.STAGE_CHECKS, pair_function="lit_vlm.tasks.train_pairs:train_pairs"
    ),
    Task.prepare: TaskEntry(
        "lit_vlm.tasks.prepare:prepare",
        validation.STAGE_CHECKS,
        pair_error="task=preflight reads and checks its records, and training builds the same index",
    ),
    Task.preflight: TaskEntry(
        "lit_vlm.tasks.preflight:run_preflight",
        validation.STAGE_CHECKS,
        pair_function="lit_vlm.tasks.train_pairs:preflight_pairs",
    ),
    Task.sweep: TaskEntry("lit_vlm.tasks.sweep:run_sweep", (find_trial_errors,), _get_sweep_name),
    Task.submit: TaskEntry("lit_vlm.tasks.submit:submit", (*validation.STAGE_CHECKS, find_submit_errors)),
    Task.prefer: TaskEntry("lit_vlm.tasks.prefer:generate_preferences", validation.PREFER_CHECKS, _get_task_name),
    Task.export: TaskEntry("lit_vlm.tasks.export:export"),
    Task.sync: TaskEntry("lit_vlm.tasks.sync:sync", (validation.find_sync_errors,), _get_task_name),
    Task.runs: TaskEntry("lit_vlm.tasks.runs:list_runs", (), _get_task_name),
    Task.chat: TaskEntry("lit_vlm.tasks.chat:run_chat", (), _get_task_name),
    Task.exam: TaskEntry("lit_vlm.tasks.exam:run_exam", (validation.find_exam_errors,), _get_task_name),
    Task.serve: TaskEntry("lit_vlm.tasks.serve:serve", (), _get_task_name),
    Task.demo: TaskEntry("lit_vlm.tasks.demo:show_demo", (), _get_task_name),
    Task.view: TaskEntry(
        "lit_vlm.tasks.view:view_data",
        validation.STAGE_CHECKS,
        pair_error="the page shows prompts and answers; see the records with another stage, e.g. stage=align",
    ),
    Task.evaluate: TaskEntry("lit_vlm.tasks.evaluate:evaluate", (find_evaluate_errors,), get_evaluation_name),
    Task.generate: TaskEntry("lit_vlm.tasks.generate:generate", validation.GENERATE_CHECKS, _get_curate_name),
    Task.curate: TaskEntry("lit_vlm.tasks.curate:curate", validation.CURATE_CHECKS, _get_curate_name),
    Task.judge: TaskEntry("lit_vlm.tasks.judge:judge_answers", (find_judge_errors,), _get_task_name),
}


def _find_stage_kind_errors(config: RunConfig) -> Iterable[str]:
    """Yield an error message if the task does not know a stage that learns from image-text pairs."""
    if is_pair_stage(config.stage) and (reason := TASKS[config.task].pair_error):
        yield f"task={config.task.value} is not there for stage={config.stage.name.value}: {reason}."


def find_config_errors(config: RunConfig) -> list[str]:
    """Return all errors of a config whose keys and types are valid; an empty list if it can run."""
    checks = (
        find_range_errors,
        validation.find_name_errors,
        validation.find_other_task_errors,
        _find_stage_kind_errors,
        *TASKS[config.task].checks,
    )
    return [error for check in checks for error in check(config)]
