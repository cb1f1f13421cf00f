"""Parameter of a search space: its distribution by W&B's names, its values, and its grid points."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

from lit_vlm.config.settings import did_you_mean, nearest

RANGE, BELL, BETA = ("min", "max"), ("mu", "sigma"), ("a", "b")
# Distribution -> required keys. The prefix q_ rounds to multiples of q. The ends of log_... are exponents of e; the ends of
# log_..._values are the values themselves.
NEEDS: dict[str, tuple[str, ...]] = {
    "constant": ("value",),
    "categorical": ("values",),
    "categorical_w_probabilities": ("values", "probabilities"),
    "int_uniform": RANGE,
    "uniform": RANGE,
    "q_uniform": RANGE,
    "log_uniform": RANGE,
    "q_log_uniform": RANGE,
    "inv_log_uniform": RANGE,
    "log_uniform_values": RANGE,
    "q_log_uniform_values": RANGE,
    "inv_log_uniform_values": RANGE,
    "normal": (),
    "q_normal": (),
    "log_normal": (),
    "q_log_normal": (),
    "beta": BETA,
    "q_beta": BETA,
}
KEYS = ("value", "values", "probabilities", "distribution", "parameters", *RANGE, "q", *BELL, *BETA)
TAIL = 0.001  # probability on either side of a normal or beta distribution that is never sampled
LARGEST = 700  # maximum exponent of e that gives a finite number
MOST_POINTS = 10_000  # of a range in a grid
DIGITS = 6  # of a sampled value; more would only make the command line longer


@dataclass(frozen=True, slots=True)
class Parameter:
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
    def points(self) -> tuple[Any, ...] | None:
        """All values in order, for a grid; None if their number is not finite or above `MAX_GRID_POINTS`."""
        if self.values:
            return self.values
        step = 1.0 if self.distribution == "int_uniform" else self.q if self.distribution == "q_uniform" else None
        if step is None:
            return None
        first, last = math.ceil(self.min / step - 1e-9), math.floor(self.max / step + 1e-9)
        return (
            tuple(self._rounded(number * step) for number in range(first, last + 1))
            if last - first < MOST_POINTS
            else None
        )

    def value(self, raw: float) -> Any:
        """Convert a raw number to a value of the setting.

        Args:
            raw: a number between `min` and `max`; without a range, a probability from 0 to 1.
        """
        if self.is_range:
            return self._rounded(min(max(raw, self.min), self.max))
        if self.probabilities:
            return self.values[self._place(raw)]
        return self._rounded(self._quantile(raw))

    def shown(self) -> str:
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

    def samples(self) -> tuple[Any, ...]:
        """List values that represent all of them: the listed values, or both ends of the range and a value between."""
        if self.values:
            return self.values
        low, high = (self.min, self.max) if self.is_range else (TAIL, 1 - TAIL)
        # a point that is rarely a round number
        inner = math.sqrt(low * high) if self.is_log else low + 0.382 * (high - low)
        return tuple(dict.fromkeys(self.value(raw) for raw in (low, inner, high)))

    def _place(self, quantile: float) -> int:
        total = 0.0
        for index, probability in enumerate(self.probabilities):
            total += probability
            if quantile < total:
                return index
        return len(self.values) - 1

    def _quantile(self, raw: float) -> float:
        if "beta" in self.distribution:
            from scipy.stats import beta  # the import takes seconds and is rarely needed

            return float(beta.ppf(raw, self.a, self.b))
        found = NormalDist(self.mu, self.sigma).inv_cdf(raw)
        return math.exp(found) if "log" in self.distribution else found

    def _rounded(self, value: float) -> float | int:
        if self.distribution == "int_uniform":
            return round(value)
        if self.q:
            value = round(value / self.q) * self.q
            return round(value) if isinstance(self.q, int) else float(f"{value:.{DIGITS}g}")
        short = float(f"{value:.{DIGITS}g}")
        return min(max(short, self.min), self.max) if self.is_range else short


def parameters_from(plain: Any, wrong: list[str]) -> dict[str, Parameter]:
    """Parse the `parameters` of a sweep file.

    Args:
        errors: errors are appended to this list; a parameter with an error is omitted.

    Returns:
        The parameters by dotted key.
    """
    if not isinstance(plain, dict) or not plain:
        wrong.append(
            "parameters: is missing or empty; name what is tried, parameters: {stage.learning_rate: {values: [...]}}."
        )
        return {}
    parameters: dict[str, Parameter] = {}
    for key, entry in _leaves(plain, "", wrong):
        if key in parameters:
            wrong.append(f"parameters.{key}: is there twice, dotted and nested.")
        entry_errors = list(_mistakes(entry))
        wrong += [f"parameters.{key}{error}" for error in entry_errors]
        if not entry_errors:
            parameters[key] = _parameter(key, entry)
    return parameters


def _leaves(plain: dict[Any, Any], prefix: str, wrong: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, entry in plain.items():
        key = f"{prefix}{name}"
        if not isinstance(entry, dict):
            wrong.append(
                f"parameters.{key}: expected value, values, or min and max, found {entry!r}; for one value write {{value: {entry}}}."
            )
        elif isinstance(entry.get("parameters"), dict):
            yield from _leaves(entry["parameters"], f"{key}.", wrong)
        else:
            yield key, entry


def _mistakes(entry: dict[str, Any]) -> Iterator[str]:
    for key in entry:
        if key not in KEYS:
            yield f": there is no key {key}.{did_you_mean(nearest(str(key), KEYS))}"
    distribution = _distribution(entry)
    if distribution not in NEEDS:
        yield f".distribution: there is no {distribution}; there are {', '.join(NEEDS)}.{did_you_mean(nearest(str(distribution), list(NEEDS)))}"
        return
    missing = [key for key in NEEDS[distribution] if key not in entry]
    if missing:
        needed = (
            f"{distribution} needs {' and '.join(missing)}"
            if "distribution" in entry
            else "needs value, values, or min and max"
        )
        yield f": {needed}; found {entry}."
        return
    if distribution.startswith("categorical"):
        yield from _wrong_values(entry)
    elif distribution != "constant":
        yield from _wrong_numbers(entry, distribution)


def _distribution(entry: dict[str, Any]) -> str:
    """Return the distribution; if the file does not name it, infer it as W&B does."""
    if "distribution" in entry:
        return str(entry["distribution"])
    if "value" in entry:
        return "constant"
    if "values" in entry:
        return "categorical_w_probabilities" if "probabilities" in entry else "categorical"
    whole = all(isinstance(entry.get(key), int) for key in RANGE)
    return "int_uniform" if whole else "normal" if {"mu", "sigma"} & set(entry) else "uniform"


def _wrong_values(entry: dict[str, Any]) -> Iterator[str]:
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


def _wrong_numbers(entry: dict[str, Any], name: str) -> Iterator[str]:
    has_errors = False
    for key in (*RANGE, "q", *BELL, *BETA):
        if key in entry and not is_number(entry[key]):
            has_errors = True
            yield f".{key}: expected a number, found {entry[key]!r}.{_yaml_hint(entry[key])}"
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
    if name in ("log_uniform", "q_log_uniform", "inv_log_uniform") and (0 < low < high < 1 or high > LARGEST):
        yield (
            f": {name} takes exponents of e, and {low} to {high} would be {_exp(low)} to {_exp(high)};"
            f" for values write distribution: {name}_values."
        )


def _exp(value: float) -> str:
    return f"{math.exp(value):.3g}" if value < LARGEST else "beyond any number"


def is_number(value: Any) -> bool:
    """Return whether a value of the file is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _yaml_hint(value: Any) -> str:
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


def _parameter(key: str, entry: dict[str, Any]) -> Parameter:
    distribution = _distribution(entry)
    if distribution in ("constant", "categorical", "categorical_w_probabilities"):
        values = (entry["value"],) if distribution == "constant" else tuple(entry["values"])
        return Parameter(key, distribution, values, tuple(entry.get("probabilities") or ()))
    numbers = {word: entry[word] for word in (*BELL, *BETA) if word in entry}
    q = entry.get("q", 1) if distribution.startswith("q_") else None
    if "uniform" not in distribution:
        return Parameter(key, distribution, q=q, **numbers)
    low, high = entry["min"], entry["max"]
    if distribution in ("log_uniform", "q_log_uniform"):
        low, high = math.exp(low), math.exp(high)
    elif distribution == "inv_log_uniform":  # log(1/x) is uniform
        low, high = math.exp(-high), math.exp(-low)
    return Parameter(key, distribution, min=low, max=high, q=q)
