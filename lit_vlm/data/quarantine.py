"""Quarantine of unusable records: list them in `quarantine.jsonl` and continue without them, or end the run."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from lit_vlm.config.schema import OnBadRecord
from lit_vlm.files import atomic_write
from lit_vlm.types import Fault, RecordError, UserError

MAX_SHOWN = 10  # errors that a message lists; the file lists all
BAD_RECORDS_FILE = "bad_records.jsonl"


class Quarantine:
    """Quarantine: collects the errors of a pass over the data, then handles all at once, so that the user sees all of them.

    Records that became corrupt during training are in the run's ledger instead.
    """

    def __init__(self) -> None:
        self._errors: dict[str, dict[tuple[str, str], RecordError]] = {}

    def add(self, source: str, error: RecordError) -> None:
        """Add an error; the same error of the same record counts once, however many passes find it."""
        self._errors.setdefault(source, {}).setdefault((error.origin, error.reason), error)

    def __len__(self) -> int:
        return sum(map(len, self._errors.values()))

    def count_by_source(self) -> dict[str, int]:
        """Count the quarantined records by source; a record with two faults is one record."""
        return {source: sum(faults.values()) for source, faults in self.count_by_fault().items()}

    def count_by_fault(self) -> dict[str, dict[Fault, int]]:
        """Count the quarantined records by source and first fault, the most frequent fault first."""
        return {source: dict(_count_faults(faults).most_common()) for source, faults in self._errors.items()}

    def apply_policy(self, policy: OnBadRecord, max_share: float, totals: Mapping[str, int], path: Path) -> None:
        """Apply the quarantine policy: write the errors to `path`, or end the run. Only for rank 0.

        Args:
            policy: `stop` ends the run at any error. All errors are then listed in BAD_RECORDS_FILE in the same folder;
                `path` is not changed, since it may belong to a finished run.
            max_share: maximum share of a source's records that may be quarantined, 0 to 1.
            totals: records of each source, including bad ones.
            path: quarantine.jsonl; replaced atomically. Without errors it is an empty file.

        Raises:
            UserError: an error under `stop`; or a share above `max_share`, after the file was written.
        """
        lines = [line for source, faults in self._errors.items() for line in _format_lines(source, faults)]
        stopped = path.with_name(BAD_RECORDS_FILE)
        if policy is OnBadRecord.stop and lines:
            _write_lines(stopped, lines)
            raise UserError(self._format_stop_message(stopped))
        stopped.unlink(missing_ok=True)  # of an earlier start, before the records were repaired
        if policy is OnBadRecord.stop:
            return
        _write_lines(path, lines)
        counts = self.count_by_source()
        exceeded = [source for source, count in counts.items() if count > max_share * totals[source]]
        if exceeded:
            raise UserError(self._format_share_message(exceeded, max_share, totals, path))

    def _format_stop_message(self, path: Path) -> str:
        found = [error for faults in self._errors.values() for error in faults.values()]
        lines = [f"  {error.origin}: {error.reason}" for error in found[:MAX_SHOWN]]
        if len(found) > MAX_SHOWN:
            lines.append(f"  ... and {len(found) - MAX_SHOWN:,} more")
        remedy = "Fix them, or set such records aside with data.on_bad_record=quarantine."
        table, counts = self.count_by_fault(), self.count_by_source()
        per_source = "; ".join(f"{counts[source]:,} of {source}: {_format_counts(table[source])}" for source in table)
        head = f"Records that cannot be used ({per_source}):"
        return "\n".join([head, *lines, f"All are listed in {path}. {remedy}"])

    def _format_share_message(self, sources: list[str], max_share: float, totals: Mapping[str, int], path: Path) -> str:
        lines = [f"More records are bad than data.max_quarantined={max_share:g} allows:"]
        table = self.count_by_fault()
        for source in sources:
            count, total = sum(table[source].values()), totals[source]
            first = next(iter(self._errors[source].values()))
            share = f"{count:,} of {total:,} ({count / max(total, 1):.2%})"
            lines.append(
                f"  {source}: {share}: {_format_counts(table[source])}; the first {first.origin}: {first.reason}"
            )
        lines.append(f"All are listed in {path}. Fix them, or allow more with data.max_quarantined=<share>.")
        return "\n".join(lines)


def format_unused_keys(name: str, unused_keys: Mapping[str, int]) -> str:
    """Format the keys of a source's records that are not read, the most frequent first."""
    keys = ", ".join(f"{key} ({count:,})" for key, count in unused_keys.items())
    return f"{name}: nothing is read from {keys}"


def _count_faults(errors: Mapping[tuple[str, str], RecordError]) -> Counter[Fault]:
    """Count records by their first fault."""
    first: dict[str, Fault] = {}
    for (origin, _), error in errors.items():
        first.setdefault(origin, error.fault)
    return Counter(first.values())


def _format_counts(faults: Mapping[Fault, int]) -> str:
    return ", ".join(f"{count:,} {fault}" for fault, count in faults.items())


def _format_lines(source: str, faults: Mapping[tuple[str, str], RecordError]) -> list[str]:
    rows = [
        {
            "source": source,
            "origin": origin,
            "fault": error.fault,
            "reason": reason,
            "digest": _compute_digest(origin, reason),
        }
        for (origin, reason), error in faults.items()
    ]
    return [json.dumps(row, ensure_ascii=False) for row in rows]


def _compute_digest(origin: str, reason: str) -> str:
    return hashlib.sha256((reason + origin).encode("utf-8", "backslashreplace")).hexdigest()


def _write_lines(path: Path, lines: list[str]) -> None:
    with (
        atomic_write(path, path.name, "run_dir") as draft,
        open(draft, "w", encoding="utf-8", errors="backslashreplace") as stream,
    ):
        stream.writelines(line + "\n" for line in lines)
