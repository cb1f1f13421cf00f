"""Comments of a sweep file: the reason for each range."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import yaml

from lit_vlm.types import find_nearest, format_suggestion

_COMMENT = re.compile(r"(?:^|\s)#\s?(.*)$")


def read_comments(path: Path) -> dict[str, str]:
    """Read the comments of each parameter (above it, after its name, and inside it) as one text, by dotted key.

    Returns {} if there is no such file.
    """
    if not path.is_file():
        return {}
    text = path.read_text(encoding="utf-8")
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    lines = text.splitlines()
    parameters = next((value for key, value in getattr(root, "value", []) if key.value == "parameters"), None)
    return _collect_comments(parameters, lines, "")


def _collect_comments(node: yaml.Node | None, lines: list[str], prefix: str) -> dict[str, str]:
    comments: dict[str, str] = {}
    for key, value in getattr(node, "value", []):
        name = f"{prefix}{key.value}"
        nested = next(
            (inner for inner_key, inner in getattr(value, "value", []) if _get_scalar(inner_key) == "parameters"), None
        )
        if nested is not None:
            comments |= _collect_comments(nested, lines, f"{name}.")
            continue
        first, last = key.start_mark.line, value.end_mark.line
        if isinstance(value, yaml.CollectionNode) and not value.flow_style:
            last -= 1  # the end mark of a block is the first line of the next one
        above = first
        while above and lines[above - 1].strip().startswith("#"):
            above -= 1
        own_lines = lines[above : last + 1]
        while len(own_lines) > first - above + 1 and (
            not own_lines[-1].strip() or own_lines[-1].strip().startswith("#")
        ):
            own_lines.pop()  # these comments belong to the next parameter
        texts = [match[1].strip() for line in own_lines if (match := _COMMENT.search(line))]
        comments[name] = " ".join(texts)
    return comments


def _get_scalar(node: object) -> str:
    return str(getattr(node, "value", ""))


RANGE_KEYS, NORMAL_KEYS, BETA_KEYS = ("min", "max"), ("mu", "sigma"), ("a", "b")
# Distribution -> required keys. The prefix q_ rounds to multiples of q. The ends of log_... are exponents of e; the ends of
# log_..._values are the values themselves.
REQUIRED_KEYS: dict[str, tuple[str, ...]] = {
    "constant": ("value",),
    "categorical": ("values",),
    "categorical_w_probabilities": ("values", "probabilities"),
    "int_uniform": RANGE_KEYS,
    "uniform": RANGE_KEYS,
    "q_uniform": RANGE_KEYS,
    "log_uniform": RANGE_KEYS,
    "q_log_uniform": RANGE_KEYS,
    "inv_log_uniform": RANGE_KEYS,
    "log_uniform_values": RANGE_KEYS,
    "q_log_uniform_values": RANGE_KEYS,
    "inv_log_uniform_values": RANGE_KEYS,
    "normal": (),
    "q_normal": (),
    "log_normal": (),
    "q_log_normal": (),
    "beta": BETA_KEYS,
    "q_beta": BETA_KEYS,
}
PARAMETER_KEYS = (
    "value",
    "values",
    "probabilities",
    "distribution",
    "parameters",
    *RANGE_KEYS,
    "q",
    *NORMAL_KEYS,
    *BETA_KEYS,
)
TAIL_PROBABILITY = 0.001  # probability on either side of a normal or beta distribution that is never sampled
MAX_EXPONENT = 700  # maximum exponent of e that gives a finite number
MAX_GRID_POINTS = 10_000  # of a range in a grid
SIGNIFICANT_DIGITS = 6  # of a sampled value; more would only make the command line longer


@dataclass(frozen=True, slots=True)
class SweepParameter:
    """Parameter of the search space: the values of one setting.

    Attributes:
        key: dotted key of the setting.
        values: the listed values; one value for a constant.
        min, max: ends of a range, as values (also if the file gives exponents).
        q: values are rounded to multiples of q; None: no rounding.
        mu, sigma: of a normal distribution.
        a, b: of a beta distribution.
    """

    key: str
    distribution: str
    values: tuple[Any, ...] = ()
    probabilities: tuple[float, ...] = ()
    min: float = 0.0
    max: float = 1.0
    q: float | None = None
    mu: float = 0.0
    sigma: float = 1.0
    a: float = 1.0
    b: float = 1.0

    @property
    def is_fixed(self) -> bool:
        return len(self.values) == 1

    @property
    def is_log(self) -> bool:
        return "log_uniform" in self.distribution

    @property
    def is_range(self) -> bool:
        """True if values lie between `min` and `max`; otherwise they are listed, or sampled by a quantile of the distribution."""
        return not self.values and "uniform" in self.distribution

    @property
    def grid_points(self) -> tuple[Any, ...] | None:
        """All values in order, for a grid; None if their number is not finite or above `MAX_GRID_POINTS`."""
        if self.values:
            return self.values
        step = 1.0 if self.distribution == "int_uniform" else self.q if self.distribution == "q_uniform" else None
        if step is None:
            return None
        first, last = math.ceil(self.min / step - 1e-9), math.floor(self.max / step + 1e-9)
        return (
            tuple(self._round_value(number * step) for number in range(first, last + 1))
            if last - first < MAX_GRID_POINTS
            else None
        )

    def convert_value(self, raw: float) -> Any:
        """Convert a raw number to a value of the setting.

        Args:
            raw: a number between `min` and `max`; without a range, a probability from 0 to 1.
        """
        if self.is_range:
            return self._round_value(min(max(raw, self.min), self.max))
        if self.probabilities:
            return self.values[self._find_category(raw)]
        return self._round_value(self._compute_quantile(raw))

    def format_values(self) -> str:
        """Format the values or the range for a table."""
        if self.is_fixed:
            return str(self.values[0])
        if self.values:
            return ", ".join(map(str, self.values))
        if self.is_range:
            step = f", steps of {self.q:g}" if self.q else ""
            return f"{self.min:g} to {self.max:g}{', logarithmic' if self.is_log else ''}{step}"
        shape = f"a {self.a:g}, b {self.b:g}" if "beta" in self.distribution else f"{self.mu:g} ± {self.sigma:g}"
        return f"{self.distribution}, {shape}"

    def list_example_values(self) -> tuple[Any, ...]:
        """List values that represent all of them: the listed values, or both ends of the range and a value between."""
        if self.values:
            return self.values
        low, high = (self.min, self.max) if self.is_range else (TAIL_PROBABILITY, 1 - TAIL_PROBABILITY)
        # a point that is rarely a round number
        inner = math.sqrt(low * high) if self.is_log else low + 0.382 * (high - low)
        return tuple(dict.fromkeys(self.convert_value(raw) for raw in (low, inner, high)))

    def _find_category(self, quantile: float) -> int:
        total = 0.0
        for index, probability in enumerate(self.probabilities):
            total += probability
            if quantile < total:
                return index
        return len(self.values) - 1

    def _compute_quantile(self, probability: float) -> float:
        if "beta" in self.distribution:
            from scipy.stats import beta  # the import takes seconds and is rarely needed

            return float(beta.ppf(probability, self.a, self.b))
        found = NormalDist(self.mu, self.sigma).inv_cdf(probability)
        return math.exp(found) if "log" in self.distribution else found

    def _round_value(self, value: float) -> float | int:
        if self.distribution == "int_uniform":
            return round(value)
        if self.q:
            value = round(value / self.q) * self.q
            return round(value) if isinstance(self.q, int) else float(f"{value:.{SIGNIFICANT_DIGITS}g}")
        short = float(f"{value:.{SIGNIFICANT_DIGITS}g}")
        return min(max(short, self.min), self.max) if self.is_range else short


def parse_parameters(raw: Any, errors: list[str]) -> dict[str, SweepParameter]:
    """Parse the `parameters` of a sweep file.

    Args:
        errors: errors are appended to this list; a parameter with an error is omitted.

    Returns:
        The parameters by dotted key.
    """
    if not isinstance(raw, dict) or not raw:
        errors.append(
            "parameters: is missing or empty; name what is tried, parameters: {stage.learning_rate: {values: [...]}}."
        )
        return {}
    parameters: dict[str, SweepParameter] = {}
    for key, entry in _flatten_entries(raw, "", errors):
        if key in parameters:
            errors.append(f"parameters.{key}: is there twice, dotted and nested.")
        entry_errors = list(_find_errors(entry))
        errors += [f"parameters.{key}{error}" for error in entry_errors]
        if not entry_errors:
            parameters[key] = _make_parameter(key, entry)
    return parameters


def _flatten_entries(raw: dict[Any, Any], prefix: str, errors: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, entry in raw.items():
        key = f"{prefix}{name}"
        if not isinstance(entry, dict):
            errors.append(
                f"parameters.{key}: expected value, values, or min and max, found {entry!r}; for one value write {{value: {entry}}}."
            )
        elif "parameters" not in entry and _is_nested(entry):
            inner = ", ".join(str(inner_key) for inner_key in entry)
            errors.append(
                f"parameters.{key}: nested parameters need a 'parameters:' between: {key}: {{parameters: {{{inner}: ...}}}};"
                f" or write the dotted keys {', '.join(f'{key}.{inner_key}' for inner_key in entry)}."
            )
        elif isinstance(entry.get("parameters"), dict):
            yield from _flatten_entries(entry["parameters"], f"{key}.", errors)
        else:
            yield key, entry


def _is_nested(entry: dict[Any, Any]) -> bool:
    """Return True for an entry that holds parameters itself: every key is a name, with a value, values or a range below it."""
    return bool(entry) and all(
        isinstance(inner, dict) and (set(inner) & set(PARAMETER_KEYS) or _is_nested(inner)) for inner in entry.values()
    )


def _find_errors(entry: dict[str, Any]) -> Iterator[str]:
    for key in entry:
        if key not in PARAMETER_KEYS:
            yield f": there is no key {key}.{format_suggestion(find_nearest(str(key), PARAMETER_KEYS))}"
    distribution = _infer_distribution(entry)
    if distribution not in REQUIRED_KEYS:
        suggestion = format_suggestion(find_nearest(str(distribution), list(REQUIRED_KEYS)))
        yield f".distribution: there is no {distribution}; there are {', '.join(REQUIRED_KEYS)}.{suggestion}"
        return
    missing = [key for key in REQUIRED_KEYS[distribution] if key not in entry]
    if missing:
        needed = (
            f"{distribution} needs {' and '.join(missing)}"
            if "distribution" in entry
            else "needs value, values, or min and max"
        )
        yield f": {needed}; found {entry}."
        return
    if distribution.startswith("categorical"):
        yield from _find_value_errors(entry)
    elif distribution != "constant":
        yield from _find_number_errors(entry, distribution)


def _infer_distribution(entry: dict[str, Any]) -> str:
    """Return the distribution; if the file does not name it, infer it as W&B does."""
    if "distribution" in entry:
        return str(entry["distribution"])
    if "value" in entry:
        return "constant"
    if "values" in entry:
        return "categorical_w_probabilities" if "probabilities" in entry else "categorical"
    whole = all(isinstance(entry.get(key), int) for key in RANGE_KEYS)
    return "int_uniform" if whole else "normal" if {"mu", "sigma"} & set(entry) else "uniform"


def _find_value_errors(entry: dict[str, Any]) -> Iterator[str]:
    values, probabilities = entry["values"], entry.get("probabilities")
    if not isinstance(values, list) or not values:
        yield f".values: expected a list with something in it, found {values!r}."
    elif probabilities is not None:
        are_valid = isinstance(probabilities, list) and all(
            is_number(probability) and probability >= 0 for probability in probabilities
        )
        if (
            not are_valid
            or len(probabilities) != len(values)
            or not math.isclose(sum(probabilities), 1.0, abs_tol=1e-6)
        ):
            yield f".probabilities: expected {len(values)} numbers that add up to 1, one for each value, found {probabilities!r}."


def _find_number_errors(entry: dict[str, Any], name: str) -> Iterator[str]:
    has_errors = False
    for key in (*RANGE_KEYS, "q", *NORMAL_KEYS, *BETA_KEYS):
        if key in entry and not is_number(entry[key]):
            has_errors = True
            yield f".{key}: expected a number, found {entry[key]!r}.{_get_yaml_hint(entry[key])}"
        elif key in ("q", "sigma", "a", "b") and key in entry and not entry[key] > 0:
            has_errors = True
            yield f".{key}: must be above 0, found {entry[key]!r}."
    if has_errors or "uniform" not in name:
        return
    low, high = entry["min"], entry["max"]
    if name == "int_uniform" and not (isinstance(low, int) and isinstance(high, int)):
        yield f": int_uniform is of whole numbers, found min {low} and max {high}."
    if not low < high:
        yield f".min: must be below max, found {low} and {high}."
    if name.endswith("_values") and not low > 0:
        yield f".min: a logarithmic range has its ends above 0, found {low}."
    if name in ("log_uniform", "q_log_uniform", "inv_log_uniform") and (0 < low < high < 1 or high > MAX_EXPONENT):
        yield (
            f": {name} takes exponents of e, and {low} to {high} would be {_format_exp(low)} to {_format_exp(high)};"
            f" for values write distribution: {name}_values."
        )


def _format_exp(value: float) -> str:
    return f"{math.exp(value):.3g}" if value < MAX_EXPONENT else "beyond any number"


def is_number(value: Any) -> bool:
    """Return whether a value of the file is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _get_yaml_hint(value: Any) -> str:
    """Return a hint for a number that YAML reads as text. YAML 1.1 needs a point in a number with an exponent, unlike `1e-5`."""
    try:
        number = float(value) if isinstance(value, str) else None
    except ValueError:
        return ""
    if number is None or not math.isfinite(number):
        return ""
    mantissa, letter, exponent = value.lower().partition("e")
    whole = mantissa if "." in mantissa else f"{mantissa}.0"
    sign = "" if exponent[:1] in ("+", "-") else "+"
    return f" YAML reads it as text; write {whole}e{sign}{exponent}." if letter else " Leave out the quotes."


def _make_parameter(key: str, entry: dict[str, Any]) -> SweepParameter:
    distribution = _infer_distribution(entry)
    if distribution in ("constant", "categorical", "categorical_w_probabilities"):
        values = (entry["value"],) if distribution == "constant" else tuple(entry["values"])
        return SweepParameter(key, distribution, values, tuple(entry.get("probabilities") or ()))
    numbers = {word: entry[word] for word in (*NORMAL_KEYS, *BETA_KEYS) if word in entry}
    q = entry.get("q", 1) if distribution.startswith("q_") else None
    if "uniform" not in distribution:
        return SweepParameter(key, distribution, q=q, **numbers)
    low, high = entry["min"], entry["max"]
    if distribution in ("log_uniform", "q_log_uniform"):
        low, high = math.exp(low), math.exp(high)
    elif distribution == "inv_log_uniform":  # log(1/x) is uniform
        low, high = math.exp(-high), math.exp(-low)
    return SweepParameter(key, distribution, min=low, max=high, q=q)
