"""JSON columns of Hugging Face `datasets`, parsed like JSON files. A module of its own: `datasets` is slow to import."""

from __future__ import annotations

import json
from typing import Any

import datasets

from lit_vlm.data.readers.rows.base import build_unique_dict


class StrictJsonFeature(datasets.Json):
    """JSON feature that raises DuplicateKeyError for a duplicate key; `datasets` would use its last value."""

    def decode_example(self, value: str | None, token_per_repo_id: Any = None) -> Any:
        return None if value is None else json.loads(value, object_pairs_hook=build_unique_dict)
