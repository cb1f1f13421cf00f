"""Data sources: `open_source` opens a dataset in its original format and reads it record by record.

The formats are in `readers/`. A file that cannot be read at all ends the run (`UserError`). A single record that cannot
be used is a `RecordError` of `source[index]`; the other records stay usable.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lit_vlm.config.choices import Format, MarkerMeaning, Markup
from lit_vlm.config.schema import SourceConfig
from lit_vlm.config.user_classes import is_class_path
from lit_vlm.data.generated import GeneratedSource
from lit_vlm.data.readers.columns import check_columns, get_columns, rename_columns
from lit_vlm.data.readers.context import ReaderSettings, RecordContext, find_mark
from lit_vlm.data.readers.formats import FORMATS, RecordReader, read_any_format
from lit_vlm.data.readers.own_source import open_own_source
from lit_vlm.data.readers.record_files import (
    check_file_split,
    detect_format,
    find_pattern_files,
    find_pattern_folder,
    find_record_files,
    is_pattern,
    list_identity_files,
    load_hub_rows,
    open_row_files,
    resolve_source_path,
)
from lit_vlm.data.readers.rows import Rows
from lit_vlm.data.readers.rows.base import list_file_identities
from lit_vlm.data.selection import apply_selection
from lit_vlm.data.subsets import EnlargedSource, SourceSubset, TileLimitedSource
from lit_vlm.formatting import format_count
from lit_vlm.types import IMAGE_TOKEN, Language, Record, SampleKind, Source, UserError, find_nearest, format_suggestion

# By the names of config's Format, and formats that only `auto` finds.
READERS: dict[str, RecordReader] = {**FORMATS, "sharegpt": FORMATS["llava"], "webdataset": read_any_format}
_MARKUP_KINDS = (SampleKind.ocr, SampleKind.grounding, SampleKind.referring)
_READER_VERSION = 4  # increase it when the same files are read differently; it is part of the digests


class FileSource:
    """Dataset in files. Its pickle is small, for the workers of a data loader.

    Args:
        name: name of the source in the configuration.
        rows: rows of the files, by number.
        read: reader function of the format.
        settings: reader settings.
        limit: read only the first `limit` rows; None: all.
        digest: of the files and the reader settings.
        files_digest: of the files alone.
    """

    def __init__(
        self,
        name: str,
        rows: Rows,
        read: RecordReader,
        settings: ReaderSettings,
        limit: int | None,
        digest: str,
        files_digest: str,
    ) -> None:
        self.name, self.digest, self.files_digest = name, digest, files_digest
        self._rows, self._read, self._settings = rows, read, settings
        self._length = len(rows) if limit is None else min(limit, len(rows))

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < self._length:
            raise IndexError(index)
        place = RecordContext(self._rows.get_origin(index), self._settings)
        try:
            row = self._rows[index]
            if self._settings.columns:
                row = rename_columns(row, self._settings.columns)
            return self._read(row, place)
        except RecursionError:
            raise place.make_error("it is nested too deeply to be read") from None

    def origin(self, index: int) -> str:
        """Return the location of the record for the user, even if it cannot be read."""
        return self._rows.get_origin(index)

    def digest_of(self, start: int, stop: int) -> str:
        """Hash the content of records start to stop - 1 and the reader settings; for JSON independent of their position."""
        if not 0 <= start < stop <= self._length:
            raise IndexError((start, stop))
        hasher = hashlib.sha256(_dump_reader_settings(self._settings).encode())
        self._rows.update_hash(hasher, start, stop)
        return hasher.hexdigest()

    def compute_rows_digest(self) -> str:
        """Compute the digest of the content of all records, whatever settings they are read with."""
        hasher = hashlib.sha256()
        self._rows.update_hash(hasher, 0, self._length)
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
    if config.selection is not None or config.generated is not None:
        options: dict[str, Any] = {"max_image_pixels": max_image_pixels, "seed": seed, "held_out": held_out}
        derived = _open_derived(name, config, options | {"cache": cache})
        return _enlarge_images(config, _apply_fraction(name, config, derived))
    kind = _parse_kind(name, config.kind)
    split = config.split or (None if held_out else "train")  # the split that records may name
    if is_class_path(config.format):
        settings = _build_settings(name, config, kind, max_image_pixels, config.format, Path(config.path or "."), split)
        source = open_own_source(name, config, settings)
    elif config.format in (Format.builtin, Format.digits):
        source = _make_source(name, config, kind, seed, held_out)
    elif config.format == Format.mapped:
        source = _open_mapped(name, config, kind, max_image_pixels, split)
    else:
        source = _open_files(name, config, kind, max_image_pixels, split, cache)
    return _enlarge_images(config, _apply_fraction(name, config, source))


def choose_all_records(config: SourceConfig) -> SourceConfig:
    """Return the settings of the same source with all of its records: no selection, fraction or number of samples, and images as they are."""
    num_samples = config.num_samples if config.format == Format.builtin else None  # there it says how many to make
    return replace(config, selection=None, fraction=None, num_samples=num_samples, enlarge_to_px=None)


def _open_derived(name: str, config: SourceConfig, options: dict[str, Any]) -> Source:
    """Open a source of selected records, or of generated turns. A selection may be one of generated turns."""
    limit = None if config.fraction is not None or config.format == Format.builtin else config.num_samples
    whole = choose_all_records(config)
    if config.selection is not None:
        path = resolve_source_path(name, "selection", config.selection)
        return apply_selection(open_source(name, whole, **options), path, f"data.sources.{name}.selection", limit)
    path = resolve_source_path(name, "generated", config.generated)
    records = open_source(name, replace(whole, generated=None), **options)
    return GeneratedSource(records, path, f"data.sources.{name}.generated", limit)


def _apply_fraction(name: str, config: SourceConfig, source: Source) -> Source:
    if config.fraction is None:
        return source
    share = SourceSubset(source, config.fraction, config.num_samples)
    if not len(share):
        found = f"chooses none of its {format_count(len(source), 'record')}"
        raise UserError(f"data.sources.{name}.fraction={config.fraction} {found}. Raise it.")
    return share


def _enlarge_images(config: SourceConfig, source: Source) -> Source:
    return source if config.enlarge_to_px is None else EnlargedSource(source, config.enlarge_to_px)


def _open_files(
    name: str,
    config: SourceConfig,
    kind: SampleKind | None,
    max_image_pixels: int,
    split: str | None,
    cache: Path | None,
) -> FileSource:
    rows, files, root = _open_rows(name, config, cache)
    if not len(rows):
        where = f"hub={config.hub}" if config.hub else f"path={config.path}"
        raise UserError(f"data.sources.{name}.{where}: no records in it. Give a file that has some.")
    columns = get_columns(config.columns)
    check_columns(name, columns, rows)
    archive = files[0].suffix.lower() == ".tar"
    if config.format == Format.webdataset and not archive:
        raise UserError(f"data.sources.{name}.format=webdataset reads .tar files; found {files[0].name}.")
    if archive and config.image_root is not None:
        raise UserError(
            f"data.sources.{name}.image_root has no effect: the pictures are those of {files[0].name}. Take it away."
        )
    if config.format != Format.auto:
        source_format = str(config.format)
    else:
        source_format = "webdataset" if archive else detect_format(name, rows, columns)
    settings = _build_settings(name, config, kind, max_image_pixels, source_format, root, split)
    limit = config.num_samples if config.fraction is None else None  # else it limits the selected records
    identities = list_file_identities(list_identity_files(files))
    digest = _compute_digest(identities, settings, limit)
    files_digest = hashlib.sha256(json.dumps(identities).encode()).hexdigest()
    return FileSource(name, rows, READERS[source_format], settings, limit, digest, files_digest)


def _open_rows(name: str, config: SourceConfig, cache: Path | None) -> tuple[Rows, list[Path], Path]:
    """Open the rows; return them with their files and the default folder of relative image paths."""
    if config.hub is not None:
        if config.path is not None:
            raise UserError(f"data.sources.{name}: both path and hub are given; one of them must go.")
        rows, files = load_hub_rows(name, config)
        local = Path(config.hub).expanduser()
        return rows, files, local if local.is_dir() else (files or [local])[0].parent
    if config.path is not None and is_pattern(config.path):
        files = find_pattern_files(name, config.path)
        folder = find_pattern_folder(config.path)
        rows = open_row_files(name, folder, files, cache)
        if config.split is not None:
            check_file_split(name, rows, files[0], config.split)
        return rows, files, folder
    path, files = find_record_files(
        name,
        resolve_source_path(name, "path", config.path, config),
        config.split,
        only_tars=config.format == Format.webdataset,
    )
    rows = open_row_files(name, path, files, cache)
    if config.split is not None and path.is_file():
        check_file_split(name, rows, path, config.split)
    return rows, files, path if path.is_dir() else path.parent


def _open_mapped(
    name: str, config: SourceConfig, kind: SampleKind | None, max_image_pixels: int, split: str | None
) -> Source:
    from lit_vlm.data.readers.mapped import MappedSource

    if config.mapping is None:
        raise UserError(f"data.sources.{name}: format=mapped needs mapping, which fields are picture and answer.")
    path = resolve_source_path(name, "path", config.path, config)
    root = path if path.is_dir() else path.parent
    settings = _build_settings(name, config, kind, max_image_pixels, "mapped", root, split)
    limit = config.num_samples if config.fraction is None else None
    return MappedSource(path, config.mapping, settings, limit, split=config.split)


def _build_settings(
    name: str,
    config: SourceConfig,
    kind: SampleKind | None,
    max_image_pixels: int,
    source_format: str,
    root: Path,
    split: str | None,
) -> ReaderSettings:
    """Build the reader settings.

    Args:
        root: folder of relative image paths, unless image_root is set.
    """
    given = config.image_root if isinstance(config.image_root, list) else [config.image_root]
    own_roots = [resolve_source_path(name, "image_root", folder, config) for folder in given if folder is not None]
    image_root, *more_image_roots = [folder.resolve() for folder in own_roots or [root]]
    return ReaderSettings(
        source=name,
        format=source_format,
        image_root=image_root,
        max_pixels=max_image_pixels,
        language=Language[config.language.name],
        kind=kind,
        markup=config.markup is Markup.on or (config.markup is Markup.auto and kind in _MARKUP_KINDS),
        max_tiles=config.max_tiles,
        prompts=_parse_prompts(name, config.prompts, config.marks is MarkerMeaning.text),
        split=split,
        counts_markup=config.markup is Markup.auto,
        marks_are_text=config.marks is MarkerMeaning.text,
        more_image_roots=tuple(more_image_roots),
        columns=get_columns(config.columns),
    )


def _make_source(name: str, config: SourceConfig, kind: SampleKind | None, seed: int, held_out: bool) -> Source:
    """Make a source of generated data (builtin) or of data bundled with a library (digits)."""
    if config.prompts:
        raise UserError(f"data.sources.{name}.prompts: not for format={config.format}, whose records ask already.")
    make = _make_digits_source if config.format == Format.digits else _make_builtin_source
    source = make(name, config, Language[config.language.name], kind, seed, held_out)
    return source if config.max_tiles is None else TileLimitedSource(source, config.max_tiles)


def _make_digits_source(
    name: str, config: SourceConfig, language: Language, kind: SampleKind | None, seed: int, held_out: bool
) -> Source:
    from lit_vlm.data.synthetic.digits import DigitsSource

    limit = config.num_samples if config.fraction is None else None
    return DigitsSource(name, language, kind=kind or SampleKind.digit, limit=limit, held_out=held_out)


def _make_builtin_source(
    name: str, config: SourceConfig, language: Language, kind: SampleKind | None, seed: int, held_out: bool
) -> Source:
    if config.path is None or config.num_samples is None:
        raise UserError(
            f"data.sources.{name}: format=builtin needs path, the kind of picture (e.g. path=caption), "
            f"and num_samples, how many to make."
        )
    from lit_vlm.data.synthetic import BuiltinSource

    return BuiltinSource(
        name,
        config.path,
        language=language,
        num_samples=config.num_samples,
        hard=config.hard,
        seed=seed,
        held_out=held_out,
    )


def _parse_kind(name: str, kind: str | None) -> SampleKind | None:
    if kind is None:
        return None
    if kind not in SampleKind.__members__:
        suggestion = format_suggestion(find_nearest(kind, SampleKind))
        raise UserError(f"data.sources.{name}.kind={kind} is unknown; one of: {', '.join(SampleKind)}.{suggestion}")
    return SampleKind(kind)


def _parse_prompts(name: str, prompts: Sequence[str], marks_are_text: bool) -> tuple[str, ...]:
    for prompt in prompts:
        mark = (IMAGE_TOKEN,) if IMAGE_TOKEN in prompt else None if marks_are_text else find_mark(prompt)
        if mark or not prompt.strip():
            what = f"holds {mark[0]!r}; the image is put before it" if mark else "is empty"
            raise UserError(f"data.sources.{name}.prompts: {prompt!r} {what}. Give the question alone.")
    return tuple(unicodedata.normalize("NFC", prompt) for prompt in prompts)


def _dump_reader_settings(settings: ReaderSettings) -> str:
    """Dump the settings that determine how a row is read; the source's name does not."""
    return json.dumps([_READER_VERSION, settings.describe()], sort_keys=True, default=str)


def _compute_digest(files: Sequence[tuple[str, int, int]], settings: ReaderSettings, limit: int | None) -> str:
    read = [files, _dump_reader_settings(settings), limit]
    return hashlib.sha256(json.dumps(read).encode()).hexdigest()
