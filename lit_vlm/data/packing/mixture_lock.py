"""Mixture lock file (`mixture.lock`): a readable and comparable record of a run's training data, to reproduce it.

A lock is a dictionary of plain values: facts of the run, and under `sources` the facts of each source by its name.
Differences in facts of `FACT_LABELS` are reported with that label, all others with the key itself.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lit_vlm.data.index.sample_index import SampleIndex
from lit_vlm.files import atomic_write
from lit_vlm.types import UserError

LOCK_FILE, LOCK_VERSION = "mixture.lock", 1  # file name in the run folder
TEMPLATE_DATE_KEY = "template_date"  # date that a date-dependent chat template renders, YYYY-MM-DD
FACT_LABELS = {
    "processor": "the tokenizer, the chat template or the image settings",
    "digest": "what its records say",
    "seed": "seed",
    "shares": "data.share",
    "global_batch_size": "data.global_batch_size",
    "global_batch_tokens": "data.global_batch_tokens",
}
COUNT_KEYS = ("records", "usable", "tokens")  # facts that are counts


def describe_source(index: SampleIndex, number: int) -> dict[str, Any]:
    """Describe one source of the index: number of usable records, their tokens, and a digest of their content in order."""
    samples = index.find_source_samples(number)
    digest = hashlib.sha256(np.ascontiguousarray(index.columns["digest"][samples]).tobytes()).hexdigest()
    return {"usable": len(samples), "tokens": int(index.tokens[samples].sum()), "digest": digest}


def write_lock(path: str | Path, lock: Mapping[str, Any]) -> None:
    """Write the lock as JSON, in the order of its keys; the file is replaced atomically."""
    path = Path(path)
    text = json.dumps({"version": LOCK_VERSION, **lock}, indent=2, ensure_ascii=False, allow_nan=False)
    with atomic_write(path, path.name, "run_dir") as draft:
        draft.write_text(text + "\n", encoding="utf-8")


def read_lock(path: str | Path) -> dict[str, Any]:
    """Read a lock. Raises UserError if the file is missing or is not a lock of this version."""
    path = Path(path)
    try:
        lock = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}. data.lock names the mixture.lock of an earlier run.") from error
    except ValueError as error:
        raise UserError(f"{path}: not a mixture.lock ({error}). Take the one that the run's folder holds.") from error
    if not isinstance(lock, dict) or lock.get("version") != LOCK_VERSION or not isinstance(lock.get("sources"), dict):
        raise UserError(
            f"{path}: not a mixture.lock of version {LOCK_VERSION}. Take the one that the run's folder holds."
        )
    del lock["version"]
    return lock


def read_lock_or_empty(path: str | Path) -> dict[str, Any]:
    """Read a lock for callers to which it is optional; return {} if it is missing or damaged."""
    try:
        return read_lock(path)
    except UserError:
        return {}


def compare_locks(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Compare two locks; return one sentence for each difference, [] if they are equal."""
    # JSON makes tuples equal to lists, and enums equal to their names
    before, now = (json.loads(json.dumps(lock)) for lock in (old, new))
    sources = before.pop("sources", {}), now.pop("sources", {})
    changes = [f"{name}: it was trained on then, and is not now" for name in sources[0] if name not in sources[1]]
    changes += [f"{name}: it is trained on now, and was not then" for name in sources[1] if name not in sources[0]]
    for name in sources[0]:
        if name in sources[1]:
            changes += [f"{name}: {text}" for text in _describe_changes(sources[0][name], sources[1][name])]
    return changes + _describe_changes(before, now)


def _describe_changes(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Describe the differences of two dictionaries of facts."""
    changes = []
    for key in [*old, *(key for key in new if key not in old)]:
        before, now = old.get(key), new.get(key)
        if before == now:
            continue
        name = prefix + FACT_LABELS.get(key, key)
        if isinstance(before, dict) and isinstance(now, dict):
            changes += _describe_changes(before, now, f"{name}.")
        elif key in ("processor", "digest"):
            changes.append(f"{name} changed")
        elif key in COUNT_KEYS and isinstance(before, int) and isinstance(now, int):
            changes.append(f"{before:,} {_get_count_label(key)} then, {now:,} now")
        else:
            changes.append(f"{name} was {_format_value(before)}, is {_format_value(now)}")
    return changes


def _get_count_label(key: str) -> str:
    return "usable records" if key == "usable" else key


def _format_value(value: Any) -> str:
    return "not given" if value is None else json.dumps(value, ensure_ascii=False)
