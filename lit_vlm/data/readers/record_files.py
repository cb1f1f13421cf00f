"""Find the files that a source's settings name, on disk or on the Hugging Face hub, and open them as rows."""

from __future__ import annotations

import glob
import itertools
import json
import os
import re
from collections.abc import Callable, Collection
from pathlib import Path, PurePosixPath
from typing import Any

from lit_vlm.config.choices import Format
from lit_vlm.config.schema import SourceConfig
from lit_vlm.data.readers.coco import is_label_file, open_label_files
from lit_vlm.data.readers.columns import rename_columns
from lit_vlm.data.readers.formats import NEEDED_KEYS, detect_record_format, format_keys
from lit_vlm.data.readers.rows import JoinedRows, Rows, arrow_files, csv_files, json_files, tar_samples
from lit_vlm.data.readers.rows.image_folders import ImageTextRows, MetadataRows, is_image_name
from lit_vlm.data.readers.splits import infer_split, select_split
from lit_vlm.data.staging import resolve_staged_path
from lit_vlm.types import RecordError, UserError, find_nearest, format_suggestion

RECORD_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".tar", ".token")
ROW_OPENERS: dict[str, Callable[[Path, Path | None], Rows]] = {
    ".jsonl": json_files.open_json_lines,
    ".json": json_files.open_json_list,
    ".csv": csv_files.open_csv,
    ".tsv": csv_files.open_csv,
    ".tar": tar_samples.open_tar,
}
_HUB_METADATA_FILES = ("dataset_info.json", "dataset_infos.json")  # metadata of a hub repository, not records
_METADATA_STEM = "metadata"  # of imagefolder's file, whose images are named from its own folder
_BRACES = re.compile(r"\{(?:(?P<first>\d+)\.\.(?P<last>\d+)|(?P<options>[^{},]*(?:,[^{},]*)+))\}")
_PATTERN = re.compile(rf"{_BRACES.pattern}|[*?\[]")
_MAX_PATTERN_FILES = 100_000
_COMPRESSED_TAR_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")


def resolve_source_path(name: str, setting: str, value: str | None, config: SourceConfig | None = None) -> Path:
    """Resolve the path of a setting to its staged copy or itself, and check that it exists.

    The path comes from the operator, so it may lie anywhere.

    Args:
        config: of a named set; its `obtain` and `homepage` go into the error message.

    Raises:
        UserError: the setting is empty, the path is missing, or it is neither a regular file nor a folder.
    """
    if value is None:
        raise UserError(f"data.sources.{name}.{setting} is not set; give the dataset's file or folder.")
    path = resolve_staged_path(Path(value).expanduser())
    if not path.exists():
        folder = path.parent
        hint = f" There is no folder {folder} either."
        if folder.is_dir():
            hint = format_suggestion(find_nearest(path.name, os.listdir(folder)))
        instructions = [part.rstrip(".") for part in (config.obtain, config.homepage) if part] if config else []
        how_to_get = f" How to get it: {', '.join(instructions)}." if instructions else ""
        raise UserError(f"data.sources.{name}.{setting}={value}: no such file or folder.{hint}{how_to_get}")
    if not path.is_dir() and not path.is_file():  # reading a pipe or a terminal would block for ever
        raise UserError(
            f"data.sources.{name}.{setting}={value} is a pipe, a device or a socket; give a regular file or a folder."
        )
    if setting == "image_root" and not path.is_dir():
        raise UserError(
            f"data.sources.{name}.image_root={value} is a file; give the folder that image paths start from."
        )
    return path


def find_record_files(name: str, path: Path, split: str | None, *, only_tars: bool = False) -> tuple[Path, list[Path]]:
    """Find the files with records at a path, which must all have one suffix.

    Args:
        split: the split to read if the files' names give several; None: only one split may be there.
        only_tars: of a folder that has tars, read nothing else.

    Returns:
        The file or folder that holds the records, and the list of files.

    Raises:
        UserError: names the setting: no such split, several splits, several suffixes or none.
    """
    setting = f"data.sources.{name}.path={path}"
    if path.is_file():
        return path, [_require_record_file(setting, path)]
    if (path / "dataset_dict.json").exists():
        splits = json.loads((path / "dataset_dict.json").read_text())["splits"]
        split = splits[0] if split is None and len(splits) == 1 else split
        if split is None or split not in splits:
            wanted_hint = "" if split is None else f", and none is called {split}"
            raise UserError(
                f"{setting} holds several splits{wanted_hint}; give data.sources.{name}.split=, one of: {', '.join(splits)}."
            )
        path = path / split
    elif (path / "state.json").exists() and split is not None:
        raise UserError(
            f"data.sources.{name}.split={split} has no effect: {path.name} is one saved dataset. Take it away."
        )
    if (path / "state.json").exists():  # made by Dataset.save_to_disk; its JSON files hold no records
        return path, sorted(path.glob("*.arrow"))
    files = _list_record_files(setting, path)
    files = ([file for file in files if file.suffix.lower() == ".tar"] if only_tars else []) or files
    names = _list_relative_names(files, path)
    splits = _infer_splits(names)
    chosen = select_split(setting, names, splits, split)
    files = [file for file, is_chosen in zip(files, chosen, strict=True) if is_chosen]
    _require_one_ending(setting, "the folder", files)
    return path, files


