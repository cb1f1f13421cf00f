"""Validation of a sweep before its first trial: keys, values and metric against the schema."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lit_vlm.config import ConfigError, Run, parse
from lit_vlm.config.callbacks import choose_callbacks
from lit_vlm.config.overrides import add_implied_overrides, get_override_key, parse_arguments
from lit_vlm.config.pair_stages import RECALL_METRICS, PairStageConfig
from lit_vlm.config.parse import collect_override_errors
from lit_vlm.config.schema import StageConfig, TrainerConfig
from lit_vlm.evaluation.exam import list_exam_metrics
from lit_vlm.evaluation.metrics import list_score_names
from lit_vlm.sweep.search_space import SweepParameter
from lit_vlm.sweep.sweep_file import SweepFile, build_trial_overrides, build_value_overrides
from lit_vlm.types import Language, SampleKind, find_nearest, format_suggestion

RESERVED_KEYS = ("task", "recipe", "run_name", "run_dir", "overwrite", "resume_from", "sweep", "trials", "submit")
LOSS_GROUPS = (
    *(language.value for language in Language if language is not Language.auto),
    *(kind.value for kind in SampleKind),
)
LOSS_METRICS = ("train/loss", "val/loss", *(f"val/loss_{group}" for group in LOSS_GROUPS))
REWARD_METRICS = tuple(f"rewards/{name}" for name in ("accuracies", "margins", "chosen", "rejected"))
THROUGHPUT_METRICS = tuple(f"throughput/{name}" for name in ("tokens_per_second", "samples_per_second", "data_wait"))
Intervals = dict[str, tuple[str, int | None]]
METRIC_PREFIXES = ("train/rewards/", "val/rewards/", "throughput/")  # families with more members than are listed here


def find_sweep_errors(sweep: SweepFile, overrides: list[str]) -> list[str]:
    """Find all errors in the file's keys, values and metric. Every value is composed as in a trial.

    Args:
        overrides: of the command line, for every trial.

    Returns:
        The error messages; [] for a valid sweep.
    """
    try:
        parsed = parse_arguments(overrides)
    except ConfigError as error:
        return error.errors
    errors = list(_find_key_errors(sweep, parsed))
    bad_keys, value_errors = _find_value_errors(sweep, parsed)
    errors += value_errors
    trial_errors, first_run = _check_trials(sweep, parsed, bad_keys)
    errors += trial_errors
    errors += _find_objective_errors(sweep)
    if first_run is not None and not bad_keys:
        config = first_run.config
        intervals = {
            "val/": ("data.validation.every_steps", config.data.validation.every_steps),
            "exam/": ("evaluate.every_steps", config.evaluate.every_steps),
        }
        errors += _find_unlogged_errors(sweep, config.stage, config.trainer, config.callbacks, intervals)
    override_errors = (
        {text for texts in _find_override_errors(parsed).values() for text in texts} if value_errors else set()
    )
    return [
        message if message in override_errors else f"{sweep.location}: {message}" for message in dict.fromkeys(errors)
    ]


def _find_key_errors(sweep: SweepFile, overrides: list[str]) -> Iterator[str]:
    """Find keys that a trial may not vary, and keys that the command line sets as well."""
    for key in sweep.parameters:
        if key.lstrip("+~").partition(".")[0] in RESERVED_KEYS:
            yield f"parameters.{key}: is not a trial's to vary; each trial gets a folder of its own and trains one stage."
    for override in overrides:
        if get_override_key(override) in sweep.search_space:
            yield (
                f"parameters.{get_override_key(override)}: is swept, and the command line sets it to {override.partition('=')[2]}."
                " Take one of the two away."
            )


def _find_value_errors(sweep: SweepFile, overrides: list[str]) -> tuple[set[str], list[str]]:
    """Find errors of keys, choices and types; each value is checked alone.

    Returns:
        The keys that no trial can use, and the error messages.
    """
    trial_overrides = build_trial_overrides(sweep, sweep.fixed, overrides)
    key_by_override = {override: get_override_key(override) for override in trial_overrides}
    for parameter in sweep.search_space.values():
        for value in parameter.list_example_values():
            key_by_override |= dict.fromkeys(build_value_overrides({parameter.key: value}), parameter.key)
    bad_keys, errors = set[str](), list[str]()
    for override, messages in _find_override_errors(list(key_by_override)).items():
        key = key_by_override.get(override, "")
        bad_keys.add(key)
        errors += [message + _get_integer_hint(sweep.parameters.get(key), message) for message in messages]
    return bad_keys, _drop_repeated_errors(errors)


def _drop_repeated_errors(errors: list[str]) -> list[str]:
    """Drop repeated errors: a range of the wrong type gives the same error at both ends."""
    return list({mistake.partition(", found ")[0]: mistake for mistake in reversed(errors)}.values())[::-1]


def _find_override_errors(overrides: list[str]) -> dict[str, list[str]]:
    """Find the errors of each override: override -> error messages."""
    return collect_override_errors(add_implied_overrides(overrides))


def _get_integer_hint(parameter: SweepParameter | None, error: str) -> str:
    """Return a hint for a range that must hold whole numbers; "" for other errors."""
    if parameter is None or not parameter.is_range or "a whole number" not in error:
        return ""
    return " Give the range whole ends (distribution: int_uniform), or q_uniform with a whole q."


def _check_trials(sweep: SweepFile, overrides: list[str], bad_keys: set[str]) -> tuple[list[str], Run | None]:
    """Find contradictions between settings, in trials that use each value once.

    Returns:
        The error messages, and the first valid trial.
    """
    first_run = None
    columns = {
        key: parameter.list_example_values() for key, parameter in sweep.search_space.items() if key not in bad_keys
    }
    num_rows = max((len(values) for values in columns.values()), default=1)
    # error message without the value that was found -> (message, values of the trial)
    errors: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for row in range(num_rows):
        values = {key: column[row % len(column)] for key, column in columns.items()}
        trial_overrides = [
            override
            for override in build_trial_overrides(sweep, {**sweep.fixed, **values}, overrides)
            if get_override_key(override) not in bad_keys
        ]
        try:
            trial = parse([*trial_overrides, "run_name=trial"])
            first_run = first_run or trial
        except ConfigError as error:
            for problem in error.errors:
                if not (bad_keys and "is not set" in problem):  # a wrong override may have meant this setting
                    errors.setdefault(problem.partition(", found ")[0], []).append((problem, values))
    return [_format_trial_error(rows, num_rows) for rows in errors.values()], first_run


def _format_trial_error(rows: list[tuple[str, dict[str, Any]]], num_trials: int) -> str:
    """Format an error with the values of its first trial; without them if it is the same in all trials."""
    problem, values = rows[0]
    if {message for message, _ in rows} == {problem} and len(rows) == num_trials:
        return problem
    return f"{problem} (as with {', '.join(f'{key}={value}' for key, value in values.items())})"


def _find_objective_errors(sweep: SweepFile) -> Iterator[str]:
    """Find an objective that no run logs."""
    if sweep.metric is None:
        return
    name = sweep.metric.name
    if not _is_known_metric(name):
        hint = format_suggestion(find_nearest(name, list_metric_names()))
        yield (
            f"metric.name: no run logs {name}; they log train/loss, val/loss, val/loss_ko, val/loss_en, val/rewards/*,"
            f" score/<kind>_<language>, score/<metric>/<kind>_<language>, exam/*, throughput/*.{hint}"
        )


def _find_unlogged_errors(
    sweep: SweepFile, stage: StageConfig, trainer: TrainerConfig, callbacks: list[Any], intervals: Intervals
) -> Iterator[str]:
    """Find an objective that a trial does not log, or too rarely for early stopping.

    Args:
        intervals: setting and value of the optimizer steps between two values, by the beginning of a metric's name.
    """
    if sweep.metric is None or not _is_known_metric(sweep.metric.name):
        return
    name = sweep.metric.name
    known = stage.list_validation_metrics() if isinstance(stage, PairStageConfig) else None
    if name.startswith("val/") and (name not in known if known is not None else name in RECALL_METRICS):
        found = f"these trials train {stage.name.value}" + (f", which logs {', '.join(known)}" if known else "")
        yield f"metric.name: {name} is not logged: {found}."
        return
    if "rewards/" in name and not stage.preference_losses:
        yield f"metric.name: {name} is logged by stage=dpo, and these trials train {stage.name.value}."
    if name.startswith("score/") and "samples" not in choose_callbacks(callbacks, export=False, profile=False):
        yield f"metric.name: {name} comes from the callback samples, which callbacks=[...] leaves out."
    if name.startswith("exam/") and intervals["exam/"][1] is None:
        yield f"metric.name: {name} is logged with evaluate.every_steps=<steps>, which is not set."
        return
    if sweep.early_terminate is not None:
        min_values = sweep.early_terminate.rungs[0] + 1
        yield from _find_early_stopping_errors(name, min_values, trainer, intervals)


def _is_known_metric(name: str) -> bool:
    return name in list_metric_names() or name.startswith(METRIC_PREFIXES)


def _find_early_stopping_errors(
    name: str, min_values: int, trainer: TrainerConfig, intervals: Intervals
) -> Iterator[str]:
    """Find reasons why early stopping would never compare the trials.

    Args:
        min_values: number of logged values before the first comparison.
    """
    if name.startswith("score/"):
        yield f"early_terminate: {name} is logged once, at the end, so nothing can be stopped early by it; take val/loss."
        return
    default = ("trainer.log_every_n_steps", trainer.log_every_n_steps)
    key, every = next((known for prefix, known in intervals.items() if name.startswith(prefix)), default)
    if every is None:
        yield f"early_terminate: {key} is not set, so {name} is logged once, at the end; set it, e.g. {key}=100."
    elif trainer.max_steps and trainer.max_steps // every < min_values:
        yield (
            f"early_terminate: the first comparison is after {min_values} values of {name}, and a run of"
            f" {trainer.max_steps} steps logs {trainer.max_steps // every}; lower early_terminate's first rung or {key}."
        )


def list_metric_names() -> list[str]:
    """List the metrics that runs log; of rewards and throughput only the most common ones."""
    rewards = [f"{split}/{name}" for split in ("train", "val") for name in REWARD_METRICS]
    return [
        *LOSS_METRICS,
        *rewards,
        *RECALL_METRICS,
        *list_score_names(),
        *list_exam_metrics(),
        *THROUGHPUT_METRICS,
    ]
