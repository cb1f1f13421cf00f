"""`open_source`: a dataset as its owner has it, one record at a time.

The formats are in `readers/`. A file that cannot be read at all is the run's end (`UserError`); one record that
cannot be used is a `RecordError` of `source[index]`, and the others stay usable.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from lit_vlm.config.schema import Format, Markup, SourceConfig
from lit_vlm.data.images import shown
from lit_vlm.data.readers import rows as row_files
from lit_vlm.data.readers.llava import read_llava
from lit_vlm.data.readers.messages import read_messages
from lit_vlm.data.readers.preference import read_preference
from lit_vlm.data.readers.record import Place, Settings
from lit_vlm.data.readers.rows import Rows
from lit_vlm.types import Kind, Language, Record, RecordError, Source, UserError

Reader = Callable[[Mapping[str, Any], Place], Record]

READERS: dict[Format, Reader] = {
    Format.llava: read_llava,
    Format.messages: read_messages,
    Format.preference: read_preference,
}
ENDINGS = (".jsonl", ".json", ".parquet", ".arrow")
_MARKUP_KINDS = (Kind.ocr, Kind.grounding, Kind.referring)
_READING = 1  # raise it when the same files are read differently; it is part of the digest


class FileSource:
    """A dataset in files. Pickles small, for the loader's workers."""

    def __init__(self, name: str, rows: Rows, read: Reader, settings: Settings, limit: int | None, digest: str) -> None:
        self.name, self.digest = name, digest
        self._rows, self._read, self._settings = rows, read, settings
        self._length = len(rows) if limit is None else min(limit, len(rows))

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < self._length:
            raise IndexError(index)
        return self._read(self._rows[index], Place(self._rows.origin(index), self._settings))


def open_source(
    name: str, config: SourceConfig, *, max_image_pixels: int, seed: int = 0, held_out: bool = False
) -> Source:
    """The source `data.sources.<name>`, its files found and its first record recognised.

    Args:
        seed: of the pictures that format=builtin makes.
        held_out: of sources that make or bundle their data (builtin, digits), the part that training never sees. For
            files the caller splits.

    Raises:
        UserError: naming the setting: nothing at the path, no records, an unknown format or kind.
    """
    if config.num_samples is not None and config.num_samples < 1:
        raise UserError(f"data.sources.{name}.num_samples={config.num_samples}: at least 1 is needed, or null for all.")
    language, kind = Language[config.language.name], _kind(name, config.kind)
    if config.format is Format.builtin:
        return _builtin(name, config, language, seed, held_out)
    if config.format is Format.digits:
        from lit_vlm.data.readers.digits import DigitsSource

        return DigitsSource(name, language, kind=kind or Kind.digit, limit=config.num_samples, held_out=held_out)
    return _open_files(name, config, language, kind, max_image_pixels)


def _open_files(
    name: str, config: SourceConfig, language: Language, kind: Kind | None, max_image_pixels: int
) -> FileSource:
    path = _existing(name, "path", config.path)
    files = _files(name, path)
    rows = _rows(name, path, files)
    if not len(rows):
        raise UserError(f"data.sources.{name}.path={path}: no records in it. Give a file that has some.")
    source_format = _found_format(name, rows) if config.format is Format.auto else config.format
    root = path if path.is_dir() else path.parent
    settings = Settings(
        source=name,
        format=source_format.name,
        image_root=(root if config.image_root is None else _existing(name, "image_root", config.image_root)).resolve(),
        max_pixels=max_image_pixels,
        language=language,
        kind=kind,
        markup=config.markup is Markup.on or (config.markup is Markup.auto and kind in _MARKUP_KINDS),
    )
    digest = _digest(files, settings, config.num_samples)
    return FileSource(name, rows, READERS[source_format], settings, config.num_samples, digest)


def _builtin(name: str, config: SourceConfig, language: Language, seed: int, held_out: bool) -> Source:
    if config.path is None or config.num_samples is None:
        raise UserError(
            f"data.sources.{name}: format=builtin needs path, the kind of picture (e.g. path=caption), "
            f"and num_samples, how many to make."
        )
    from lit_vlm.data.builtin import BuiltinSource

    return BuiltinSource(
        name,
        config.path,
        language=language,
        num_samples=config.num_samples,
        hard=config.hard,
        seed=seed,
        held_out=held_out,
    )


