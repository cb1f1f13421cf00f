"""Overrides and command lines of trials, built from their values."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import yaml

from lit_vlm.config import ConfigError
from lit_vlm.config.overrides import get_override_key, parse_json_overrides
from lit_vlm.config.yaml_reader import KeyPath, is_text_setting, read_yaml
from lit_vlm.sweep.search_space import SweepParameter, is_number, parse_parameters
from lit_vlm.types import find_nearest, format_suggestion

_ENVIRONMENT_VARIABLE = re.compile(r"\$\{envvar:(\w+)\}")


def build_trial_overrides(sweep: SweepFile, parameters: dict[str, Any], overrides: list[str]) -> list[str]:
    """Build the overrides of one trial for `python run.py`, without its run name.

    The order is: overrides of the file's command, the values (as `${args_json}` gives them), overrides of the command line.
    A later override replaces an earlier one of the same key.
    """
    command_overrides = [
        _ENVIRONMENT_VARIABLE.sub(lambda match: os.environ.get(match[1], ""), override)
        for override in sweep.command_overrides
    ]
    by_key = {
        get_override_key(override): override
        for override in ["task=train", *command_overrides, *build_value_overrides(parameters), *overrides]
    }
    return list(by_key.values())


def build_value_overrides(parameters: dict[str, Any]) -> list[str]:
    """Build the overrides of some values in the same way as `${args_json}`."""
    return parse_json_overrides(json.dumps(parameters, ensure_ascii=False))


def format_trial_command(sweep: SweepFile, parameters: dict[str, Any], overrides: list[str]) -> str:
    """Format the shell command that runs a trial's values again, in its own folder, with the model exported at the end."""
    trial_overrides = [
        override
        for override in build_trial_overrides(sweep, parameters, overrides)
        if get_override_key(override) != "export"
    ]
    # an experiment implies the task
    has_experiment = any(get_override_key(override) == "experiment" for override in trial_overrides)
    return format_command(override for override in trial_overrides if not (has_experiment and override == "task=train"))


def format_command(overrides: Iterable[str]) -> str:
    """Format overrides as a shell command."""
    return f"python run.py {shlex.join(overrides)}"


SWEEP_KEYS = (
    "program command method metric parameters early_terminate run_cap name description project entity".split()
    + "controller parent_sweep imageuri job".split()  # of W&B's launcher and scheduler; they do not change the values
)
MAX_LOGGED_VALUES = 10**9  # more than any run logs
HYPERBAND_KEYS = ("type", "min_iter", "max_iter", "s", "eta", "strict")


class SearchMethod(StrEnum):
    """Method that chooses the values of the next trial."""

    grid = "grid"
    random = "random"
    bayes = "bayes"


class Goal(StrEnum):
    """Direction of the objective."""

    minimize = "minimize"
    maximize = "maximize"


@dataclass(frozen=True, slots=True)
class Objective:
    """Objective of the sweep: the metric that compares trials.

    Attributes:
        target: a finished trial that reaches this value ends the sweep; None: no target.
    """

    name: str
    goal: Goal = Goal.minimize
    target: float | None = None


@dataclass(frozen=True, slots=True)
class Hyperband:
    """Early stopping by hyperband (`early_terminate`), as W&B's public `sweeps` 0.2.0 computes it.

    An iteration is one logged value of the metric.

    Attributes:
        rungs: numbers of values after which trials are compared: with a rung at 2, a trial is compared from its third value.
        eta: a trial must be among the best 1/eta of the values at a rung.
    """

    rungs: tuple[int, ...]
    eta: float = 3


@dataclass(frozen=True, slots=True)
class SweepFile:
    """Parsed sweep file.

    Attributes:
        location: the file, as messages name it.
        parameters: by dotted key, in the order of the file; those with a single value are `fixed`, the others are the
            `search_space`.
        command: W&B's list; None means `${env} ${interpreter} ${program} ${args_json}`.
        raw: the file as it was read.
    """

    location: str
    name: str
    method: SearchMethod
    parameters: dict[str, SweepParameter]
    metric: Objective | None = None
    early_terminate: Hyperband | None = None
    run_cap: int | None = None
    program: str | None = None
    command: list[str] | None = None
    description: str | None = None
    project: str | None = None
    entity: str | None = None
    raw: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def goal(self) -> Goal:
        """Direction of the metric; of a random or grid search without a metric: minimize."""
        return self.metric.goal if self.metric else Goal.minimize

    @property
    def fixed(self) -> dict[str, Any]:
        """Parameters with a single value: key -> value."""
        return {key: parameter.values[0] for key, parameter in self.parameters.items() if parameter.is_fixed}

    @property
    def search_space(self) -> dict[str, SweepParameter]:
        """Search space: the parameters with several values or a range."""
        return {key: parameter for key, parameter in self.parameters.items() if not parameter.is_fixed}

    @property
    def command_overrides(self) -> list[str]:
        """Overrides that the file's command names after the program; they are the same for every trial."""
        command = self.command or []
        start = command.index("${program}") + 1 if "${program}" in command else 0
        return [word for word in command[start:] if "=" in word and not word.startswith("$")]


