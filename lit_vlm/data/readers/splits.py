"""Splits that the names of files and folders say: `train-00000-of-00002.parquet`, `test/a.jsonl`, `TL_1.zip`.

The words are those of Hugging Face `datasets`, so that a cloned repository of the hub falls apart as there; and AIHub's
names of training and validation zips.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import PurePosixPath

from lit_vlm.types import UserError

_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SPLIT_OF = {word: split for split, words in _WORDS.items() for word in words}
_WORD = re.compile(
    rf"(?:^|[-._ 0-9])({'|'.join(sorted(_SPLIT_OF, key=len, reverse=True))})(?=[-._ 0-9]|$)", re.IGNORECASE
)
_SHARD = re.compile(r"(?P<split>\w[\w.]*?)-\d{5}-of-\d{5}")
_AIHUB = re.compile(r"(?P<part>[TV])[SL](?=[_.\d])")


def canonical_split(name: str) -> str | None:
    """train, validation or test, if the name says one; the last word counts."""
    words = _WORD.findall(name)
    return _SPLIT_OF[words[-1].lower()] if words else None


def split_of_path(path: str, *, folders_only: bool = False) -> str | None:
    """The split that a path below its source's folder says: its folders before its name, as in `datasets`.

    A shard of the hub says its whole split: `train_sft` of `train_sft-00000-of-00003.parquet`.

    Args:
        folders_only: what the file itself is called says nothing.
    """
    parts = PurePosixPath(path)
    for folder in parts.parts[:-1]:
        if split := canonical_split(folder) or _aihub_split(folder):
            return split
    if folders_only:
        return None
    shard = _SHARD.match(parts.name)
    if shard and canonical_split(shard["split"]):
        return shard["split"]
    return _aihub_split(parts.name) or canonical_split(parts.name.removesuffix(parts.suffix))


def choose_split(setting: str, paths: Iterable[str], splits: Iterable[str | None], wanted: str | None) -> list[bool]:
    """Which of the paths are read.

    Raises:
        UserError: several splits and none is asked for; one is asked for, and no name says it, or several do.
    """
    named: dict[str | None, list[str]] = {}
    found = list(splits)
    for path, split in zip(paths, found, strict=True):
        named.setdefault(split, []).append(path)
    shown = ", ".join(f"{split} ({_some(files)})" for split, files in named.items() if split)
    source = setting.partition("=")[0].removesuffix(".path")
    if wanted is None:
        others = [split for split in named if split and canonical_split(split) != "train"]
        if len(named) - (None in named) > 1 or (others and None in named):
            rest = f", and {_some(named[None])}" if None in named else ""
            raise UserError(f"{setting} holds several splits: {shown}{rest}. Say which is meant: {source}.split=train.")
        return [True] * len(found)
    alike = [split for split in named if split and canonical_split(split) == canonical_split(wanted)]
    chosen: list[str | None] = [wanted] if wanted in named else [*alike]
    if not chosen and canonical_split(wanted) == "train" and None in named and len(named) > 1:
        chosen = [None]  # data.jsonl beside data_test.jsonl
    if len(chosen) != 1:
        there = (
            f"several names say it: {', '.join(map(str, chosen))}"
            if chosen
            else f"there is {shown or 'none in the names'}"
        )
        raise UserError(
            f"{source}.split={wanted}: {there}, in {setting.partition('=')[2]}. Give one of them, or take it away."
        )
    return [split == chosen[0] for split in found]


def _some(paths: list[str]) -> str:
    return ", ".join(paths[:2]) + (f" and {len(paths) - 2:,} more" if len(paths) > 2 else "")


def _aihub_split(name: str) -> str | None:
    """TL_1.zip and TS_1.zip are for training, VL_1.zip and VS_1.zip for validation."""
    found = _AIHUB.match(name)
    return None if found is None else {"T": "train", "V": "validation"}[found["part"]]
