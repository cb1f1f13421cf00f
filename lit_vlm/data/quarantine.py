"""Quarantine ledger (`ledger.jsonl`): samples that were indexed as usable and became corrupt during training.

A run that finds such a sample adds it to the ledger and stops. The next start reads the ledger before training and
excludes its samples on all ranks, so that no sample is replaced or skipped without a record of it.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from lit_vlm.config.choices import OnBadRecord
from lit_vlm.config.schema import SourceConfig
from lit_vlm.data.index.sample_index import SampleIndex
from lit_vlm.data.lazy_images import FileImage
from lit_vlm.files import append_line, atomic_write, read_json_lines
from lit_vlm.types import Fault, RecordError, Source, UserError


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
            rows = read_json_lines(path)
        except OSError as error:
            raise UserError(
                f"{path} cannot be read: {error.strerror or error}. The samples that this run leaves out are listed there: "
                "mend it, or remove it, and a sample that is still bad is met and entered again."
            ) from error
        names = [item.name for item in fields(LedgerEntry)]
        return cls(path, [LedgerEntry(**{name: row[name] for name in names}) for row in rows if row.keys() >= {*names}])

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


NEARLY_ALL = 0.9  # share of a source's images above which their folder is wrong
MIN_MISSING = 3  # missing images of a source, unless it has fewer records
MAX_SEARCHED_RECORDS = 2000  # of a source that is searched for a first image before the index is built
MAX_MISSING_SHOWN = 3  # missing images that a message names
MAX_SEARCHED_FOLDERS = 200  # folders beside the searched one in which an image is looked for
_MISSING_IMAGE = re.compile(r"image (['\"])(.+)\1 (?:not found in|leads out of) (.+)\Z")
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


def find_missing_image_errors(
    indexes: Sequence[SampleIndex], configs: Mapping[str, SourceConfig], table: str = "data.sources"
) -> dict[str, str]:
    """Find the sources of which all or nearly all images are missing: their folder is wrong, not their records.

    Args:
        indexes: parts of one index with the same sources, such as training and held-out samples.
        configs: settings of the sources by name.
        table: key of the sources' settings.

    Returns:
        One error message by the name of the source.
    """
    messages = dict[str, str]()
    for number, source in enumerate(indexes[0].sources):
        errors = {
            error.origin: error
            for index in indexes
            for name, error in index.errors
            if name == source.name and error.fault in (Fault.missing, Fault.outside)
        }
        found = sum(int((index.images[index.find_source_samples(number)] > 0).sum()) for index in indexes)
        total = len(errors) + found
        if len(errors) >= min(MIN_MISSING, len(source)) and len(errors) >= NEARLY_ALL * total:
            key = f"{table}.{source.name}.image_root"
            messages[source.name] = _format_missing_images(key, list(errors.values()), total, configs.get(source.name))
    return messages


def find_wrong_image_roots(
    sources: Sequence[Source], configs: Mapping[str, SourceConfig], table: str = "data.sources"
) -> dict[str, tuple[str, int]]:
    """Find the sources of which every image is missing, before anything is indexed.

    A source is read up to its first image that is there, so this costs nothing where the folder is right. Larger sources
    than `MAX_SEARCHED_RECORDS` are left to `find_missing_image_errors`.

    Returns:
        Error message and number of missing records by the name of the source.
    """
    found = dict[str, tuple[str, int]]()
    for source in sources:
        errors = _collect_missing_images(source)
        if len(errors) >= min(MIN_MISSING, len(source)) and errors:
            key = f"{table}.{source.name}.image_root"
            message = _format_missing_images(key, errors, len(errors), configs.get(source.name))
            found[source.name] = message, len(errors)
    return found


def _collect_missing_images(source: Source) -> list[RecordError]:
    """Collect the errors of all records with images, if none of these images is there; else []."""
    errors = list[RecordError]()
    if len(source) > MAX_SEARCHED_RECORDS:
        return errors
    for position in range(len(source)):
        try:
            record = source[position]
            if not all(isinstance(image, FileImage) for image in record.images):
                return []
            if [image.size for image in record.images]:
                return []
        except RecordError as error:
            if error.fault in (Fault.missing, Fault.outside):
                errors.append(error)
    return errors


def _format_missing_images(key: str, errors: list[RecordError], total: int, config: SourceConfig | None) -> str:
    """Format the message for missing images: the first of them, the setting, and the folder where they are, if it is near."""
    first = "; ".join(f"{error.origin}: {error.reason}" for error in errors[:MAX_MISSING_SHOWN])
    many = f"; and {len(errors) - MAX_MISSING_SHOWN:,} more" if len(errors) > MAX_MISSING_SHOWN else ""
    match = _MISSING_IMAGE.search(errors[0].reason)
    folder = find_image_root(match[2], match[3], config.path if config else None) if match else None
    remedy = f"Set {key} to the folder that these paths start from"
    if folder is not None:
        remedy = f"They are below {folder}: set {key}={folder}"
    return f"{key}: {len(errors):,} of {total:,} records name images that are not there: {first}{many}. {remedy}."


def find_image_root(image: str, root: str, data_path: str | None) -> Path | None:
    """Find a folder from which the path of an image leads to a file: near the root that was searched, or near the data file."""
    bases = [Path(root), *([Path(data_path).parent] if data_path else [])]
    candidates = dict.fromkeys(
        folder
        for base in bases
        for near in (base, base.parent)
        if near.is_dir()
        for folder in (near, *_list_subfolders(near))
    )
    return next((folder for folder in candidates if folder != Path(root) and _is_file(folder / image)), None)


def _list_subfolders(folder: Path) -> list[Path]:
    try:
        return sorted(child for child in folder.iterdir() if child.is_dir())[:MAX_SEARCHED_FOLDERS]
    except OSError:
        return []


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


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