def read_sweep(path: str | Path) -> SweepFile:
    """Read a sweep file.

    Raises:
        ConfigError: there is no such file, it is no YAML, or its structure has errors (all are listed).
    """
    return _raise_errors(*try_read_sweep(path))


def parse_sweep(raw: Any, location: str) -> SweepFile:
    """Parse the content of a sweep file.

    Args:
        raw: content of the YAML file.
        location: name of the file in messages.

    Raises:
        ConfigError: the structure has errors (all are listed).
    """
    return _raise_errors(*try_parse_sweep(raw, location))


def try_read_sweep(path: str | Path) -> tuple[SweepFile, list[str]]:
    """Read a sweep file as far as possible.

    Returns:
        The sweep, and the errors of its structure.

    Raises:
        ConfigError: there is no such file, or it is no YAML.
    """
    path = Path(path)
    if not path.is_file():
        candidates = sorted(str(file) for file in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        suggestion = format_suggestion(find_nearest(str(path), candidates))
        raise ConfigError(
            [f"sweep={path}: there is no such file.{suggestion} Name a sweep file, sweep=sweeps/<name>.yaml."]
        )
    try:
        raw = read_yaml(path.read_text(encoding="utf-8"), _is_text_value)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError([f"{path}: is no YAML: {' '.join(str(error).split())}. Correct the file."]) from None
    return try_parse_sweep(raw, str(path))


def _is_text_value(keys: KeyPath, written: str) -> bool:
    """Return whether a YAML value must stay text: names and commands of the sweep, and values of settings that are text."""
    if keys[:1] != ("parameters",):
        return keys[-1:] in (("name",), ("program",), ("command",), ("description",), ("project",), ("entity",))
    if keys[-1] not in ("value", "values"):
        return False
    return is_text_setting(".".join(key for key in keys[1:-1] if key != "parameters"), written)


def try_parse_sweep(raw: Any, location: str) -> tuple[SweepFile, list[str]]:
    """Parse the content of a sweep file as far as possible; return the sweep and the errors of its structure."""
    if not isinstance(raw, dict):
        raise ConfigError([f"{location}: a sweep file is keys and values (method, metric, parameters), found {raw!r}."])
    errors: list[str] = []
    method = _parse_choice(raw, "method", SearchMethod, errors)
    parsed = parse_parameters(raw.get("parameters"), errors)
    sweep = SweepFile(
        location=location,
        name=str(raw.get("name") or Path(location).stem),
        method=method or SearchMethod.random,
        parameters=parsed,
        metric=_parse_objective(raw.get("metric"), errors),
        early_terminate=_parse_hyperband(raw.get("early_terminate"), errors),
        run_cap=_parse_count(raw.get("run_cap"), "run_cap", errors),
        program=raw.get("program"),
        command=_parse_command(raw.get("command"), errors),
        description=raw.get("description"),
        project=raw.get("project"),
        entity=raw.get("entity"),
        raw=raw,
    )
    errors += [
        f"there is no key {key}.{format_suggestion(find_nearest(str(key), SWEEP_KEYS))}"
        for key in raw
        if key not in SWEEP_KEYS
    ]
    errors += _find_conflicts(sweep, method)
    return sweep, [f"{location}: {error}" for error in errors]


def _raise_errors(sweep: SweepFile, errors: list[str]) -> SweepFile:
    """Return the sweep if there are no errors; raise ConfigError otherwise."""
    if errors:
        raise ConfigError(errors)
    return sweep


def _find_conflicts(sweep: SweepFile, method: SearchMethod | None) -> Iterator[str]:
    """Find keys that are valid alone and contradict each other."""
    if method is SearchMethod.bayes and sweep.metric is None:
        yield "metric: method bayes learns from it; say metric: {name: val/loss, goal: minimize}."
    if sweep.early_terminate and sweep.metric is None:
        yield "metric: early_terminate compares trials by it; say metric: {name: val/loss, goal: minimize}."
    for key, parameter in sweep.parameters.items():
        if method is SearchMethod.grid and parameter.grid_points is None:
            yield (
                f"parameters.{key}: a grid needs values, and {parameter.distribution} is a range without steps;"
                " list values, or take method random or bayes."
            )
        if method is not SearchMethod.grid and parameter.grid_points == ():
            yield f"parameters.{key}: its range holds no value."


def _parse_choice(
    raw: dict[str, Any], key: str, enum_type: type[SearchMethod], errors: list[str]
) -> SearchMethod | None:
    value = raw.get(key)
    if value in list(enum_type):
        return enum_type(value)
    hint = format_suggestion(find_nearest(str(value), list(enum_type)))
    errors.append(
        f"{key}: is missing; one of {', '.join(enum_type)}."
        if value is None
        else f"{key}: expected one of {', '.join(enum_type)}, found {value!r}.{hint}"
    )
    return None


def _parse_objective(raw: Any, errors: list[str]) -> Objective | None:
    if raw is None:
        return None
    if not isinstance(raw, dict) or not isinstance(raw.get("name"), str):
        errors.append(f"metric: expected {{name: val/loss, goal: minimize}}, found {raw!r}.")
        return None
    for key in raw:
        if key not in ("name", "goal", "target"):
            errors.append(
                f"metric: there is no key {key}.{format_suggestion(find_nearest(str(key), ('name', 'goal', 'target')))}"
            )
    goal, target = raw.get("goal", "minimize"), raw.get("target")
    if goal not in list(Goal):
        errors.append(
            f"metric.goal: expected minimize or maximize, found {goal!r}.{format_suggestion(find_nearest(str(goal), list(Goal)))}"
        )
        goal = "minimize"
    if target is not None and not is_number(target):
        errors.append(f"metric.target: expected a number, found {target!r}.")
        target = None
    return Objective(raw["name"], Goal(goal), target)


def _parse_hyperband(raw: Any, errors: list[str]) -> Hyperband | None:
    if raw is None:
        return None
    if not isinstance(raw, dict) or raw.get("type") != "hyperband":
        errors.append("early_terminate.type: W&B knows hyperband alone: {type: hyperband, min_iter: 3}.")
        return None
    for key in raw:
        if key not in HYPERBAND_KEYS:
            errors.append(
                f"early_terminate: there is no key {key}.{format_suggestion(find_nearest(str(key), HYPERBAND_KEYS))}"
            )
    min_iter, max_iter, num_rungs = (
        _parse_count(raw.get(name), f"early_terminate.{name}", errors) for name in ("min_iter", "max_iter", "s")
    )
    eta = raw.get("eta", 3)
    if not is_number(eta) or not eta > 1:
        errors.append(f"early_terminate.eta: expected a number above 1, found {eta!r}.")
        return None
    if (min_iter is None) == (max_iter is None):
        errors.append(
            "early_terminate: needs min_iter (values before the first comparison), or max_iter and s; one of them."
        )
        return None
    if min_iter is not None:
        rungs = _compute_rungs_from_min_iter(min_iter, eta)
    elif max_iter is not None and num_rungs is not None:
        rungs = _compute_rungs_below_max_iter(max_iter, num_rungs, eta)
    else:
        errors.append("early_terminate.s: is missing; with max_iter it says how often trials are compared.")
        return None
    if not rungs:
        errors.append(
            f"early_terminate: max_iter {max_iter} divided by eta {eta} is below 1, so trials would never be compared."
        )
        return None
    return Hyperband(rungs, eta)


def _compute_rungs_from_min_iter(min_iter: int, eta: float) -> tuple[int, ...]:
    """Compute the rungs of `min_iter`: a hundred rungs, each eta times the previous one, rounded down."""
    rungs, rung = set[int](), float(min_iter)
    for _ in range(100):
        rungs.add(int(min(rung, MAX_LOGGED_VALUES)))
        rung *= eta
    return tuple(sorted(rungs))


def _compute_rungs_below_max_iter(max_iter: int, num_rungs: int, eta: float) -> tuple[int, ...]:
    """Compute the rungs of `max_iter` and `s`: s rungs, each 1/eta of the next one; max_iter itself is no rung."""
    rungs, rung = set[int](), float(max_iter)
    for _ in range(num_rungs):
        rung /= eta
        if rung < 1:
            break
        rungs.add(int(rung))
    return tuple(sorted(rungs))


def _parse_count(value: Any, key: str, errors: list[str]) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        errors.append(f"{key}: expected a whole number above 0, found {value!r}.")
        return None
    return value


def _parse_command(value: Any, errors: list[str]) -> list[str] | None:
    if value is None:
        return None
    if isinstance(value, str):
        value = shlex.split(value)
    if not isinstance(value, list) or not value:
        errors.append(f"command: expected a list of words, found {value!r}.")
        return None
    return [str(word) for word in value]
