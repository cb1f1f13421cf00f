"""Inference of splits from names of files and folders: `train-00000-of-00002.parquet`, `test/a.jsonl`, `TL_1.zip`.

The words are those of Hugging Face `datasets`, so that a cloned hub repository is split as it is there; those of Korean
data and of benchmarks (RefCOCO's testA, COCO's minival); and AIHub's names of training and validation zips.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from pathlib import PurePosixPath

from lit_vlm.types import UserError

_SPLIT_WORDS = {
    "train": ("train", "training", "trainval", "학습", "훈련"),
    "validation": ("validation", "valid", "dev", "val", "minival", "검증"),
    "test": ("test", "testing", "eval", "evaluation", "testa", "testb", "testdev", "devtest", "holdout", "heldout")
    + ("평가", "시험", "테스트"),
}
_SPLIT_BY_WORD = {word: split for split, words in _SPLIT_WORDS.items() for word in words}
_SUBSPLITS = (
    "minival",
    "testa",
    "testb",
    "testdev",
    "devtest",
)  # subsets of a split; a dataset may have several of them
_COMPOUND_PATTERNS = {
    "testdev": "test[-_ ]?dev",
    "devtest": "dev[-_ ]?test",
    "holdout": "hold[-_ ]?out",
    "heldout": "held[-_ ]?out",
}
_ANY_SPLIT_WORD = "|".join(_COMPOUND_PATTERNS.get(word, word) for word in sorted(_SPLIT_BY_WORD, key=len, reverse=True))
_SPLIT_NAME = rf"(?i:({_ANY_SPLIT_WORD})(?:용)?(?:[ _]?(?:data|set|데이터|셋|세트))?)"
_SPLIT_IN_NAME = re.compile(
    rf"(?:^|[-._ 0-9()\[\]]|(?<=[a-z])(?=[A-Z])){_SPLIT_NAME}(?=[-._ 0-9()\[\]]|$|(?<=[a-z])[A-Z])"
)
_NUMBERED_SPLIT = re.compile(rf"[-._ 0-9]*(?i:{_ANY_SPLIT_WORD})[-._ 0-9]*")
_HUB_SHARD = re.compile(r"(?P<split>\w[\w.]*?)-\d{5}-of-\d{5}")
_AIHUB_ZIP = re.compile(r"(?P<part>[TV])[SL](?=[_.\d])")


def normalize_split(name: str) -> str | None:
    """Return train, validation or test if the name holds a word for one, else None. The last such word counts."""
    word = _find_split_word(name)
    return _SPLIT_BY_WORD[_normalize_word(word)] if word else None


def is_same_split(name: str, wanted: str) -> bool:
    """Return True if a split's name fits the wanted one: testA belongs to test, but testB is not testA."""
    wanted_word = _normalize_word(wanted)
    return normalize_split(name) == normalize_split(wanted) and (
        wanted_word not in _SUBSPLITS or _normalize_word(name) == wanted_word
    )


def infer_split(path: str, *, folders_only: bool = False, is_label_file: bool = False) -> str | None:
    """Infer the split of a path below its source's folder, from its folders and its file name.

    A file name that is only a split's word decides alone. So does a hub shard's name, which holds the whole split:
    `train_sft` of `train_sft-00000-of-00003.parquet`. A folder that names several splits (`train_test_split`) is ignored.

    Args:
        folders_only: ignore the file's own name.
        is_label_file: the file is one of many label files, whose own name counts only if no folder names a split.

    Returns:
        The split, or None if no name gives one.

    Raises:
        UserError: the folders and the name give several splits.
    """
    parts = PurePosixPath(path)
    folders = _infer_folder_splits(parts.parts[:-1])
    own_split = None
    if not folders_only:
        shard, stem = _HUB_SHARD.match(parts.name), parts.name.removesuffix(parts.suffix)
        if shard and normalize_split(shard["split"]):
            return shard["split"]
        own_split = _parse_aihub_split(parts.name) or _find_split(stem)
        if _normalize_word(stem) in _SPLIT_BY_WORD:
            return own_split
    named_splits = [*folders.items()]
    if own_split and not (is_label_file and folders):
        named_splits.append((parts.name, own_split))
    if len({split for _, split in named_splits}) > 1:
        found = ", ".join(f"{part!r} says {split}" for part, split in named_splits)
        raise UserError(
            f"{path}: its names say several splits ({found}). Name the file for its split alone, e.g. train{parts.suffix}."
        )
    return named_splits[0][1] if named_splits else None