def _list_relative_names(files: list[Path], folder: Path) -> list[str]:
    """List the files' paths relative to their folder. They are compared as strings: a folder may have millions of pictures."""
    start = "" if str(folder) == "." else os.path.join(folder, "")
    return [
        name[len(start) :] if (name := str(file)).startswith(start) else str(file.relative_to(folder)) for file in files
    ]


def _infer_splits(names: list[str]) -> list[str | None]:
    """Infer the split of each file. The name of a picture says none, so that of its folder is inferred once."""
    by_folder: dict[str, str | None] = {}
    splits = []
    for name in names:
        folder = name.rpartition("/")[0]
        if not is_image_name(name):
            splits.append(infer_split(name))
            continue
        if folder not in by_folder:
            by_folder[folder] = infer_split(name, folders_only=True)
        splits.append(by_folder[folder])
    return splits


def _require_record_file(setting: str, path: Path) -> Path:
    if path.name.lower().endswith(_COMPRESSED_TAR_SUFFIXES):
        raise UserError(
            f"{setting}: is compressed, so its members cannot be reached one by one. "
            f"Unpack it to a plain .tar once; pictures hardly shrink."
        )
    if path.suffix.lower() not in RECORD_SUFFIXES:
        raise UserError(f"{setting}: cannot tell the format; endings are {', '.join(RECORD_SUFFIXES)}.")
    return path


def _list_record_files(setting: str, folder: Path) -> list[Path]:
    """List the record files of the folder itself, or, if it has none, those of its subfolders.

    A cloned hub repository has its files in data/, or in train/ and test/. Without record files, all pictures of the folder
    and its subfolders are the records, if one of them has a text beside it.

    Raises:
        UserError: the folder holds record files and pictures with texts.
    """
    found, pictures = _classify_files([entry.name for entry in os.scandir(folder) if not entry.is_dir()], folder)
    if not found:
        nested = (os.path.relpath(parent, folder) for parent, _, _ in os.walk(folder))
        places = sorted(place for place in nested if not _is_hidden(PurePosixPath(place)))
        names = [
            name if place == "." else f"{place}/{name}"
            for place in places
            for name in (entry.name for entry in os.scandir(folder / place) if not entry.is_dir())
            if not name.startswith(".")
        ]
        found, pictures = _classify_files(names, folder)
    if found and pictures:
        both = f"{found[0]} and {pictures[0]} with a .txt beside it"
        raise UserError(
            f"{setting}: the folder holds two forms, {both}. Give the file, or a folder that holds one of them."
        )
    files = [folder / name for name in found or pictures]
    for path in files if found else ():
        if not path.is_file():  # reading a pipe would block for ever
            raise UserError(
                f"{setting}: {path.name} is no regular file. Take it out of the folder, or give the file to read."
            )
    return sorted(files) if found else files


def _classify_files(names: list[str], folder: Path) -> tuple[list[str], list[str]]:
    """Return the record files among the names, and the pictures, if one of these has a text of its name beside it.

    Names are strings, not paths: a folder may have millions of pictures.
    """
    names = sorted(names)
    pictures = [name for name in names if is_image_name(name)]
    texts = {name[:-4] for name in names if name.endswith(".txt")}
    with_text = {os.path.splitext(picture)[0] for picture in pictures} & texts if texts else set()
    all_names = set(names)
    found = [
        name
        for name in names
        if name.lower().endswith(RECORD_SUFFIXES)
        and name.rpartition("/")[2] not in _HUB_METADATA_FILES
        and not (name.endswith(".json") and name[:-5] in with_text)
        and not _is_download_report(name, all_names, folder)
    ]
    return found, pictures if with_text else []


