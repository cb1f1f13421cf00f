"""Sweep files in W&B's format: search space, objective, search method, early stopping.

The same file works with `wandb sweep` and with `task=sweep`. Format and keys are those of W&B's documentation
(docs.wandb.ai/models/sweeps/sweep-config-keys). `lit_vlm/sweep/mistakes.py` checks that its keys and values are settings of
this program.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import yaml

from lit_vlm.config import ConfigError
from lit_vlm.config.settings import did_you_mean, nearest
from lit_vlm.config.yaml_text import Keys, read_yaml, wants_text
from lit_vlm.sweep.parameter import Parameter, is_number, parameters_from

KEYS = (
    "program command method metric parameters early_terminate run_cap name description project entity".split()
    + "controller parent_sweep imageuri job".split()  # of W&B's launcher and scheduler; they do not change the values
)
MOST_VALUES = 10**9  # more than any run logs
HYPERBAND = ("type", "min_iter", "max_iter", "s", "eta", "strict")


class Method(StrEnum):
    """Method that chooses the values of the next trial."""

    grid = "grid"
    random = "random"
    bayes = "bayes"


class Goal(StrEnum):
    """Direction of the objective."""

    minimize = "minimize"
    maximize = "maximize"


@dataclass(frozen=True, slots=True)
class Metric:
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

    place: str
    name: str
    method: Method
    parameters: dict[str, Parameter]
    metric: Metric | None = None
    early_terminate: Hyperband | None = None
    run_cap: int | None = None
    program: str | None = None
    command: list[str] | None = None
    description: str | None = None
    project: str | None = None
    entity: str | None = None
    plain: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def fixed(self) -> dict[str, Any]:
        """Parameters with a single value: key -> value."""
        return {key: parameter.values[0] for key, parameter in self.parameters.items() if parameter.is_fixed}

    @property
    def swept(self) -> dict[str, Parameter]:
        """Search space: the parameters with several values or a range."""
        return {key: parameter for key, parameter in self.parameters.items() if not parameter.is_fixed}

    @property
    def words(self) -> list[str]:
        """Overrides that the file's command names after the program; they are the same for every trial."""
        command = self.command or []
        start = command.index("${program}") + 1 if "${program}" in command else 0
        return [word for word in command[start:] if "=" in word and not word.startswith("$")]


def read_sweep(path: str | Path) -> SweepFile:
    """Read a sweep file.

    Raises:
        ConfigError: there is no such file, it is no YAML, or its structure has errors (all are listed).
    """
    return _sound(*look_at(path))


def sweep_from(plain: Any, place: str) -> SweepFile:
    """Parse the content of a sweep file.

    Args:
        raw: content of the YAML file.
        location: name of the file in messages.

    Raises:
        ConfigError: the structure has errors (all are listed).
    """
    return _sound(*draft(plain, place))


