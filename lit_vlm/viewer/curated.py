"""Lists that task=curate wrote, in the viewer: the records that a search found, and why."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

HIDDEN_KEYS = ("source", "position", "origin")  # of the record itself


@dataclass(slots=True)
class CuratedList:
    """Records that one search found: duplicates, contamination or personal data.

    Attributes:
        lines: what was found, by source and position.
    """

    lines: dict[str, dict[int, list[dict[str, Any]]]] = field(default_factory=dict)

    @classmethod
    def from_lines(cls, lines: Iterable[Mapping[str, Any]]) -> CuratedList:
        """Make a list of the JSON lines of task=curate."""
        result = cls()
        for line in lines:
            found = result.lines.setdefault(str(line["source"]), {}).setdefault(int(line["position"]), [])
            found.append({key: value for key, value in line.items() if key not in HIDDEN_KEYS})
        return result

    def get_positions(self, source: str) -> np.ndarray:
        """Return the positions of the found records of a source, [n] int64 ascending."""
        return np.array(sorted(self.lines.get(source, {})), dtype=np.int64)

    def describe(self, source: str, position: int) -> list[str]:
        """Describe what was found in a record; [] for nothing."""
        return [
            ", ".join(
                f"{key.replace('_', ' ')} {_format_value(value)}" for key, value in line.items() if value is not None
            )
            for line in self.lines.get(source, {}).get(position, [])
        ]


def _format_value(value: Any) -> str:
    """Format a value of a line; another record is its origin."""
    return str(value.get("origin", value)) if isinstance(value, dict) else str(value).replace("_", " ")
