"""Data sources: `open_source` opens a dataset in its original format and reads it record by record.

The formats are in `readers/`. A file that cannot be read at all ends the run (`UserError`). A single record that cannot
be used is a `RecordError` of `source[index]`; the other records stay usable.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from lit_vlm.config.schema import Format, Marks, Markup, SourceConfig
from lit_vlm.data.readers.by_keys import FORMATS, Reader, read_by_keys
from lit_vlm.data.readers.chosen import Chosen, FewerTiles
from lit_vlm.data.readers.dialects import find_mark
from lit_vlm.data.readers.files import (
    check_split_of_file,
    existing,
    find_files,
    found_format,
    hub_rows,
    nearest,
    rows_of,
)
from lit_vlm.data.readers.place import Place, Settings
from lit_vlm.data.readers.rows import Rows
from lit_vlm.data.readers.rows.base import identity
from lit_vlm.data.staging import original
from lit_vlm.types import IMAGE_TOKEN, Kind, Language, Record, Source, UserError, counted

# By the names of config's Format, and formats that only `auto` finds.
READERS: dict[str, Reader] = {**FORMATS, "sharegpt": FORMATS["llava"], "webdataset": read_by_keys}
_MARKUP_KINDS = (Kind.ocr, Kind.grounding, Kind.referring)
_READING = 4  # increase it when the same files are read differently; it is part of the digests


class FileSource:
    """Dataset in files. Its pickle is small, for the workers of a data loader.

    Args:
        name: name of the source in the configuration.
        rows: rows of the files, by number.
        read: reader function of the format.
        settings: reader settings.
        limit: read only the first `limit` rows; None: all.
        digest: of the files and the reader settings.
    """

    def __init__(self, name: str, rows: Rows, read: Reader, settings: Settings, limit: int | None, digest: str) -> None:
        self.name, self.digest = name, digest
        self._rows, self._read, self._settings = rows, read, settings
        self._length = len(rows) if limit is None else min(limit, len(rows))

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < self._length:
            raise IndexError(index)
        place = Place(self._rows.origin(index), self._settings)
        try:
            return self._read(self._rows[index], place)
        except RecursionError:
            raise place.fault("it is nested too deeply to be read") from None

    def origin(self, index: int) -> str:
        """Return the location of the record for the user, even if it cannot be read."""
        return self._rows.origin(index)

    def digest_of(self, start: int, stop: int) -> str:
        """Hash the content of records start to stop - 1 and the reader settings; for JSON independent of their position."""
        if not 0 <= start < stop <= self._length:
            raise IndexError((start, stop))
        hasher = hashlib.sha256(_reading(self._settings).encode())
        self._rows.update(hasher, start, stop)
        return hasher.hexdigest()


def open_source(
    name: str,
    config: SourceConfig,
    *,
    max_image_pixels: int,
    seed: int = 0,
    held_out: bool = False,
    cache: Path | None = None,
) -> Source:
    """Open the source `data.sources.<name>`: find its files and detect its format.

    Args:
        max_image_pixels: limit of an image's height times width.
        seed: of the images that format=builtin generates.
        held_out: for sources that generate or bundle their data (builtin, digits): open the held-out part. For files,
            the caller splits.
        cache: folder for the offsets of records in their files, so that they are searched only once.

    Raises:
        UserError: names the setting: nothing at the path, no records, an unknown format or kind.
    """
    if config.num_samples is not None and config.num_samples < 1:
        raise UserError(f"data.sources.{name}.num_samples={config.num_samples}: at least 1 is needed, or null for all.")
    if config.fraction is not None and not 0 < config.fraction <= 1:
        raise UserError(f"data.sources.{name}.fraction={config.fraction}: above 0 and at most 1, or null for all.")
    kind = _kind(name, config.kind)
    split = config.split or (None if held_out else "train")  # the split that records may name
    if config.format in (Format.builtin, Format.digits):
        source = _made(name, config, kind, seed, held_out)
    elif config.format is Format.mapped:
        source = _open_mapped(name, config, kind, max_image_pixels, split)
    else:
        source = _open_files(name, config, kind, max_image_pixels, split, cache)
    if config.fraction is None:
        return source
    share = Chosen(source, config.fraction, config.num_samples)
    if not len(share):
        found = f"chooses none of its {counted(len(source), 'record')}"
        raise UserError(f"data.sources.{name}.fraction={config.fraction} {found}. Raise it.")
    return share


def _open_files(
    name: str, config: SourceConfig, kind: Kind | None, max_image_pixels: int, split: str | None, cache: Path | None
) -> FileSource:
    rows, files, root = _opened(name, config, cache)
    if not len(rows):
        where = f"hub={config.hub}" if config.hub else f"path={config.path}"
        raise UserError(f"data.sources.{name}.{where}: no records in it. Give a file that has some.")
    archive = files[0].suffix.lower() == ".tar"
    if config.format is Format.webdataset and not archive:
        raise UserError(f"data.sources.{name}.format=webdataset reads .tar files; found {files[0].name}.")
    if archive and config.image_root is not None:
        raise UserError(
            f"data.sources.{name}.image_root has no effect: the pictures are those of {files[0].name}. Take it away."
        )
    if config.format is not Format.auto:
        source_format = config.format.name
    else:
        source_format = "webdataset" if archive else found_format(name, rows)
    settings = _settings(name, config, kind, max_image_pixels, source_format, root, split)
    limit = config.num_samples if config.fraction is None else None  # else it limits the selected records
    return FileSource(name, rows, READERS[source_format], settings, limit, _digest(files, settings, limit))


def _opened(name: str, config: SourceConfig, cache: Path | None) -> tuple[Rows, list[Path], Path]:
    """Open the rows; return them with their files and the default folder of relative image paths."""
    if config.hub is not None:
        if config.path is not None:
            raise UserError(f"data.sources.{name}: both path and hub are given; one of them must go.")
        rows, files = hub_rows(name, config)
        local = Path(config.hub).expanduser()
        return rows, files, local if local.is_dir() else (files or [local])[0].parent
    path, files = find_files(name, existing(name, "path", config.path, config), config.split)
    rows = rows_of(name, path, files, cache)
    if config.split is not None and path.is_file():
        check_split_of_file(name, rows, path, config.split)
    return rows, files, path if path.is_dir() else path.parent


def _open_mapped(
    name: str, config: SourceConfig, kind: Kind | None, max_image_pixels: int, split: str | None
) -> Source:
    from lit_vlm.data.readers.mapped import MappedSource

    if config.mapping is None:
        raise UserError(f"data.sources.{name}: format=mapped needs mapping, which fields are picture and answer.")
    path = existing(name, "path", config.path, config)
    root = path if path.is_dir() else path.parent
    settings = _settings(name, config, kind, max_image_pixels, "mapped", root, split)
    limit = config.num_samples if config.fraction is None else None
    return MappedSource(path, config.mapping, settings, limit, split=config.split)


def _settings(
    name: str,
    config: SourceConfig,
    kind: Kind | None,
    max_image_pixels: int,
    source_format: str,
    root: Path,
    split: str | None,
) -> Settings:
    """Build the reader settings.

    Args:
        root: folder of relative image paths, unless image_root is set.
    """
    own_root = config.image_root
    return Settings(
        source=name,
        format=source_format,
        image_root=(root if own_root is None else existing(name, "image_root", own_root, config)).resolve(),
        max_pixels=max_image_pixels,
        language=Language[config.language.name],
        kind=kind,
        markup=config.markup is Markup.on or (config.markup is Markup.auto and kind in _MARKUP_KINDS),
        max_tiles=config.max_tiles,
        prompts=_prompts(name, config.prompts, config.marks is Marks.text),
        split=split,
        counts_markup=config.markup is Markup.auto,
        marks_are_text=config.marks is Marks.text,
    )


def _made(name: str, config: SourceConfig, kind: Kind | None, seed: int, held_out: bool) -> Source:
    """Make a source of generated data (builtin) or of data bundled with a library (digits)."""
    if config.prompts:
        raise UserError(f"data.sources.{name}.prompts: not for format={config.format.name}, whose records ask already.")
    make = _digits if config.format is Format.digits else _builtin
    source = make(name, config, Language[config.language.name], kind, seed, held_out)
    return source if config.max_tiles is None else FewerTiles(source, config.max_tiles)


def _digits(
    name: str, config: SourceConfig, language: Language, kind: Kind | None, seed: int, held_out: bool
) -> Source:
    from lit_vlm.data.readers.digits import DigitsSource

    limit = config.num_samples if config.fraction is None else None
    return DigitsSource(name, language, kind=kind or Kind.digit, limit=limit, held_out=held_out)


def _builtin(
    name: str, config: SourceConfig, language: Language, kind: Kind | None, seed: int, held_out: bool
) -> Source:
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
        raise UserError(f"data.sources.{name}.kind={kind} is unknown{nearest(kind, Kind)}. One of: {', '.join(Kind)}.")
    return Kind(kind)


def _prompts(name: str, prompts: Sequence[str], marks_are_text: bool) -> tuple[str, ...]:
    for prompt in prompts:
        mark = (IMAGE_TOKEN,) if IMAGE_TOKEN in prompt else None if marks_are_text else find_mark(prompt)
        if mark or not prompt.strip():
            what = f"holds {mark[0]!r}; the image is put before it" if mark else "is empty"
            raise UserError(f"data.sources.{name}.prompts: {prompt!r} {what}. Give the question alone.")
    return tuple(unicodedata.normalize("NFC", prompt) for prompt in prompts)


def _reading(settings: Settings) -> str:
    """Dump the settings that determine how a row is read; the source's name does not."""
    fields = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    del fields["source"]
    fields["image_root"] = original(settings.image_root)
    return json.dumps([_READING, fields], sort_keys=True, default=str)


def _digest(files: Sequence[Path], settings: Settings, limit: int | None) -> str:
    read = [list(map(identity, files)), _reading(settings), limit]
    return hashlib.sha256(json.dumps(read).encode()).hexdigest()
