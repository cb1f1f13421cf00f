"""Ledger of what a model found, by the digest of what it looked at: an interrupted pass continues, and another pass asks nothing twice."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lit_vlm.curation.features import FEATURES_FOLDER
from lit_vlm.files import append_line, handle_write_errors, read_json_lines


class ModelLedger:
    """Append-only JSONL file of results, by key. A line that a killed process cut off is skipped.

    Args:
        index_dir: folder of the index, which holds the file.
        name: what the results are.
        digest: of the model that made them; results of another model are in another file.
    """

    def __init__(self, index_dir: Path, name: str, digest: str) -> None:
        self._path = index_dir / FEATURES_FOLDER / f"{name}-{digest}.jsonl"
        self._results: dict[str, Any] = {}
        for row in read_json_lines(self._path):
            if isinstance(row.get("results"), dict):
                self._results |= row["results"]

    def __contains__(self, key: str) -> bool:
        return key in self._results

    def __getitem__(self, key: str) -> Any:
        return self._results[key]

    def add(self, results: Mapping[str, Any]) -> None:
        """Add the results of a batch. They are on the disk when this returns."""
        with handle_write_errors(self._path.parent):
            append_line(self._path, json.dumps({"results": dict(results)}, ensure_ascii=False).encode())
        self._results |= results