def _is_download_report(name: str, names: Collection[str], folder: Path) -> bool:
    """Return True for img2dataset's 00000_stats.json, and for 00000.parquet, whose pictures are in 00000.tar or 00000/."""
    if name.endswith("_stats.json"):
        shard = name.removesuffix("_stats.json")
    elif name.endswith(".parquet") and f"{name[:-8]}_stats.json" in names:
        shard = name.removesuffix(".parquet")
    else:
        return False
    has_pictures = f"{shard}.tar" in names or (folder / shard).is_dir()
    return has_pictures or (name.endswith(".json") and f"{shard}.parquet" in names)


def _is_hidden(path: PurePosixPath) -> bool:
    return any(part.startswith(".") for part in path.parts)


def is_pattern(path: str) -> bool:
    """Return True if a path names several files: `{00000..00012}.tar`, `{a,b}.jsonl`, `*.parquet`. An existing file is none."""
    return bool(_PATTERN.search(path)) and not os.path.exists(os.path.expanduser(path))


def find_pattern_folder(pattern: str) -> Path:
    """Return the folder that all files of a pattern lie in or below."""
    parts = Path(pattern).expanduser().parts[:-1]
    return Path(*itertools.takewhile(lambda part: not _PATTERN.search(part), parts))


def find_pattern_files(name: str, pattern: str) -> list[Path]:
    """Find the files of a pattern, in its order; those of a `*` by name.

    Raises:
        UserError: one of the named files is missing, nothing fits, or the files have several endings.
    """
    setting = f"data.sources.{name}.path={pattern}"
    files: list[Path] = []
    for path in _expand_braces(os.path.expanduser(pattern), setting):
        if glob.has_magic(path):
            found = [Path(match) for match in sorted(glob.glob(path, recursive=True)) if os.path.isfile(match)]
        else:
            found = [resolve_staged_path(Path(path))]
        if not found or not found[0].is_file():
            raise UserError(f"{setting}: no such file as {path}. All files of a pattern must be there.")
        files += [_require_record_file(setting, file) for file in found]
    files = list(dict.fromkeys(files))
    _require_one_ending(setting, "the pattern", files)
    return files


def _expand_braces(pattern: str, setting: str) -> list[str]:
    """Expand `{a,b}` and `{00000..00012}`, as a shell does."""
    match = _BRACES.search(pattern)
    if match is None:
        return [pattern]
    first, last = match["first"], match["last"]
    if first is None:
        options = match["options"].split(",")
    else:
        numbers = range(int(first), int(last) + 1)
        if not 0 < len(numbers) <= _MAX_PATTERN_FILES:
            raise UserError(
                f"{setting}: {match[0]} names {len(numbers):,} files; 1 to {_MAX_PATTERN_FILES:,} are read."
            )
        width = max(len(first), len(last)) if first.startswith("0") or last.startswith("0") else 0
        options = [f"{number:0{width}}" for number in numbers]
    expanded = [pattern[: match.start()] + option + pattern[match.end() :] for option in options]
    return [path for text in expanded for path in _expand_braces(text, setting)]


def _require_one_ending(setting: str, what: str, files: list[Path]) -> None:
    by_suffix = {file.suffix.lower(): file for file in reversed(files)}
    if len(by_suffix) == 1 or (files and is_image_name(files[0].name)):
        return
    endings = ", ".join(sorted(by_suffix))
    if by_suffix:
        names = " and ".join(by_suffix[suffix].name for suffix in sorted(by_suffix)[:2])
        found = f"files of several endings ({endings}), e.g. {names}"
    else:
        found = f"no file ending in {', '.join(RECORD_SUFFIXES)}, and no picture with a .txt beside it"
    raise UserError(f"{setting}: {what} has {found}. Give the file to read.")


def open_row_files(name: str, path: Path, files: list[Path], cache_dir: Path | None) -> Rows:
    """Open the rows of the files.

    Args:
        cache_dir: folder in which the offsets of JSON and tar files are stored.
    """
    suffix = files[0].suffix.lower() if files else ".arrow"
    try:
        if path.is_dir() and (path / "state.json").exists():
            return arrow_files.open_saved_dataset(path)
        if is_image_name(files[0].name if files else ""):
            return ImageTextRows(path, _list_relative_names(files, path))
        if suffix == ".parquet" and not any(file.stem == _METADATA_STEM for file in files):
            return arrow_files.open_parquet(files)
        if suffix == ".arrow":
            return arrow_files.open_arrow(files)
        if suffix in (".json", ".token") and all(map(is_label_file, files)):
            return open_label_files(f"data.sources.{name}.path={path}", files)
        parts = [_open_row_file(path, file, suffix, cache_dir) for file in files]
    except PermissionError as error:
        raise UserError(
            f"data.sources.{name}.path={path}: {error.filename} may not be read. Change its rights."
        ) from error
    return parts[0] if len(parts) == 1 else JoinedRows(parts)


