"""Quarantine ledger (`ledger.jsonl`): samples that were indexed as usable and became corrupt during training.

A run that finds such a sample adds it to the ledger and stops. The next start reads the ledger before training and
excludes its samples on all ranks, so that no sample is replaced or skipped without a record of it.
"""

from __future__ import annotations

import json
import time
import warnings
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from lit_vlm.data.index.columns import SampleIndex
from lit_vlm.files import append_line
from lit_vlm.types import RecordError, UserError


@dataclass(frozen=True, slots=True)
class LedgerEntry:
    """One line of `ledger.jsonl`: a corrupt record and the reason."""

    source: str
    position: int  # in its source
    origin: str  # location for the user, such as file and line
    fault: str  # name of a types.Fault
    reason: str
    id: str = ""  # of the record, if known
    time: str = ""  # UTC, ISO 8601
    held_out: bool = False  # from a separate validation source, which may have the name of a training source


class Ledger:
    """Quarantine ledger of a run, `<run folder>/ledger.jsonl`. To use a repaired record again, delete its line."""

    def __init__(self, path: Path, entries: list[LedgerEntry]) -> None:
        self.path, self.entries = path, entries

    @classmethod
    def read(cls, path: str | Path) -> Ledger:
        """Read the ledger; without a file it is empty.

        An incomplete line of a process that was killed is ignored: its record will be found and added again.

        Raises:
            UserError: the file cannot be read.
        """
        path = Path(path)
        try:
            text = path.read_bytes().decode("utf-8", "replace")
        except FileNotFoundError:
            text = ""
        except OSError as error:
            raise UserError(
                f"{path} cannot be read: {error.strerror or error}. The samples that this run leaves out are listed there: "
                "mend it, or remove it, and a sample that is still bad is met and entered again."
            ) from error
        # splitlines() would also split at other Unicode line separators
        found = (_parse_entry(line) for line in text.split("\n"))
        return cls(path, [entry for entry in found if entry is not None])

    def __len__(self) -> int:
        return len(self.entries)

    def has(self, source: str, position: int, held_out: bool = False) -> bool:
        """Return True if the ledger contains the record."""
        return any((e.source, e.position, e.held_out) == (source, position, held_out) for e in self.entries)

    def add(
        self, source: str, position: int, error: RecordError, record_id: str = "", *, held_out: bool = False
    ) -> LedgerEntry:
        """Append one line and flush it to disk; safe for several processes at once."""
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        entry = LedgerEntry(source, position, error.origin, error.fault.value, error.reason, record_id, now, held_out)
        line = json.dumps(asdict(entry), ensure_ascii=False).encode("utf-8", "backslashreplace")
        append_line(self.path, line)
        self.entries.append(entry)
        return entry

    def find_samples(self, index: SampleIndex, *, held_out: bool = False) -> np.ndarray:
        """Find the samples of the index that the ledger lists: [excluded samples] int64, sorted.

        Entries whose record is not in the index (held out, or found bad since) are ignored. Warns if the source of an
        entry is not a source of the index.

        Args:
            held_out: the index belongs to separate validation sources.
        """
        names = [source.name for source in index.sources]
        entries = [entry for entry in self.entries if entry.held_out is held_out]
        unknown_sources = sorted({entry.source for entry in entries} - set(names))
        if unknown_sources:
            use = "validated" if held_out else "trained"
            warnings.warn(
                f"{self.path} names sources that are not {use} on: {', '.join(unknown_sources)}", stacklevel=2
            )
        found = [np.empty(0, dtype=np.int64)]
        for number, name in enumerate(names):
            positions = [entry.position for entry in entries if entry.source == name]
            if positions:
                samples = index.find_source_samples(number)
                found.append(samples[np.isin(index.position[samples], positions)])
        return np.sort(np.concatenate(found))


def _parse_entry(line: str) -> LedgerEntry | None:
    """Parse a line; return None if it is incomplete or malformed."""
    try:
        values = json.loads(line)
        return LedgerEntry(**{item.name: values[item.name] for item in fields(LedgerEntry)})
    except (ValueError, TypeError, KeyError):
        return None
