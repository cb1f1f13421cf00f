"""Validation of run names and paths: they must stay inside run_dir and be valid for file systems and terminals."""

from __future__ import annotations

import re
from collections.abc import Iterator

from lit_vlm.config.schema import RunConfig

CONTROL_CHARACTERS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
MAX_NAME_BYTES = 255  # maximum bytes of a folder name
RESERVED_NAMES = ("index",)  # folders of run_dir that belong to no run
RUN_SUBFOLDERS = ("checkpoints", "hf", "samples", "wandb")  # subfolders of a run, which must not contain another run
ABSOLUTE_PATH_START = re.compile(r"[/\\~]|[A-Za-z]:[/\\]")


def find_name_errors(config: RunConfig) -> Iterator[str]:
    """Yield an error message for each name or path that cannot be used for the folder of a run."""
    if config.run_name is not None:
        for reason in _find_run_name_errors(config.run_name):
            yield f"run_name: {reason}, found {config.run_name!r}; name a folder below run_dir, e.g. run_name=first/try."
    for key, path in (("run_dir", config.run_dir), ("data.index_dir", config.data.index_dir)):
        if path is not None and CONTROL_CHARACTERS.search(path):
            yield f"{key}: has a control character in it, found {path!r}."


def _find_run_name_errors(name: str) -> Iterator[str]:
    parts = name.split("/")
    if not name.strip():
        yield "is empty"
    elif CONTROL_CHARACTERS.search(name):
        yield "has a control character in it"
    elif ABSOLUTE_PATH_START.match(name):
        yield "must not begin at another folder than run_dir"
    elif any(part in ("", ".", "..") for part in parts):
        yield "must not have empty parts, . or .. in it"
    elif any(part != part.strip() or "\\" in part for part in parts):
        yield "must have no backslash, and no part that begins or ends with a space"
    elif any(len(part.encode(errors="surrogatepass")) > MAX_NAME_BYTES for part in parts):
        yield f"has a part of more than {MAX_NAME_BYTES} bytes"
    elif any(0xD800 <= ord(letter) <= 0xDFFF for letter in name):
        yield "is no Unicode text"
    elif parts[0] in RESERVED_NAMES:
        yield f"must not begin with {parts[0]}, where indexes and plans are kept"
    elif inner := next((part for part in parts[1:] if part in RUN_SUBFOLDERS), None):
        yield f"must not have {inner} behind another folder, where a run keeps files of its own"