def _open_row_file(path: Path, file: Path, suffix: str, cache_dir: Path | None) -> Rows:
    rows = arrow_files.open_parquet([file]) if suffix == ".parquet" else ROW_OPENERS[suffix](file, cache_dir)
    if file.stem == _METADATA_STEM and path.is_dir() and file.parent != path and file.is_relative_to(path):
        return MetadataRows(rows, PurePosixPath(file.parent.relative_to(path)))
    return rows


def list_identity_files(files: list[Path]) -> list[Path]:
    """List the files whose size and time tell that a source has changed: the texts of pictures, else the files themselves."""
    if not (files and is_image_name(files[0].name)):
        return files
    texts = [f"{os.path.splitext(file)[0]}.txt" for file in files]
    return [Path(text) if os.path.isfile(text) else file for text, file in zip(texts, files, strict=True)]


def load_hub_rows(name: str, config: SourceConfig) -> tuple[Rows, list[Path]]:
    """Load the rows of a hub dataset, and list the local files that hold them."""
    assert config.hub is not None
    if config.revision is not None and Path(config.hub).expanduser().is_dir():
        raise UserError(f"data.sources.{name}.revision has no effect: hub={config.hub} is a folder here. Take it away.")
    split = config.split or "train"
    rows = arrow_files.load_hub_dataset(
        f"data.sources.{name}.hub", config.hub, config.hub_config, split, config.revision
    )
    return rows, rows.files


def check_file_split(name: str, rows: Rows, file: Path, split: str) -> None:
    """Raise a UserError unless one of the first 100 records names a split: only then does the setting have an effect."""
    for index in range(min(len(rows), 100)):
        try:
            row = rows[index]
        except RecordError:
            continue
        if any(key.lower() in ("split", "phase") and value is not None for key, value in row.items()):
            return
    raise UserError(
        f"data.sources.{name}.split={split} has no effect: {file.name} is one file, and its records say no split. "
        f"Take it away, or give the folder."
    )


def detect_format(name: str, rows: Rows, columns: tuple[tuple[str, str], ...] = ()) -> str:
    """Detect the format by the keys of the first record that fits one, among the first 100, and compare all files.

    Raises:
        UserError: none of these records can be read, their keys fit no format, or two files have different formats.
    """
    setting, choices = f"data.sources.{name}.format", ", ".join(Format)
    first_error: RecordError | None = None
    first_unknown: tuple[int, dict[str, Any]] | None = None
    for index in range(min(len(rows), 100)):
        try:
            row = rename_columns(rows[index], columns) if columns else rows[index]
        except RecordError as error:
            first_error = first_error or error
            continue
        if record_format := detect_record_format(row):
            _require_one_format(name, rows, columns, index, record_format)
            return record_format
        first_unknown = first_unknown or (index, row)
    if first_unknown:
        raise UserError(
            f"{rows.get_origin(first_unknown[0])}: cannot tell the format from the keys {format_keys(first_unknown[1])}. "
            f"{NEEDED_KEYS}. Say it with {setting}=<one of {choices}>, or convert the file."
        )
    raise UserError(
        f"No record can be read, the first fault: {first_error} Say the format with {setting}=<one of {choices}>."
    )


def _require_one_format(
    name: str, rows: Rows, columns: tuple[tuple[str, str], ...], first: int, record_format: str
) -> None:
    """Raise a UserError if the first record of another file has another format: none is taken silently."""
    for start in getattr(rows, "file_starts", ()):
        try:
            other = detect_record_format(rename_columns(rows[start], columns)) if start > first else None
        except RecordError:
            continue
        if other not in (None, record_format):
            found = f"{rows.get_origin(first)} is {record_format} and {rows.get_origin(start)} is {other}"
            raise UserError(
                f"data.sources.{name}.path: two forms in one source: {found}. Give each form a source of its own, "
                f"with the file as its path."
            )
