"""Memory-mapped rows of parquet, Arrow, saved datasets and hub datasets, through Hugging Face `datasets`."""

from __future__ import annotations

import bisect
import dataclasses
import glob
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lit_vlm.data.lazy_images import REMEDY
from lit_vlm.data.readers.rows.base import DuplicateKeyError, Hasher, JoinedRows, Rows, get_file_identity, split_range
from lit_vlm.types import RecordError, UserError

_MAX_BLOCK_ROWS, _MAX_BLOCK_BYTES = 64, 1 << 20  # of rows that follow each other and are converted together


class ArrowRows:
    """Rows of a `datasets.Dataset`, with images left encoded.

    Rows that are read in order are converted in blocks, which double up to 64 rows or 1 MiB; others one by one.

    Args:
        names: name of each file, for error messages.
        counts: number of rows of each file.
        files: files of the rows, in the order of the rows; empty: the cache files that `datasets` mapped.
    """

    def __init__(self, dataset: Any, names: Sequence[str], counts: Sequence[int], files: Sequence[Path] = ()) -> None:
        from datasets.features.features import require_decoding

        self._dataset, self._names = dataset.with_format("arrow"), list(names)
        self._ends = list(itertools.accumulate(counts))
        self._files = list(files) or [Path(file["filename"]) for file in dataset.cache_files]
        self._features = type(dataset.features)(_disable_decoding(dict(dataset.features)))
        self._needs_decoding = require_decoding(dict(self._features))  # a column of JSON
        self._block: tuple[int, int, list[dict[str, Any]]] = (0, 0, [])  # first row, place of the next one, rows

    @property
    def files(self) -> list[Path]:
        """The local files that hold the rows."""
        return self._files

    @property
    def file_starts(self) -> list[int]:
        """The first row of each file that has rows."""
        starts = zip([0, *self._ends], self._ends, strict=False)
        return [start for start, end in starts if end > start]

    def __len__(self) -> int:
        return len(self._dataset)

    def get_origin(self, index: int) -> str:
        part = bisect.bisect_right(self._ends, index)
        return f"{self._names[part]}[{index - (self._ends[part - 1] if part else 0)}]"

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self._read_row(index)
        if not self._needs_decoding:
            return row
        try:
            return self._features.decode_example(row)
        except DuplicateKeyError as error:
            raise RecordError(self.get_origin(index), str(error), REMEDY) from None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_block": (0, 0, [])}

    def _read_row(self, index: int) -> dict[str, Any]:
        first, place, rows = self._block
        if index != first + place:  # not the next one in order
            self._block = (index, 1, [{}])
            return self._dataset[index].to_pylist()[0]
        if place == len(rows):
            table = self._dataset[index : min(index + min(max(1, 2 * len(rows)), _MAX_BLOCK_ROWS), len(self))]
            num_rows = max(1, min(len(table), _MAX_BLOCK_BYTES * len(table) // max(1, table.nbytes)))
            first, place, rows = index, 0, table.slice(0, num_rows).to_pylist()
        self._block = (first, place + 1, rows)
        return dict(rows[place])  # the caller may change it, and another thread may ask for the same row

    def update_hash(self, hasher: Hasher, start: int, stop: int) -> None:
        """Update the hasher with file identities and row numbers: an unchanged file has unchanged rows."""
        if len(self._files) != len(self._ends):  # cache files of `datasets`, which cuts them by its own rule
            hasher.update(repr(([get_file_identity(file) for file in self._files], start, stop)).encode())
            return
        for number, first, last in split_range(self._ends, start, stop):
            hasher.update(repr((get_file_identity(self._files[number]), first, last)).encode())


def open_parquet(paths: Sequence[Path]) -> Rows:
    """Open parquet files. `datasets` converts them once to Arrow in its cache: parquet has no cheap access by row."""
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        counts = [pq.read_metadata(path).num_rows for path in paths]
        filled = [
            path for path, count in zip(paths, counts, strict=True) if count
        ]  # `datasets` fails on a file without rows
        if not filled:
            return JoinedRows(())
        datasets.disable_progress_bars()
        dataset = datasets.Dataset.from_parquet([glob.escape(str(path.resolve())) for path in filled])
    except (OSError, pa.ArrowException, datasets.exceptions.DatasetsError) as error:
        cause = error.__cause__ or error
        raise UserError(f"{_format_paths(paths)}: cannot be read as parquet: {cause}. Repair or replace it.") from error
    return ArrowRows(dataset, [path.name for path in paths], counts, paths)


def open_arrow(paths: Sequence[Path]) -> ArrowRows:
    """Open Arrow files; raise a UserError if one cannot be read."""
    import datasets
    import pyarrow as pa

    try:
        parts = [datasets.Dataset.from_file(str(path)) for path in paths]
        dataset = datasets.concatenate_datasets(parts)
    except (OSError, pa.ArrowException, ValueError) as error:
        raise UserError(f"{_format_paths(paths)}: cannot be read as Arrow: {error}. Repair or replace it.") from error
    return ArrowRows(dataset, [path.name for path in paths], [len(part) for part in parts], paths)


def open_saved_dataset(folder: Path) -> ArrowRows:
    """Open a folder that `Dataset.save_to_disk` wrote."""
    import datasets

    try:
        dataset = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder}: cannot be read as a saved dataset: {error}. Save it again.") from error
    return ArrowRows(dataset, [folder.name], [len(dataset)])


def load_hub_dataset(setting: str, hub: str, config: str | None, split: str, revision: str | None) -> ArrowRows:
    """Load a dataset of the Hugging Face hub, from the local cache if it is there; or a local folder of the same layout.

    Raises:
        UserError: names the setting: no network, no such dataset, split or revision.
    """
    import datasets

    try:
        dataset = datasets.load_dataset(hub, config, split=split, revision=revision)
    except MemoryError:
        raise
    except Exception as error:  # `datasets` and the hub's client raise some 30 exception types, from several libraries
        raise UserError(
            f"{setting}={hub}: cannot be loaded: {_get_first_line(error)}. Where there is no network, download it beforehand "
            f"(`hf download {hub} --repo-type dataset --local-dir <folder>`) and set {setting}=<folder>, or path=<file>."
        ) from error
    return ArrowRows(dataset, [f"{hub.rstrip('/').rsplit('/', 1)[-1]}:{split}"], [len(dataset)])


def _get_first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".")


def _disable_decoding(feature: Any) -> Any:
    """Disable decoding of media in a feature, so that they stay {bytes, path}. JSON columns are still parsed."""
    if isinstance(feature, dict):
        return {key: _disable_decoding(inner) for key, inner in feature.items()}
    if hasattr(feature, "feature"):
        return dataclasses.replace(feature, feature=_disable_decoding(feature.feature))
    if type(feature).__name__ == "Json":
        from lit_vlm.data.readers.rows.json_columns import StrictJsonFeature

        return StrictJsonFeature()
    is_media = getattr(feature, "decode", False)
    return dataclasses.replace(feature, decode=False) if is_media else feature


def _format_paths(paths: Sequence[Path]) -> str:
    return str(paths[0]) if len(paths) == 1 else f"{paths[0].parent} ({len(paths)} files)"
