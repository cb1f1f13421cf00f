"""Find the files that a source's settings name, on disk or on the Hugging Face hub, and open them as rows."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from lit_vlm.config.schema import Format, SourceConfig
from lit_vlm.data.readers.formats import NEEDED_KEYS, detect_record_format, format_keys
from lit_vlm.data.readers.rows import JoinedRows, Rows, arrow_files, json_files, tar_samples
from lit_vlm.data.readers.splits import infer_split, select_split
from lit_vlm.data.staging import resolve_staged_path
from lit_vlm.types import RecordError, UserError

RECORD_SUFFIXES = (".jsonl", ".json", ".parquet", ".arrow", ".tar")
ROW_OPENERS: dict[str, Callable[[Path, Path | None], Rows]] = {
    ".jsonl": json_files.open_json_lines,
    ".json": json_files.open_json_list,
    ".tar": tar_samples.open_tar,
}
_HUB_METADATA_FILES = ("dataset_info.json", "dataset_infos.json")  # metadata of a hub repository, not records
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
        hint = (
            format_suggestion(path.name, os.listdir(folder)) if folder.is_dir() else f"; nor is there a folder {folder}"
        )
        instructions = [part.rstrip(".") for part in (config.obtain, config.homepage) if part] if config else []
        how_to_get = f" How to get it: {', '.join(instructions)}." if instructions else ""
        raise UserError(f"data.sources.{name}.{setting}={value}: no such file or folder{hint}.{how_to_get}")
    if not path.is_dir() and not path.is_file():  # reading a pipe or a terminal would block for ever
        raise UserError(
            f"data.sources.{name}.{setting}={value} is a pipe, a device or a socket; give a regular file or a folder."
        )
    if setting == "image_root" and not path.is_dir():
        raise UserError(
            f"data.sources.{name}.image_root={value} is a file; give the folder that image paths start from."
        )
    return path


def find_record_files(name: str, path: Path, split: str | None) -> tuple[Path, list[Path]]:
    """Find the files with records at a path, which must all have one suffix.

    Args:
        split: the split to read if the files' names give several; None: only one split may be there.

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
        if split not in splits:
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
    names = [str(file.relative_to(path)) for file in files]
    chosen = select_split(setting, names, [infer_split(file) for file in names], split)
    files = [file for file, is_chosen in zip(files, chosen, strict=True) if is_chosen]
    suffixes = sorted({file.suffix.lower() for file in files})
    if len(suffixes) != 1:
        found = (
            f"files of several endings ({', '.join(suffixes)})"
            if suffixes
            else f"no file ending in {', '.join(RECORD_SUFFIXES)}"
        )
        raise UserError(f"{setting}: the folder has {found}. Give the file to read.")
    return path, files


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

    A cloned hub repository has its files in data/, or in train/ and test/.
    """
    found = _filter_record_files(setting, folder.iterdir())
    if not found:
        nested = (Path(parent, file) for parent, _, files in os.walk(folder) for file in files)
        found = _filter_record_files(setting, (file for file in nested if not _is_hidden(file.relative_to(folder))))
    return sorted(found)


def _filter_record_files(setting: str, paths: Iterable[Path]) -> list[Path]:
    found = [
        path
        for path in paths
        if path.suffix.lower() in RECORD_SUFFIXES and path.name not in _HUB_METADATA_FILES and not path.is_dir()
    ]
    for path in found:
        if not path.is_file():  # reading a pipe would block for ever
            raise UserError(
                f"{setting}: {path.name} is no regular file. Take it out of the folder, or give the file to read."
            )
    return found


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def open_row_files(name: str, path: Path, files: list[Path], cache_dir: Path | None) -> Rows:
    """Open the rows of the files.

    Args:
        cache_dir: folder in which the offsets of JSON and tar files are stored.
    """
    suffix = files[0].suffix.lower() if files else ".arrow"
    try:
        if path.is_dir() and (path / "state.json").exists():
            return arrow_files.open_saved_dataset(path)
        if suffix == ".parquet":
            return arrow_files.open_parquet(files)
        if suffix == ".arrow":
            return arrow_files.open_arrow(files)
        parts = [ROW_OPENERS[suffix](file, cache_dir) for file in files]
    except PermissionError as error:
        raise UserError(
            f"data.sources.{name}.path={path}: {error.filename} may not be read. Change its rights."
        ) from error
    return parts[0] if len(parts) == 1 else JoinedRows(parts)


def load_hub_rows(name: str, config: SourceConfig) -> tuple[Rows, list[Path]]:
    """Load the rows of a hub dataset, and list the local files that hold them."""
    if config.revision is not None and Path(config.hub or "").expanduser().is_dir():
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


def detect_format(name: str, rows: Rows) -> str:
    """Detect the format by the keys of the first readable record, among the first 100.

    Raises:
        UserError: none of these records can be read, or the keys fit no format.
    """
    setting, choices = f"data.sources.{name}.format", ", ".join(choice.name for choice in Format)
    first_error: RecordError | None = None
    for index in range(min(len(rows), 100)):
        try:
            row = rows[index]
        except RecordError as error:
            first_error = first_error or error
            continue
        record_format = detect_record_format(row)
        if record_format is None:
            raise UserError(
                f"{rows.get_origin(index)}: cannot tell the format from the keys {format_keys(row)}. {NEEDED_KEYS}. "
                f"Say it with {setting}=<one of {choices}>, or convert the file."
            )
        return record_format
    raise UserError(
        f"No record can be read, the first fault: {first_error} Say the format with {setting}=<one of {choices}>."
    )


def format_suggestion(word: str, choices: Iterable[str]) -> str:
    """Format a suggestion for an error message, "; did you mean caption?", or "" if no choice is similar."""
    close = difflib.get_close_matches(word, list(choices), n=1)
    return f"; did you mean {close[0]}?" if close else ""