def _kind(name: str, kind: str | None) -> Kind | None:
    if kind is None:
        return None
    if kind not in Kind.__members__:
        raise UserError(f"data.sources.{name}.kind={kind} is unknown{_nearest(kind, Kind)}. One of: {', '.join(Kind)}.")
    return Kind(kind)


def _existing(name: str, setting: str, value: str | None) -> Path:
    """The path of a setting. It is the operator's own, so it may lie anywhere."""
    if value is None:
        raise UserError(f"data.sources.{name}.{setting} is not set; give the dataset's file or folder.")
    path = Path(value).expanduser()
    if not path.exists():
        folder = path.parent
        beside = _nearest(path.name, os.listdir(folder)) if folder.is_dir() else f"; nor is there a folder {folder}"
        raise UserError(f"data.sources.{name}.{setting}={value}: no such file or folder{beside}.")
    if setting == "image_root" and not path.is_dir():
        raise UserError(
            f"data.sources.{name}.image_root={value} is a file; give the folder that image paths start from."
        )
    return path


def _files(name: str, path: Path) -> list[Path]:
    """The file itself, or the folder's files with records in them, which must all be of one ending."""
    if path.is_file():
        if path.suffix.lower() not in ENDINGS:
            raise UserError(
                f"data.sources.{name}.path={path}: cannot tell the format; endings are {', '.join(ENDINGS)}."
            )
        return [path]
    if (path / "dataset_dict.json").exists():
        splits = ", ".join(json.loads((path / "dataset_dict.json").read_text())["splits"])
        raise UserError(
            f"data.sources.{name}.path={path} holds several splits; give the folder of one of them: {splits}."
        )
    if (path / "state.json").exists():  # Dataset.save_to_disk; its JSON files are no records
        return sorted(path.glob("*.arrow"))
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in ENDINGS and file.is_file())
    endings = sorted({file.suffix.lower() for file in files})
    if len(endings) != 1:
        found = (
            f"files of several endings ({', '.join(endings)})" if endings else f"no file ending in {', '.join(ENDINGS)}"
        )
        raise UserError(f"data.sources.{name}.path={path}: the folder has {found}. Give the file to read.")
    return files


def _rows(name: str, path: Path, files: list[Path]) -> Rows:
    ending = files[0].suffix.lower() if files else ".arrow"
    try:
        if path.is_dir() and (path / "state.json").exists():
            return row_files.saved_dataset(path)
        if ending == ".parquet":
            return row_files.parquet(files)
        if ending == ".arrow":
            return row_files.arrow(files)
        parts = [row_files.json_list(file) if ending == ".json" else row_files.json_lines(file) for file in files]
    except PermissionError as error:
        raise UserError(
            f"data.sources.{name}.path={path}: {error.filename} may not be read. Change its rights."
        ) from error
    return parts[0] if len(parts) == 1 else row_files.JoinedRows(parts)


def _found_format(name: str, rows: Rows) -> Format:
    """By the keys of the first record that can be read at all."""
    setting, choices = f"data.sources.{name}.format", ", ".join(choice.name for choice in Format)
    fault: RecordError | None = None
    for index in range(min(len(rows), 100)):
        try:
            row = rows[index]
        except RecordError as error:
            fault = fault or error
            continue
        keys = {key for key, value in row.items() if value is not None}
        if {"chosen", "rejected"} <= keys:
            return Format.preference
        if "conversations" in keys:
            return Format.llava
        if "messages" in keys:
            return Format.messages
        found = ", ".join(shown(key, 40) for key in list(row)[:12])
        raise UserError(
            f"{rows.origin(index)}: cannot tell the format from the keys {found}. Needed: 'conversations' (llava), "
            f"'messages' (messages), or 'chosen' and 'rejected' (preference). "
            f"Say it with {setting}=<one of {choices}>, or convert the file."
        )
    raise UserError(
        f"No record can be read, the first fault: {fault} Say the format with {setting}=<one of {choices}>."
    )


def _digest(files: list[Path], settings: Settings, num_samples: int | None) -> str:
    stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    read = {
        "format": settings.format,
        "image_root": str(settings.image_root),
        "max_pixels": settings.max_pixels,
        "language": settings.language,
        "kind": settings.kind,
        "markup": settings.markup,
        "num_samples": num_samples,
    }
    return hashlib.sha256(json.dumps([_READING, stats, read], sort_keys=True).encode()).hexdigest()


def _nearest(word: str, words: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(words), n=1)
    return f"; did you mean {close[0]}?" if close else ""
