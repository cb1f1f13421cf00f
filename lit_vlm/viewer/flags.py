"""Flags of the viewer: records that a person leaves out of training, as a selection file for each source."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lit_vlm.data.selection import (
    SELECTION_SUFFIX,
    RowsIdentity,
    check_selection,
    identify_rows,
    read_selection,
    write_selection,
)
from lit_vlm.types import Source

PASS_NAME = "view"  # in the passes of a selection file


@dataclass(slots=True)
class FlaggedSource:
    """A source whose records can be flagged.

    Attributes:
        whole: all of its records.
        earlier: positions that its own selection leaves out.
        flagged: positions of the flagged records.
        passes: passes of its own selection.
        identity: of its records; None: not computed yet, which reads JSON files once.
    """

    whole: Source
    earlier: frozenset[int] = frozenset()
    flagged: set[int] = field(default_factory=set)
    passes: tuple[str, ...] = ()
    identity: RowsIdentity | None = None


class RecordFlags:
    """Flags of records. Each change is on disk when `set_flag` returns; all methods are thread-safe.

    Args:
        folder: folder of the selection files. Flags that are there already are read.
        sources: by name.

    Raises:
        UserError: a selection file in the folder was made of other records, or cannot be read.
    """

    def __init__(self, folder: Path, sources: Mapping[str, FlaggedSource]) -> None:
        self.folder, self._sources = folder, dict(sources)
        self._lock = threading.Lock()
        for name, source in self._sources.items():
            path = self._get_path(name)
            if path.is_file():
                selection = read_selection(path, "task=view")
                check_selection(selection, source.whole, str(path))
                source.flagged = set(selection.list_left_out().tolist()) - source.earlier
                source.identity = selection.identity

    def has_source(self, name: str, whole: Source) -> bool:
        """Return True if records of this source can be flagged: a source with this name and these records."""
        return name in self._sources and _get_files_digest(self._sources[name].whole) == _get_files_digest(whole)

    def get_sources(self) -> dict[str, Source]:
        """Return all records of each source, by name."""
        return {name: source.whole for name, source in self._sources.items()}

    def is_flagged(self, name: str, position: int) -> bool:
        """Return True if a record is flagged."""
        return position in self._sources[name].flagged

    def get_flagged(self, name: str) -> np.ndarray:
        """Return the positions of the flagged records of a source, [n] int64 ascending."""
        return np.array(sorted(self._sources[name].flagged), dtype=np.int64)

    def set_flag(self, name: str, position: int, is_flagged: bool) -> None:
        """Flag a record or take its flag away, and write the selection file of its source.

        Raises:
            UserError: the file cannot be written.
        """
        source = self._sources[name]
        with self._lock:
            (source.flagged.add if is_flagged else source.flagged.discard)(position)
            path = self._get_path(name)
            if not source.flagged:
                path.unlink(missing_ok=True)
                return
            source.identity = source.identity or identify_rows(source.whole)
            left_out = np.array(sorted(source.flagged | source.earlier), dtype=np.int64)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_selection(path, source.whole, source.identity, left_out, (*source.passes, PASS_NAME))

    def describe(self) -> dict[str, object]:
        """Describe the flags: their number, and the settings that train without the flagged records."""
        used = {name: source for name, source in self._sources.items() if source.flagged}
        settings = [f"data.sources.{name}.selection={self._get_path(name)}" for name in used]
        return {"num_flagged": sum(len(source.flagged) for source in used.values()), "settings": settings}

    def _get_path(self, name: str) -> Path:
        return self.folder / f"{name}{SELECTION_SUFFIX}"


def _get_files_digest(source: Source) -> str:
    """Return the digest of a source's records, whatever number of them is read."""
    return getattr(source, "files_digest", source.digest)