def _infer_folder_splits(folders: Iterable[str]) -> dict[str, str]:
    """Map each folder to the split that it names. Folders named only by a split (`1.Training`) override all others."""
    exact: dict[str, str] = {}
    loose: dict[str, str] = {}
    for folder in folders:
        words = {
            _SPLIT_BY_WORD[_normalize_word(word)]
            for word in _SPLIT_IN_NAME.findall(unicodedata.normalize("NFC", folder))
        }
        split = _find_split(folder) if len(words) == 1 else None if words else _parse_aihub_split(folder)
        if split:
            is_exact = not words or _NUMBERED_SPLIT.fullmatch(unicodedata.normalize("NFC", folder))
            (exact if is_exact else loose)[folder] = split
    return exact or loose


def select_split(setting: str, paths: Iterable[str], splits: Iterable[str | None], wanted: str | None) -> list[bool]:
    """Select the paths of the wanted split.

    Args:
        splits: the inferred split of each path; None: its name gives none.
        wanted: the split to read; None: only one split may be there.

    Returns:
        For each path, whether it is read.

    Raises:
        UserError: there are several splits and none is wanted; or one is wanted and no name gives it, or several do.
    """
    paths_by_split: dict[str | None, list[str]] = {}
    found = list(splits)
    for path, split in zip(paths, found, strict=True):
        paths_by_split.setdefault(split, []).append(path)
    listing = ", ".join(f"{split} ({_format_paths(files)})" for split, files in paths_by_split.items() if split)
    source = setting.partition("=")[0].removesuffix(".path")
    if wanted is None:
        others = [split for split in paths_by_split if split and normalize_split(split) != "train"]
        if len(paths_by_split) - (None in paths_by_split) > 1 or (others and None in paths_by_split):
            rest = f", and {_format_paths(paths_by_split[None])}" if None in paths_by_split else ""
            raise UserError(
                f"{setting} holds several splits: {listing}{rest}. Say which is meant: {source}.split=train."
            )
        return [True] * len(found)
    matching = [split for split in paths_by_split if split and is_same_split(split, wanted)]
    chosen: list[str | None] = [wanted] if wanted in paths_by_split else [*matching]
    if not chosen and normalize_split(wanted) == "train" and None in paths_by_split and len(paths_by_split) > 1:
        chosen = [None]  # e.g. data.jsonl next to data_test.jsonl
    if len(chosen) != 1:
        finding = (
            f"several names say it: {', '.join(map(str, chosen))}"
            if chosen
            else f"there is {listing or 'none in the names'}"
        )
        raise UserError(
            f"{source}.split={wanted}: {finding}, in {setting.partition('=')[2]}. Give one of them, or take it away."
        )
    return [split == chosen[0] for split in found]


def _format_paths(paths: list[str]) -> str:
    return ", ".join(paths[:2]) + (f" and {len(paths) - 2:,} more" if len(paths) > 2 else "")


def _parse_aihub_split(name: str) -> str | None:
    """Parse AIHub's zip names: TL_1.zip and TS_1.zip are for training, VL_1.zip and VS_1.zip for validation."""
    match = _AIHUB_ZIP.match(name)
    return None if match is None else {"T": "train", "V": "validation"}[match["part"]]


def _find_split_word(name: str) -> str | None:
    words = _SPLIT_IN_NAME.findall(unicodedata.normalize("NFC", name))
    return words[-1] if words else None


def _find_split(name: str) -> str | None:
    """Find the split in a name, or the subset of a split: testA."""
    word = _find_split_word(name)
    return word if word and _normalize_word(word) in _SUBSPLITS else normalize_split(name)


def _normalize_word(word: str) -> str:
    return re.sub("[-_ ]", "", unicodedata.normalize("NFC", word)).lower()
