"""Ranges of the numeric settings: declared beside the defaults in the schema, and validated here."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

LARGEST_COUNT = 2**53  # largest integer up to which JSON stores all integers exactly
YEAR_MINUTES, DAY_SECONDS = 366 * 24 * 60.0, 24 * 3600.0


@dataclass(frozen=True, slots=True)
class Range:
    """Interval from `low` to `high`. Each end is included unless it is open; infinity is never included.

    Attributes:
        text: description for messages and help, after "must be".
    """

    low: float
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False
    text: str = ""

    def holds(self, value: float) -> bool:
        """Return True if a number is in the range; NaN and infinity never are."""
        above = value > self.low if self.low_open else value >= self.low
        below = value < self.high if self.high_open else value <= self.high
        return math.isfinite(value) and above and below

    def __str__(self) -> str:
        if self.text:
            return self.text
        low = f"above {self.low:g}" if self.low_open else f"{self.low:g} or above"
        if self.high in (math.inf, LARGEST_COUNT):
            return low
        high = f"below {self.high:g}" if self.high_open else f"at most {_shown(self.high)}"
        return (
            f"above {self.low:g} and {high}"
            if self.low_open
            else f"from {_shown(self.low)} {high.replace('below', 'to below').replace('at most', 'up to')}"
        )


COUNT = Range(0, LARGEST_COUNT, low_open=True)
COUNT_OR_NONE = Range(0, LARGEST_COUNT)
ABOVE_0 = Range(0, low_open=True)
AT_LEAST_0 = Range(0)
SHARE = Range(0, 1, text="within 0 and 1")
SHARE_ABOVE_0 = Range(0, 1, low_open=True)
SHARE_BELOW_1 = Range(0, 1, high_open=True)
SHARE_BELOW_HALF = Range(0, 0.5, high_open=True)
LEARNING_RATE = Range(0, 1000, low_open=True)
HEARTBEAT_SECONDS = Range(0.1, DAY_SECONDS)  # each heartbeat writes a file
MINUTES = Range(0, YEAR_MINUTES, low_open=True)
PROCESSES = Range(0, 4096, low_open=True)  # on one machine
NODES = Range(0, 65536, low_open=True)
PROCESSES_OR_NONE = Range(0, 4096)
GRID = Range(0, 64, low_open=True)  # its square is the number of possible tile grids
LAYER = Range(-1000, 1000)
SIGNAL_SECONDS = Range(0, 65535, low_open=True)  # the limit of sbatch
SEED = Range(0, 2**32 - 1)  # the limit of NumPy


def ranged(default: Any, range_: Range) -> Any:
    """Create a dataclass field for a number, or a list or dict of numbers, with a range."""
    if callable(default):
        return field(default_factory=default, metadata={"range": range_})
    return field(default=default, metadata={"range": range_})


def mistakes_in_ranges(config: Any, key: str = "") -> Iterator[str]:
    """Yield an error message for each number of a config, including nested groups, that is outside its range."""
    for config_field in fields(config):
        yield from _mistakes(
            f"{key}{config_field.name}", getattr(config, config_field.name), config_field.metadata.get("range")
        )


def _mistakes(key: str, value: Any, range_: Range | None) -> Iterator[str]:
    if is_dataclass(value):
        yield from mistakes_in_ranges(value, f"{key}.")
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _mistakes(f"{key}.{name}", item, range_)
    elif isinstance(value, list | tuple):
        for position, item in enumerate(value):
            yield from _mistakes(f"{key}[{position}]", item, range_)
    elif range_ is not None and isinstance(value, int | float) and not range_.holds(value):
        yield f"{key}: must be {range_}, found {value}."


def _shown(value: float) -> str:
    return f"{value:g}" if value < 1e6 else f"{int(value)}"
