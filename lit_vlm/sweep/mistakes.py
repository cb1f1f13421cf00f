"""Validation of a sweep before its first trial: keys, values and metric against the schema."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lit_vlm.config import ConfigError, Run, RunConfig, parse
from lit_vlm.config.callbacks import choose_callbacks
from lit_vlm.config.overrides import key_of, read_arguments, with_implied
from lit_vlm.config.parse import wrong_words
from lit_vlm.config.schema import DPOStageConfig
from lit_vlm.config.settings import did_you_mean, nearest
from lit_vlm.sweep.file import SweepFile
from lit_vlm.sweep.parameter import Parameter
from lit_vlm.sweep.words import trial_words, value_words
from lit_vlm.types import Kind, Language

EACH_TRIALS_OWN = ("task", "recipe", "run_name", "run_dir", "overwrite", "resume_from", "sweep", "trials", "submit")
GROUPS = (*(language.value for language in Language if language is not Language.auto), *(kind.value for kind in Kind))
LOSSES = ("train/loss", "val/loss", *(f"val/loss_{group}" for group in GROUPS))
REWARDS = tuple(f"rewards/{name}" for name in ("accuracies", "margins", "chosen", "rejected"))
SCORES = tuple(f"score/{kind.value}_{language}" for kind in Kind for language in ("ko", "en"))
RATES = tuple(f"throughput/{name}" for name in ("tokens_per_second", "samples_per_second", "data_wait"))
FAMILIES = ("train/rewards/", "val/rewards/", "throughput/")  # families with more members than are listed here


def mistakes_in_sweep(sweep: SweepFile, overrides: list[str]) -> list[str]:
    """Find all errors in the file's keys, values and metric. Every value is composed as in a trial.

    Args:
        overrides: of the command line, for every trial.

    Returns:
        The error messages; [] for a valid sweep.
    """
    try:
        parsed = read_arguments(overrides)
    except ConfigError as error:
        return error.mistakes
    errors = list(_keys(sweep, parsed))
    bad_keys, value_errors = _values(sweep, parsed)
    errors += value_errors
    runs: list[Run] = []
    errors += _trials(sweep, parsed, bad_keys, runs)
    errors += _metric(sweep, runs[0].config if runs and not bad_keys else None)
    override_errors = {text for texts in _wrong(parsed).values() for text in texts} if value_errors else set()
    return [message if message in override_errors else f"{sweep.place}: {message}" for message in dict.fromkeys(errors)]


def _keys(sweep: SweepFile, given: list[str]) -> Iterator[str]:
    """Find keys that a trial may not vary, and keys that the command line sets as well."""
    for key in sweep.parameters:
        if key.lstrip("+~").partition(".")[0] in EACH_TRIALS_OWN:
            yield f"parameters.{key}: is not a trial's to vary; each trial gets a folder of its own and trains one stage."
    for override in given:
        if key_of(override) in sweep.swept:
            yield (
                f"parameters.{key_of(override)}: is swept, and the command line sets it to {override.partition('=')[2]}."
                " Take one of the two away."
            )


def _values(sweep: SweepFile, given: list[str]) -> tuple[set[str], list[str]]:
    """Find errors of keys, choices and types; each value is checked alone.

    Returns:
        The keys that no trial can use, and the error messages.
    """
    trial_overrides = trial_words(sweep, sweep.fixed, given)
    key_by_override = {override: key_of(override) for override in trial_overrides}
    for parameter in sweep.swept.values():
        for value in parameter.samples():
            key_by_override |= dict.fromkeys(value_words({parameter.key: value}), parameter.key)
    bad_keys, errors = set[str](), list[str]()
    for override, messages in _wrong(list(key_by_override)).items():
        key = key_by_override.get(override, "")
        bad_keys.add(key)
        errors += [message + _whole(sweep.parameters.get(key), message) for message in messages]
    return bad_keys, _once_per_key(errors)


def _once_per_key(wrong: list[str]) -> list[str]:
    """Drop repeated errors: a range of the wrong type gives the same error at both ends."""
    return list({mistake.partition(", found ")[0]: mistake for mistake in reversed(wrong)}.values())[::-1]


def _wrong(words: list[str]) -> dict[str, list[str]]:
    """Find the errors of each override: override -> error messages."""
    return wrong_words(with_implied(words))


def _whole(one: Parameter | None, mistake: str) -> str:
    """Return a hint for a range that must hold whole numbers; "" for other errors."""
    if one is None or not one.is_range or "a whole number" not in mistake:
        return ""
    return " Give the range whole ends (distribution: int_uniform), or q_uniform with a whole q."


def _trials(sweep: SweepFile, given: list[str], bad: set[str], runs: list[Run]) -> Iterator[str]:
    """Find contradictions between settings, in trials that use each value once. The valid runs are appended to `runs`."""
    columns = {key: parameter.samples() for key, parameter in sweep.swept.items() if key not in bad}
    num_rows = max((len(values) for values in columns.values()), default=1)
    # error message without the value that was found -> (message, values of the trial)
    errors: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for row in range(num_rows):
        values = {key: column[row % len(column)] for key, column in columns.items()}
        trial_overrides = [
            override for override in trial_words(sweep, {**sweep.fixed, **values}, given) if key_of(override) not in bad
        ]
        try:
            runs.append(parse([*trial_overrides, "run_name=trial"]))
        except ConfigError as error:
            for problem in error.mistakes:
                if not (bad and "is not set" in problem):  # a wrong override may have meant this setting
                    errors.setdefault(problem.partition(", found ")[0], []).append((problem, values))
    for rows in errors.values():
        problem, values = rows[0]
        pairs = ", ".join(f"{key}={value}" for key, value in values.items())
        yield (
            problem
            if {message for message, _ in rows} == {problem} and len(rows) == num_rows
            else f"{problem} (as with {pairs})"
        )


def _metric(sweep: SweepFile, config: RunConfig | None) -> Iterator[str]:
    """Find errors of the objective: no run of this stage logs the metric, or too rarely for early stopping."""
    if sweep.metric is None:
        return
    name = sweep.metric.name
    if name not in metric_names() and not name.startswith(FAMILIES):
        hint = did_you_mean(nearest(name, metric_names()))
        yield (
            f"metric.name: no run logs {name}; they log train/loss, val/loss, val/loss_ko, val/loss_en, val/rewards/*,"
            f" score/<kind>_<language>, throughput/*.{hint}"
        )
        return
    if config is None:
        return
    if "rewards/" in name and not isinstance(config.stage, DPOStageConfig):
        yield f"metric.name: {name} is logged by stage=dpo, and these trials train {config.stage.name.value}."
    if name.startswith("score/") and "samples" not in choose_callbacks(config.callbacks, export=False, profile=False):
        yield f"metric.name: {name} comes from the callback samples, which callbacks=[...] leaves out."
    if sweep.early_terminate is not None:
        yield from _too_seldom(name, sweep.early_terminate.rungs[0] + 1, config)


def _too_seldom(name: str, first: int, config: RunConfig) -> Iterator[str]:
    """Find reasons why early stopping would never compare the trials.

    Args:
        min_values: number of logged values before the first comparison.
    """
    if name.startswith("score/"):
        yield f"early_terminate: {name} is logged once, at the end, so nothing can be stopped early by it; take val/loss."
        return
    is_validation = name.startswith("val/")
    key = "data.validation.every_steps" if is_validation else "trainer.log_every_n_steps"
    every = config.data.validation.every_steps if is_validation else config.trainer.log_every_n_steps
    if every is None:
        yield f"early_terminate: {key} is not set, so {name} is logged once, at the end; set it, e.g. {key}=100."
    elif config.trainer.max_steps and config.trainer.max_steps // every < first:
        yield (
            f"early_terminate: the first comparison is after {first} values of {name}, and a run of"
            f" {config.trainer.max_steps} steps logs {config.trainer.max_steps // every}; lower early_terminate's first rung or {key}."
        )


def metric_names() -> list[str]:
    """List the metrics that runs log; of rewards and throughput only the most common ones."""
    rewards = [f"{split}/{name}" for split in ("train", "val") for name in REWARDS]
    return [*LOSSES, *rewards, *SCORES, *RATES]