def look_at(path: str | Path) -> tuple[SweepFile, list[str]]:
    """Read a sweep file as far as possible.

    Returns:
        The sweep, and the errors of its structure.

    Raises:
        ConfigError: there is no such file, or it is no YAML.
    """
    path = Path(path)
    if not path.is_file():
        candidates = sorted(str(file) for file in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise ConfigError(
            [
                f"sweep={path}: there is no such file.{did_you_mean(nearest(str(path), candidates))} Name a sweep file, sweep=sweeps/<name>.yaml."
            ]
        )
    try:
        raw = read_yaml(path.read_text(encoding="utf-8"), _wants_text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError([f"{path}: is no YAML: {' '.join(str(error).split())}. Correct the file."]) from None
    return draft(raw, str(path))


def _wants_text(keys: Keys, written: str) -> bool:
    """Return whether a YAML value must stay text: names and commands of the sweep, and values of settings that are text."""
    if keys[:1] != ("parameters",):
        return keys[-1:] in (("name",), ("program",), ("command",), ("description",), ("project",), ("entity",))
    if keys[-1] not in ("value", "values"):
        return False
    return wants_text(".".join(key for key in keys[1:-1] if key != "parameters"), written)


def draft(plain: Any, place: str) -> tuple[SweepFile, list[str]]:
    """Parse the content of a sweep file as far as possible; return the sweep and the errors of its structure."""
    if not isinstance(plain, dict):
        raise ConfigError([f"{place}: a sweep file is keys and values (method, metric, parameters), found {plain!r}."])
    errors: list[str] = []
    method = _word(plain, "method", Method, errors)
    parsed = parameters_from(plain.get("parameters"), errors)
    sweep = SweepFile(
        place=place,
        name=str(plain.get("name") or Path(place).stem),
        method=method or Method.random,
        parameters=parsed,
        metric=_metric(plain.get("metric"), errors),
        early_terminate=_hyperband(plain.get("early_terminate"), errors),
        run_cap=_count(plain.get("run_cap"), "run_cap", errors),
        program=plain.get("program"),
        command=_command(plain.get("command"), errors),
        description=plain.get("description"),
        project=plain.get("project"),
        entity=plain.get("entity"),
        plain=plain,
    )
    errors += [f"there is no key {key}.{did_you_mean(nearest(str(key), KEYS))}" for key in plain if key not in KEYS]
    errors += _together(sweep, method)
    return sweep, [f"{place}: {error}" for error in errors]


def _sound(sweep: SweepFile, wrong: list[str]) -> SweepFile:
    """Return the sweep if there are no errors; raise ConfigError otherwise."""
    if wrong:
        raise ConfigError(wrong)
    return sweep


def _together(sweep: SweepFile, method: Method | None) -> Iterator[str]:
    """Find keys that are valid alone and contradict each other."""
    if method is Method.bayes and sweep.metric is None:
        yield "metric: method bayes learns from it; say metric: {name: val/loss, goal: minimize}."
    if sweep.early_terminate and sweep.metric is None:
        yield "metric: early_terminate compares trials by it; say metric: {name: val/loss, goal: minimize}."
    for key, parameter in sweep.parameters.items():
        if method is Method.grid and parameter.points is None:
            yield (
                f"parameters.{key}: a grid needs values, and {parameter.distribution} is a range without steps;"
                " list values, or take method random or bayes."
            )
        if method is not Method.grid and parameter.points == ():
            yield f"parameters.{key}: its range holds no value."


def _word(plain: dict[str, Any], key: str, kind: type[Method], wrong: list[str]) -> Method | None:
    value = plain.get(key)
    if value in list(kind):
        return kind(value)
    hint = did_you_mean(nearest(str(value), list(kind)))
    wrong.append(
        f"{key}: is missing; one of {', '.join(kind)}."
        if value is None
        else f"{key}: expected one of {', '.join(kind)}, found {value!r}.{hint}"
    )
    return None


def _metric(plain: Any, wrong: list[str]) -> Metric | None:
    if plain is None:
        return None
    if not isinstance(plain, dict) or not isinstance(plain.get("name"), str):
        wrong.append(f"metric: expected {{name: val/loss, goal: minimize}}, found {plain!r}.")
        return None
    for key in plain:
        if key not in ("name", "goal", "target"):
            wrong.append(f"metric: there is no key {key}.{did_you_mean(nearest(str(key), ('name', 'goal', 'target')))}")
    goal, target = plain.get("goal", "minimize"), plain.get("target")
    if goal not in list(Goal):
        wrong.append(
            f"metric.goal: expected minimize or maximize, found {goal!r}.{did_you_mean(nearest(str(goal), list(Goal)))}"
        )
        goal = "minimize"
    if target is not None and not is_number(target):
        wrong.append(f"metric.target: expected a number, found {target!r}.")
        target = None
    return Metric(plain["name"], Goal(goal), target)


def _hyperband(plain: Any, wrong: list[str]) -> Hyperband | None:
    if plain is None:
        return None
    if not isinstance(plain, dict) or plain.get("type") != "hyperband":
        wrong.append("early_terminate.type: W&B knows hyperband alone: {type: hyperband, min_iter: 3}.")
        return None
    for key in plain:
        if key not in HYPERBAND:
            wrong.append(f"early_terminate: there is no key {key}.{did_you_mean(nearest(str(key), HYPERBAND))}")
    min_iter, max_iter, num_rungs = (
        _count(plain.get(name), f"early_terminate.{name}", wrong) for name in ("min_iter", "max_iter", "s")
    )
    eta = plain.get("eta", 3)
    if not is_number(eta) or not eta > 1:
        wrong.append(f"early_terminate.eta: expected a number above 1, found {eta!r}.")
        return None
    if (min_iter is None) == (max_iter is None):
        wrong.append(
            "early_terminate: needs min_iter (values before the first comparison), or max_iter and s; one of them."
        )
        return None
    if min_iter is None and num_rungs is None:
        wrong.append("early_terminate.s: is missing; with max_iter it says how often trials are compared.")
        return None
    rungs = _rungs_from(min_iter, eta) if min_iter is not None else _rungs_below(max_iter, num_rungs, eta)
    if not rungs:
        wrong.append(
            f"early_terminate: max_iter {max_iter} divided by eta {eta} is below 1, so trials would never be compared."
        )
        return None
    return Hyperband(rungs, eta)


def _rungs_from(first: int, eta: float) -> tuple[int, ...]:
    """Compute the rungs of `min_iter`: a hundred rungs, each eta times the previous one, rounded down."""
    rungs, rung = set[int](), float(first)
    for _ in range(100):
        rungs.add(int(min(rung, MOST_VALUES)))
        rung *= eta
    return tuple(sorted(rungs))


def _rungs_below(most: int, times: int, eta: float) -> tuple[int, ...]:
    """Compute the rungs of `max_iter` and `s`: s rungs, each 1/eta of the next one; max_iter itself is no rung."""
    rungs, rung = set[int](), float(most)
    for _ in range(times):
        rung /= eta
        if rung < 1:
            break
        rungs.add(int(rung))
    return tuple(sorted(rungs))


def _count(found: Any, key: str, wrong: list[str]) -> int | None:
    if found is None:
        return None
    if isinstance(found, bool) or not isinstance(found, int) or found < 1:
        wrong.append(f"{key}: expected a whole number above 0, found {found!r}.")
        return None
    return found


def _command(found: Any, wrong: list[str]) -> list[str] | None:
    if found is None:
        return None
    if isinstance(found, str):
        found = shlex.split(found)
    if not isinstance(found, list) or not found:
        wrong.append(f"command: expected a list of words, found {found!r}.")
        return None
    return [str(word) for word in found]
