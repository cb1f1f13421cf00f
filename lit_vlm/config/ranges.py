"""Ranges of the numeric settings: declared beside the defaults in the schema, and validated here."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

MAX_COUNT = 2**53  # largest integer up to which JSON stores all integers exactly
YEAR_MINUTES, DAY_SECONDS = 366 * 24 * 60.0, 24 * 3600.0


@dataclass(frozen=True, slots=True)
class NumberRange:
    """Interval from `low` to `high`. Each end is included unless it is open; infinity is never included.

    Attributes:
        text: description for messages and help, after "must be".
    """

    low: float
    high: float = math.inf
    excludes_low: bool = False
    excludes_high: bool = False
    text: str = ""

    def contains(self, value: float) -> bool:
        """Return True if a number is in the range; NaN and infinity never are."""
        above = value > self.low if self.excludes_low else value >= self.low
        below = value < self.high if self.excludes_high else value <= self.high
        return math.isfinite(value) and above and below

    def __str__(self) -> str:
        if self.text:
            return self.text
        low = f"above {self.low:g}" if self.excludes_low else f"{self.low:g} or above"
        if self.high in (math.inf, MAX_COUNT):
            return low
        high = f"below {self.high:g}" if self.excludes_high else f"at most {_format_number(self.high)}"
        return (
            f"above {self.low:g} and {high}"
            if self.excludes_low
            else f"from {_format_number(self.low)} {high.replace('below', 'to below').replace('at most', 'up to')}"
        )


COUNT = NumberRange(0, MAX_COUNT, excludes_low=True)
COUNT_OR_ZERO = NumberRange(0, MAX_COUNT)
FOLDED = NumberRange(5, MAX_COUNT)  # so many are in five parts, one in each
ABOVE_0 = NumberRange(0, excludes_low=True)
AT_LEAST_0 = NumberRange(0)
SHARE = NumberRange(0, 1, text="within 0 and 1")
COSINE = NumberRange(-1, 1, text="within -1 and 1")
SHARE_ABOVE_0 = NumberRange(0, 1, excludes_low=True)
SHARE_BELOW_1 = NumberRange(0, 1, excludes_high=True)
SHARE_BELOW_HALF = NumberRange(0, 0.5, excludes_high=True)
LEARNING_RATE = NumberRange(0, 1000, excludes_low=True)
HEARTBEAT_SECONDS = NumberRange(0.1, DAY_SECONDS)  # each heartbeat writes a file
MINUTES = NumberRange(0, YEAR_MINUTES, excludes_low=True)
PROCESSES = NumberRange(0, 4096, excludes_low=True)  # on one machine
PORT = NumberRange(1, 65535)
NODES = NumberRange(0, 65536, excludes_low=True)
PROCESSES_OR_ZERO = NumberRange(0, 4096)
GRID = NumberRange(0, 64, excludes_low=True)  # its square is the number of possible tile grids
LAYER = NumberRange(-1000, 1000)
SIGNAL_SECONDS = NumberRange(0, 65535, excludes_low=True)  # the limit of sbatch
TEMPERATURE = NumberRange(0, 2)  # the limit of OpenAI's interface
TIMEOUT_SECONDS = NumberRange(0, DAY_SECONDS, excludes_low=True)
VOTES = NumberRange(0, 101, excludes_low=True)
SEED = NumberRange(0, 2**32 - 1)  # the limit of NumPy


def ranged(default: Any, range_: NumberRange) -> Any:
    """Create a dataclass field for a number, or a list or dict of numbers, with a range."""
    if callable(default):
        return field(default_factory=default, metadata={"range": range_})
    return field(default=default, metadata={"range": range_})


def find_range_errors(config: Any, key: str = "") -> Iterator[str]:
    """Yield an error message for each number of a config, including nested groups, that is outside its range."""
    for config_field in fields(config):
        yield from _find_value_range_errors(
            f"{key}{config_field.name}", getattr(config, config_field.name), config_field.metadata.get("range")
        )


def _find_value_range_errors(key: str, value: Any, range_: NumberRange | None) -> Iterator[str]:
    if is_dataclass(value):
        yield from find_range_errors(value, f"{key}.")
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _find_value_range_errors(f"{key}.{name}", item, range_)
    elif isinstance(value, list | tuple):
        for position, item in enumerate(value):
            yield from _find_value_range_errors(f"{key}[{position}]", item, range_)
    elif range_ is not None and isinstance(value, int | float) and not range_.contains(value):
        yield f"{key}: must be {range_}, found {value}."


def _format_number(value: float) -> str:
    return f"{value:g}" if value < 1e6 else f"{int(value)}"
