"""What becomes of the records that cannot be used: set aside in quarantine.jsonl, or the end of the run. A file lists all."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from lit_vlm.config.schema import OnBadRecord
from lit_vlm.files import written
from lit_vlm.types import Fault, RecordError, UserError

NUM_SHOWN = 10  # faults that a message lists; the file holds all
STOPPED = "bad_records.jsonl"


class Quarantine:
    """Collects the faults of a pass over the data, then settles them at once, so that a user sees all in one go.

    Those that turned bad while training are in the run's ledger.
    """

    def __init__(self) -> None:
        self._errors: dict[str, dict[tuple[str, str], RecordError]] = {}

    def add(self, source: str, error: RecordError) -> None:
        """The same fault of the same record counts once, however many passes find it."""
        self._errors.setdefault(source, {}).setdefault((error.origin, error.reason), error)

    def __len__(self) -> int:
        return sum(map(len, self._errors.values()))

    def counts(self) -> dict[str, int]:
        """Records set aside, by source. A record with two faults is one record."""
        return {source: sum(faults.values()) for source, faults in self.table().items()}

    def table(self) -> dict[str, dict[Fault, int]]:
        """Records set aside, by source and by the first fault that was found in them, the most frequent first."""
        return {source: dict(_by_fault(faults).most_common()) for source, faults in self._errors.items()}

    def settle(self, policy: OnBadRecord, max_share: float, totals: Mapping[str, int], path: Path) -> None:
        """Write the faults to `path`, or end the run. For one process; on several ranks, the first.

        Args:
            policy: `stop` ends at any fault; all are then listed in STOPPED beside `path`, which is left as it is: it may be of
                a finished run.
            max_share: the largest share of a source's records that may be set aside, 0 to 1.
            totals: records of each source, the bad ones included.
            path: quarantine.jsonl; replaced at once and as a whole. Without a fault it is an empty file.

        Raises:
            UserError: a fault under `stop`; a share above `max_share`, after the file is written.
        """
        lines = [line for source, faults in self._errors.items() for line in _lines(source, faults)]
        stopped = path.with_name(STOPPED)
        if policy is OnBadRecord.stop and lines:
            _write(stopped, lines)
            raise UserError(self._stopped(stopped))
        stopped.unlink(missing_ok=True)  # of an earlier start, before the records were mended
        if policy is OnBadRecord.stop:
            return
        _write(path, lines)
        counts = self.counts()
        exceeded = [source for source, count in counts.items() if count > max_share * totals[source]]
        if exceeded:
            raise UserError(self._exceeded(exceeded, max_share, totals, path))

    def _stopped(self, path: Path) -> str:
        found = [error for faults in self._errors.values() for error in faults.values()]
        lines = [f"  {error.origin}: {error.reason}" for error in found[:NUM_SHOWN]]
        if len(found) > NUM_SHOWN:
            lines.append(f"  ... and {len(found) - NUM_SHOWN:,} more")
        remedy = "Fix them, or set such records aside with data.on_bad_record=quarantine."
        table, counts = self.table(), self.counts()
        per_source = "; ".join(f"{counts[source]:,} of {source}: {_listed(table[source])}" for source in table)
        head = f"Records that cannot be used ({per_source}):"
        return "\n".join([head, *lines, f"All are listed in {path}. {remedy}"])

    def _exceeded(self, sources: list[str], max_share: float, totals: Mapping[str, int], path: Path) -> str:
        lines = [f"More records are bad than data.max_quarantined={max_share:g} allows:"]
        table = self.table()
        for source in sources:
            count, total = sum(table[source].values()), totals[source]
            first = next(iter(self._errors[source].values()))
            share = f"{count:,} of {total:,} ({count / max(total, 1):.2%})"
            lines.append(f"  {source}: {share}: {_listed(table[source])}; the first {first.origin}: {first.reason}")
        lines.append(f"All are listed in {path}. Fix them, or allow more with data.max_quarantined=<share>.")
        return "\n".join(lines)


def list_unread(name: str, unread: Mapping[str, int]) -> str:
    """Say which keys of a source's records nothing is read from, the most frequent first."""
    keys = ", ".join(f"{key} ({count:,})" for key, count in unread.items())
    return f"{name}: nothing is read from {keys}"


def _by_fault(errors: Mapping[tuple[str, str], RecordError]) -> Counter[Fault]:
    first: dict[str, Fault] = {}
    for (origin, _), error in errors.items():
        first.setdefault(origin, error.fault)
    return Counter(first.values())


def _listed(faults: Mapping[Fault, int]) -> str:
    return ", ".join(f"{count:,} {fault}" for fault, count in faults.items())


def _lines(source: str, faults: Mapping[tuple[str, str], RecordError]) -> list[str]:
    rows = [
        {"source": source, "origin": origin, "fault": error.fault, "reason": reason, "digest": _digest(origin, reason)}
        for (origin, reason), error in faults.items()
    ]
    return [json.dumps(row, ensure_ascii=False) for row in rows]


def _digest(origin: str, reason: str) -> str:
    return hashlib.sha256((reason + origin).encode("utf-8", "backslashreplace")).hexdigest()


def _write(path: Path, lines: list[str]) -> None:
    with (
        written(path, path.name, "run_dir") as draft,
        open(draft, "w", encoding="utf-8", errors="backslashreplace") as stream,
    ):
        stream.writelines(line + "\n" for line in lines)
