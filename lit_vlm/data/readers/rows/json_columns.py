"""Columns of JSON in Hugging Face `datasets`, read as the JSON of files is. Apart, since `datasets` is slow to import."""

from __future__ import annotations

import json
from typing import Any

import datasets

from lit_vlm.data.readers.rows.base import unique_keys


class StrictJson(datasets.Json):
    """`datasets` lets the last value of a key that stands twice count; here that is KeyTwice."""

    def decode_example(self, value: str | None, token_per_repo_id: Any = None) -> Any:
        return None if value is None else json.loads(value, object_pairs_hook=unique_keys)
