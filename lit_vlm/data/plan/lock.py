"""mixture.lock: what a run was trained on, readable and comparable, so that the same can be had again.

A lock is plain values: facts of the run, and below `sources` the facts of each source by its name. Facts with a name
in `WORDS` are told apart in words, all others by their names.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lit_vlm.data.index.columns import Index
from lit_vlm.files import written
from lit_vlm.types import UserError

LOCK, LOCK_VERSION = "mixture.lock", 1  # its name in a run's folder
DAY = "template_date"  # the day that a chat template which writes today's was given, YYYY-MM-DD
WORDS = {
    "processor": "the tokenizer, the chat template or the image settings",
    "digest": "what its records say",
    "seed": "seed",
    "shares": "data.share",
    "global_batch_size": "data.global_batch_size",
    "global_batch_tokens": "data.global_batch_tokens",
}
COUNTS = ("records", "usable", "tokens")  # facts that are numbers of something


def source_facts(index: Index, number: int) -> dict[str, Any]:
    """What the index knows of one source: usable records, their tokens, and a digest of what they say, in their order."""
    samples = index.of_source(number)
    digest = hashlib.sha256(np.ascontiguousarray(index.columns["digest"][samples]).tobytes()).hexdigest()
    return {"usable": len(samples), "tokens": int(index.tokens[samples].sum()), "digest": digest}


def write_lock(path: str | Path, lock: Mapping[str, Any]) -> None:
    """As JSON in the order that the lock has; replaced as a whole."""
    path = Path(path)
    text = json.dumps({"version": LOCK_VERSION, **lock}, indent=2, ensure_ascii=False, allow_nan=False)
    with written(path, path.name, "run_dir") as draft:
        draft.write_text(text + "\n", encoding="utf-8")


def read_lock(path: str | Path) -> dict[str, Any]:
    """Raises UserError: not there, or no lock of this version."""
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


def find_lock(path: str | Path) -> dict[str, Any]:
    """Read a lock for what can do without it; {} where there is none, and of a damaged one."""
    try:
        return read_lock(path)
    except UserError:
        return {}


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What changed between two locks, a sentence each; empty when they say the same."""
    before, now = (json.loads(json.dumps(lock)) for lock in (old, new))  # tuples and lists, enums and names are alike
    sources = before.pop("sources", {}), now.pop("sources", {})
    found = [f"{name}: it was trained on then, and is not now" for name in sources[0] if name not in sources[1]]
    found += [f"{name}: it is trained on now, and was not then" for name in sources[1] if name not in sources[0]]
    for name in sources[0]:
        if name in sources[1]:
            found += [f"{name}: {text}" for text in _told(sources[0][name], sources[1][name])]
    return found + _told(before, now)


def _told(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key in [*old, *(key for key in new if key not in old)]:
        before, now = old.get(key), new.get(key)
        if before == now:
            continue
        name = prefix + WORDS.get(key, key)
        if isinstance(before, dict) and isinstance(now, dict):
            found += _told(before, now, f"{name}.")
        elif key in ("processor", "digest"):
            found.append(f"{name} changed")
        elif key in COUNTS and isinstance(before, int) and isinstance(now, int):
            found.append(f"{before:,} {_noun(key)} then, {now:,} now")
        else:
            found.append(f"{name} was {_shown(before)}, is {_shown(now)}")
    return found


def _noun(key: str) -> str:
    return "usable records" if key == "usable" else key


def _shown(value: Any) -> str:
    return "not given" if value is None else json.dumps(value, ensure_ascii=False)
