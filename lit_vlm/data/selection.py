"""Selection files: records of a source that stay in training, by their positions, as task=curate writes them.

A selection points at the records and copies none. `data.sources.<name>.selection` applies it to a source of any format. It
belongs to the records that were looked at: their number and a digest of their files or content are compared when it is read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lit_vlm.config.choices import CurationMethod
from lit_vlm.config.schema import DataConfig
from lit_vlm.data.subsets import PositionSubset, find_runs
from lit_vlm.files import read_json, write_json
from lit_vlm.formatting import format_count
from lit_vlm.types import Source, UserError

SELECTION_VERSION = 1
SELECTION_SUFFIX = ".selection.json"


@dataclass(frozen=True, slots=True)
class RowsIdentity:
    """Identity of the records of a source, whatever settings they are read with.

    Attributes:
        num_records: records of the source.
        files: digest of paths, sizes and times of its files.
        content: digest of the content of its records; for formats without cheap access, equal to `files`.
    """

    num_records: int
    files: str
    content: str


@dataclass(frozen=True, slots=True)
class Selection:
    """Selection of the records of a source.

    Attributes:
        source: name that the source had.
        identity: of the records that were looked at.
        left_out: (first, last) of each run of records that are left out, ascending.
        passes: what was looked for, in order.
    """

    source: str
    identity: RowsIdentity
    left_out: tuple[tuple[int, int], ...]
    passes: tuple[str, ...]

    def list_left_out(self) -> np.ndarray:
        """List the positions of the records that are left out: [n] int64, ascending."""
        runs = [np.arange(first, last + 1) for first, last in self.left_out]
        return np.concatenate([np.zeros(0, np.int64), *runs])

    def list_kept(self) -> np.ndarray:
        """List the positions of the other records: [n] int64, ascending."""
        return np.setdiff1d(np.arange(self.identity.num_records), self.list_left_out(), assume_unique=True)


def identify_rows(source: Source) -> RowsIdentity:
    """Identify the records of a source; reads the content of JSON files once."""
    files = getattr(source, "files_digest", source.digest)
    compute = getattr(source, "compute_rows_digest", None)
    return RowsIdentity(len(source), files, compute() if compute else source.digest)


def write_selection(
    path: Path, source: Source, identity: RowsIdentity, left_out: np.ndarray, passes: Sequence[str]
) -> None:
    """Write the selection of a source.

    Args:
        left_out: positions of the records to leave out, [n] ascending.
    """
    selection = Selection(source.name, identity, tuple(find_runs(left_out.astype(np.int64))), tuple(passes))
    write_json(path, {"version": SELECTION_VERSION, **asdict(selection)})


def read_selection(path: Path, setting: str) -> Selection:
    """Read a selection file.

    Args:
        setting: key of the path, for messages.

    Raises:
        UserError: there is no such file, or it is no selection of this version.
    """
    remedy = "Make it again with task=curate."
    values = read_json(path, remedy)
    if values is None:
        raise UserError(f"{setting}={path}: no such file. {remedy}")
    if values.get("version") != SELECTION_VERSION:
        found = f"version {values['version']!r}" if "version" in values else "no version"
        raise UserError(f"{setting}={path}: is no selection of version {SELECTION_VERSION}: it has {found}. {remedy}")
    try:
        return _parse_selection(values)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{setting}={path}: is damaged: {error}. {remedy}") from error


def _parse_selection(values: dict[str, Any]) -> Selection:
    identity = RowsIdentity(**values["identity"])
    runs = tuple((int(first), int(last)) for first, last in values["left_out"])
    end = -1
    for first, last in runs:
        if not end < first <= last < identity.num_records:
            raise ValueError(f"the run {first} to {last} is out of order, or not within {identity.num_records} records")
        end = last
    return Selection(values["source"], identity, runs, tuple(values["passes"]))


def check_selection(selection: Selection, source: Source, setting: str) -> None:
    """Raise UserError unless a selection was made of these records."""
    if reason := describe_changed_rows(selection.identity, source):
        raise UserError(f"{setting}: {reason}. Run task=curate again, or take the selection away.")


def require_contamination_search(data: DataConfig) -> dict[str, Selection]:
    """Require that the selections of all training sources are of a search for contamination, if `data.drop_contaminated` is set.

    Returns:
        The selections, by the name of the source; {} if it is not set.

    Raises:
        UserError: one is missing, or of another search.
    """
    if not data.drop_contaminated:
        return {}
    found = dict[str, Selection]()
    remedy = (
        "Look for rows of benchmarks first, with the same data settings: python run.py task=curate curate.method=contamination"
        " evaluate.files=<folder of the benchmarks> ... Or take data.drop_contaminated away."
    )
    for name, source in data.sources.items():
        assert source.selection is not None  # the parser sets it
        path, setting = Path(source.selection), f"data.sources.{name}.selection"
        if not path.is_file():
            raise UserError(f"data.drop_contaminated: there is no {path}. {remedy}")
        found[name] = read_selection(path, setting)
        if CurationMethod.contamination.value not in found[name].passes:
            raise UserError(
                f"data.drop_contaminated: {setting}={path} is of another search, so rows of benchmarks are still in it. {remedy}"
            )
    return found


def describe_changed_rows(known: RowsIdentity, source: Source) -> str:
    """Describe how the records of a source differ from those that a file was made of; "" if they are the same."""
    if known.num_records != len(source):
        return f"it was made of {format_count(known.num_records, 'record')}, and the source has {len(source):,}"
    files = getattr(source, "files_digest", source.digest)
    if known.files != files and known.content != identify_rows(source).content:
        return "the records have changed since, or they are those of another source"
    return ""


def apply_selection(source: Source, path: Path, setting: str, limit: int | None = None) -> Source:
    """Apply a selection file to a source.

    Args:
        limit: use only the first `limit` of the selected records.

    Raises:
        UserError: the file cannot be used, was made of other records, or leaves none.
    """
    selection = read_selection(path, setting)
    check_selection(selection, source, setting)
    kept = selection.list_kept()[:limit]
    if not len(kept):
        raise UserError(
            f"{setting}={path}: leaves none of {format_count(len(source), 'record')}. Take the source away."
        )
    digest = hashlib.sha256(f"{source.digest}\0{limit}\0".encode() + kept.tobytes()).hexdigest()
    return PositionSubset(source, kept, digest)
