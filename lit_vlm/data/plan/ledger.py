"""The ledger: samples that were usable when they were indexed and turned bad while training.

A run that meets one enters it and stops. The next start reads the ledger before it trains and leaves its samples out,
on every rank alike, so that nothing is swapped or skipped behind anybody's back.
"""

from __future__ import annotations

import json
import time
import warnings
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from lit_vlm.data.index.columns import Index
from lit_vlm.files import append_line
from lit_vlm.types import RecordError, UserError


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of ledger.jsonl."""

    source: str
    position: int  # in its source
    origin: str  # where a person finds it
    fault: str  # a name of types.Fault
    reason: str
    id: str = ""  # the record's, where it is known
    time: str = ""  # UTC, ISO 8601
    held_out: bool = False  # of a validation source of its own, which may have the name of a training source


class Ledger:
    """`<run folder>/ledger.jsonl`. A record that is mended comes back when its line is taken out."""

    def __init__(self, path: Path, entries: list[Entry]) -> None:
        self.path, self.entries = path, entries

    @classmethod
    def read(cls, path: str | Path) -> Ledger:
        """What is there; nothing where there is no file.

        A line that was torn by the end of its process is left out: its record is met, and entered, once more.

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
        found = (_entry(line) for line in text.split("\n"))  # not at every line separator of Unicode
        return cls(path, [entry for entry in found if entry is not None])

    def __len__(self) -> int:
        return len(self.entries)

    def has(self, source: str, position: int, held_out: bool = False) -> bool:
        """Tell whether the record is entered."""
        return any((e.source, e.position, e.held_out) == (source, position, held_out) for e in self.entries)

    def add(
        self, source: str, position: int, error: RecordError, record_id: str = "", *, held_out: bool = False
    ) -> Entry:
        """Append one line and see it onto the disk; several processes may do so at once."""
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        entry = Entry(source, position, error.origin, error.fault.value, error.reason, record_id, now, held_out)
        line = json.dumps(asdict(entry), ensure_ascii=False).encode("utf-8", "backslashreplace")
        append_line(self.path, line)
        self.entries.append(entry)
        return entry

    def samples(self, index: Index, *, held_out: bool = False) -> np.ndarray:
        """[left out] int64, sorted: the samples of the index that are entered.

        Args:
            held_out: the index is of validation sources of their own.

        Those that the index lacks anyway (held out, or found bad since) need nothing. Warns of entries whose source is
        not among the index's.
        """
        names = [source.name for source in index.sources]
        entries = [entry for entry in self.entries if entry.held_out is held_out]
        strange = sorted({entry.source for entry in entries} - set(names))
        if strange:
            use = "validated" if held_out else "trained"
            warnings.warn(f"{self.path} names sources that are not {use} on: {', '.join(strange)}", stacklevel=2)
        found = [np.empty(0, dtype=np.int64)]
        for number, name in enumerate(names):
            positions = [entry.position for entry in entries if entry.source == name]
            if positions:
                samples = index.of_source(number)
                found.append(samples[np.isin(index.position[samples], positions)])
        return np.sort(np.concatenate(found))


def _entry(line: str) -> Entry | None:
    try:
        values = json.loads(line)
        return Entry(**{item.name: values[item.name] for item in fields(Entry)})
    except (ValueError, TypeError, KeyError):
        return None
