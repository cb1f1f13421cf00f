"""task=curate: find duplicates, rows of benchmarks or personal data in a mixture, and select the other records. Read top to bottom."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from lit_vlm.config import Run
from lit_vlm.config.choices import Certainty, CurationMethod, DuplicateKind, Format
from lit_vlm.config.schema import CurateConfig, DataConfig, EvaluateConfig
from lit_vlm.curation.contamination import BenchmarkFeatures, Leak, find_leaks, list_row_images, read_benchmarks
from lit_vlm.curation.duplicates import find_duplicates, group_pictures, list_shared_pictures
from lit_vlm.curation.features import IMAGE, IMAGE_FIELDS, ROW, Features, compute_features
from lit_vlm.curation.personal_data import (
    PersonalKind,
    PersonalSearch,
    mask_personal_data,
    require_packages,
    search_sources,
)
from lit_vlm.curation.text_hashes import list_messages
from lit_vlm.data.index.shard_cache import get_origin
from lit_vlm.data.selection import (
    SELECTION_SUFFIX,
    RowsIdentity,
    Selection,
    check_selection,
    identify_rows,
    read_selection,
    write_selection,
)
from lit_vlm.data.sources import choose_all_records, open_source
from lit_vlm.evaluation.benchmarks import BENCHMARKS
from lit_vlm.fault_tolerance.run_lock import RunLock
from lit_vlm.files import atomic_write, read_json, write_json
from lit_vlm.formatting import format_count
from lit_vlm.reports.curation import (
    CurationExample,
    CurationPage,
    ShownRecord,
    SourceCounts,
    show_record,
    write_curation_page,
)
from lit_vlm.runs.run_folder import get_command_line, to_plain
from lit_vlm.tasks.terminal import console, say, show_progress
from lit_vlm.types import Source, UserError

SUMMARY_FILE, LEFT_OUT_FILE, PAGE_FILE, GROUPS_FILE = (
    "summary.json",
    "left_out.jsonl",
    "page.html",
    "same_pictures.jsonl",
)
OUTPUT_KEY = "curate.output"


@dataclass(slots=True)
class CuratedMixture:
    """Sources of a mixture with all of their records.

    Attributes:
        identities: of the records of each source.
        selections: that the sources had already.
        features: of all records.
        is_out: records that these selections leave out, [R] bool.
    """

    sources: list[Source]
    identities: list[RowsIdentity]
    selections: list[Selection | None]
    features: Features
    is_out: np.ndarray

    def show(self, title: str, record: int, mask: Callable[[str], str] = str) -> ShownRecord:
        """Prepare a record for the page.

        Args:
            mask: changes each text that is shown.
        """
        source = self.sources[self.features.source_ids[record]]
        position = int(self.features.positions[record])
        found = source[position]
        text = "\n".join(f"{message.role}: {mask(message.text)}" for message in list_messages(found))
        return show_record(title, found.origin, text, found.images)

    def describe(self, record: int) -> dict[str, Any]:
        """Describe a record in a list: its source, position and origin."""
        source = self.sources[self.features.source_ids[record]]
        position = int(self.features.positions[record])
        return {"source": source.name, "position": position, "origin": get_origin(source, position)}


@dataclass(slots=True)
class CurationResult:
    """Result of a search.

    Attributes:
        left_out: numbers of the records to leave out, ascending.
        lines: one JSON object for each record that was found.
        counts: (what, number).
        examples_out, examples_kept: for the page.
        groups: records that share a picture.
        notes: sentences about what was not done.
    """

    left_out: list[int]
    lines: list[dict[str, Any]]
    counts: list[tuple[str, int]]
    examples_out: list[CurationExample]
    examples_kept: list[CurationExample]
    groups: list[list[int]]
    notes: list[str]


def curate(run: Run) -> None:
    """Curate the sources of a mixture; write a selection for each source, lists, a summary and a page.

    Raises:
        UserError: a source cannot be read, nothing could be compared, or the output belongs to another search.
    """
    config, settings, data = run.config, run.config.curate, run.config.data
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "task=curate is one process, which starts workers. Start it with python run.py, not with torchrun."
        )
    output = Path(settings.output) if settings.output else run.dir / settings.method.value
    index_dir = Path(data.index_dir or Path(config.run_dir) / "index")
    workers = data.index_workers or os.cpu_count() or 1
    sources = open_whole_sources(data, index_dir, config.seed)
    selections = read_selections(data, sources)
    identities = [identify_rows(source) for source in sources]
    request = make_request(settings, config.evaluate, config.benchmarks, sources, identities, selections)
    with RunLock(output, f"Wait for it, or write elsewhere with {OUTPUT_KEY}=...") as run_lock:
        run_lock.acquire()
        require_same_request(output, request, overwrite=config.overwrite)
        personal = PersonalSearch([], {})
        if settings.method is CurationMethod.personal:
            require_packages()
            with show_progress("read") as on_progress:
                personal = search_sources(sources, workers=workers, on_progress=on_progress)
            features = make_text_features(sources, personal.errors)
        else:
            with show_progress("hash") as on_progress:
                features = compute_features(sources, index_dir, workers=workers, on_progress=on_progress)
        mixture = CuratedMixture(sources, identities, selections, features, mark_left_out(features, selections))
        require_readable(mixture)
        if settings.method is CurationMethod.personal:
            result = collect_personal_data(mixture, personal, settings)
        elif settings.method is CurationMethod.duplicates:
            result = search_duplicates(mixture, settings)
        else:
            names = config.benchmarks or list(BENCHMARKS)
            result = search_leaks(mixture, settings, names, Path(config.evaluate.files or ""), index_dir, data, workers)
        write_results(output, mixture, result, settings, request)
    show_results(output, mixture, result, settings, data)


def open_whole_sources(data: DataConfig, index_dir: Path, seed: int) -> list[Source]:
    """Open all records of each source: selections, fractions and numbers of samples apply to training only."""
    for name, source in data.sources.items():
        limit = None if source.format == Format.builtin else source.num_samples
        if source.fraction is not None or limit is not None:
            say(
                f"data.sources.{name}: all of its records are looked at, so that the selection holds for any share of them"
            )
    return [
        open_source(
            name, choose_all_records(source), max_image_pixels=data.max_image_pixels, seed=seed, cache=index_dir
        )
        for name, source in data.sources.items()
    ]


def read_selections(data: DataConfig, sources: Sequence[Source]) -> list[Selection | None]:
    """Read the selections that the sources have already, and check that they belong to these records."""
    selections: list[Selection | None] = []
    for (name, config), source in zip(data.sources.items(), sources, strict=True):
        if config.selection is None:
            selections.append(None)
            continue
        setting = f"data.sources.{name}.selection"
        selection = read_selection(Path(config.selection), setting)
        check_selection(selection, source, setting)
        selections.append(selection)
    return selections


def make_request(
    settings: CurateConfig,
    evaluate: EvaluateConfig,
    benchmarks: Sequence[str],
    sources: Sequence[Source],
    identities: Sequence[RowsIdentity],
    selections: Sequence[Selection | None],
) -> dict[str, Any]:
    """Make the description of a search: its settings, and the digests of all that it reads, as JSON values."""
    used = to_plain(asdict(settings))
    del used["output"], used["num_shown"]
    names = {"evaluate.files": evaluate.files, "benchmarks": list(benchmarks)}
    inputs = [
        {"name": source.name, **asdict(identity), "left_out": selection.left_out if selection else []}
        for source, identity, selection in zip(sources, identities, selections, strict=True)
    ]
    is_search = settings.method is CurationMethod.contamination
    request = {"curate": used, **(names if is_search else {}), "sources": inputs}
    return json.loads(json.dumps(request))


def require_same_request(
    output: Path,
    request: dict[str, Any],
    *,
    overwrite: bool,
    what: str = "search",
    setting: str = OUTPUT_KEY,
    kept: str = "",
) -> None:
    """Raise UserError if the folder has results of another request and they are not to be replaced.

    Args:
        what: name of the request, for the message.
        setting: setting that names the folder.
        kept: what stays when the results are replaced.
    """
    path = output / SUMMARY_FILE
    known = (read_json(path, f"Remove it, or write elsewhere with {setting}=...") or {}).get("request")
    if known is None or overwrite or known == request:
        return
    different = [name for name in sorted({*known, *request}) if known.get(name) != request.get(name)]
    raise UserError(
        f"{path} is of another {what}: it differs in {', '.join(different)}. Write elsewhere with {setting}=..., or replace the "
        f"results with overwrite=true{kept}."
    )


def make_text_features(sources: Sequence[Source], errors: dict[int, str]) -> Features:
    """Make the features of records whose pictures were not read.

    Args:
        errors: messages of the records that cannot be read, by their number.
    """
    lengths = [len(source) for source in sources]
    source_ids = np.repeat(np.arange(len(sources), dtype=np.int32), lengths)
    positions = np.concatenate([np.zeros(0, np.int64), *(np.arange(length) for length in lengths)])
    rows = np.zeros(len(positions), ROW)
    rows["is_bad"][list(errors)] = 1
    images = {name: np.zeros(0, IMAGE[name]) for name in IMAGE_FIELDS}
    named = [(sources[source_ids[record]].name, message) for record, message in sorted(errors.items())]
    return Features(source_ids, positions, rows, np.zeros(len(positions), np.int64), images, [], named)


def mark_left_out(features: Features, selections: Sequence[Selection | None]) -> np.ndarray:
    """Mark the records that selections leave out: [R] bool."""
    is_out = np.zeros(len(features.rows), bool)
    for source_id, selection in enumerate(selections):
        if selection is not None:
            start = int(np.searchsorted(features.source_ids, source_id))
            is_out[start + selection.list_left_out()] = True
    return is_out


def require_readable(mixture: CuratedMixture) -> None:
    """Raise UserError if no record can be read."""
    errors = mixture.features.errors
    if len(errors) == len(mixture.features.rows):
        name, message = errors[0] if errors else ("", "the sources have no records")
        raise UserError(f"data.sources: no record can be read, so nothing was compared. {name}: {message}")


def search_duplicates(mixture: CuratedMixture, settings: CurateConfig) -> CurationResult:
    """Search for duplicates within and across the sources."""
    features = mixture.features
    groups = group_pictures(features, settings.pictures)
    found = find_duplicates(features, groups, settings.duplicates, settings.min_similarity, mixture.is_out)
    left_out = [one.record for one in found]
    shared: list[list[int]] = []
    if settings.duplicates is DuplicateKind.rows:
        shared = list_shared_pictures(features, groups, [*left_out, *np.flatnonzero(mixture.is_out).tolist()])
    by_evidence = Counter(one.evidence for one in found)
    counts = [(f"duplicates by {evidence.replace('_', ' ')}", count) for evidence, count in by_evidence.most_common()]
    counts.append(("records that share a picture and stay", sum(map(len, shared))))
    lines = [
        {**mixture.describe(one.record), "evidence": one.evidence.value, "similarity": one.similarity}
        | {"same_as": mixture.describe(one.kept)}
        for one in found
    ]
    examples = [
        CurationExample(
            f"{one.evidence.replace('_', ' ')}, similarity of the turns {one.similarity:.2f}",
            (mixture.show("left out", one.record), mixture.show("stays", one.kept)),
        )
        for one in choose_examples(found, [one.evidence for one in found], settings.num_shown)
    ]
    kept = [
        CurationExample("the same picture, other turns", tuple(mixture.show("stays", record) for record in group[:2]))
        for group in choose_examples(shared, [""] * len(shared), settings.num_shown)
    ]
    notes = []
    if groups.num_full_buckets:
        notes.append(
            f"{format_count(groups.num_full_buckets, 'bucket')} of similar hashes held more than 64 pictures, such as blank pages; "
            "in these each picture was compared with the 64 of the nearest brightness."
        )
    return CurationResult(left_out, lines, counts, examples, kept, shared, notes)


def collect_personal_data(mixture: CuratedMixture, personal: PersonalSearch, settings: CurateConfig) -> CurationResult:
    """Collect the records with personal data. Lists and page have none of it: its digits are masked."""
    found = [one for one in personal.found if not mixture.is_out[one.record]]
    counts = [
        (f"records with a {kind.value.replace('_', ' ')}", sum(kind in one.counts for one in found))
        for kind in PersonalKind
    ]
    lines = [mixture.describe(one.record) | {kind.value: count for kind, count in one.counts.items()} for one in found]
    examples = []
    for one in choose_examples(found, [min(one.counts) for one in found], settings.num_shown):
        shown = mixture.show("left out", one.record, mask=mask_personal_data)
        reason = ", ".join(format_count(count, kind.value.replace("_", " ")) for kind, count in one.counts.items())
        examples.append(CurationExample(reason, (shown,)))
    notes = ["Only texts were looked at. Names, addresses, faces and text in pictures are not found."]
    return CurationResult([one.record for one in found], lines, counts, examples, [], [], notes)


def search_leaks(
    mixture: CuratedMixture,
    settings: CurateConfig,
    names: Sequence[str],
    files: Path,
    index_dir: Path,
    data: DataConfig,
    workers: int,
) -> CurationResult:
    """Search for the pictures and questions of benchmarks.

    Raises:
        UserError: no benchmark could be read.
    """
    options: dict[str, Any] = {"workers": workers}
    benchmarks = read_benchmarks(names, files, index_dir, max_pixels=data.max_image_pixels, **options)
    for name, reason in benchmarks.unchecked.items():
        say(f"{name}: not checked: {reason}")
    if not benchmarks.rows:
        raise UserError(
            f"evaluate.files={files}: no benchmark could be read, so nothing was checked; see the reasons above."
        )
    with show_progress("search") as on_progress:
        leaks = find_leaks(
            mixture.sources,
            mixture.features,
            benchmarks,
            index_dir,
            min_overlap=settings.min_overlap,
            on_progress=on_progress,
            **options,
        )
    leaks = [leak for leak in leaks if not mixture.is_out[leak.record]]
    limit = tuple(Certainty).index(settings.min_certainty)
    is_sure = [tuple(Certainty).index(leak.certainty) <= limit for leak in leaks]
    sure = [leak for leak, sure in zip(leaks, is_sure, strict=True) if sure]
    unsure = [leak for leak, sure in zip(leaks, is_sure, strict=True) if not sure]
    counts = [(f"{certainty.value}", sum(leak.certainty is certainty for leak in leaks)) for certainty in Certainty]
    by_benchmark = Counter(leak.place.benchmark for leak in leaks)
    counts += [
        (f"{name}: {format_count(len(benchmarks.rows[name]), 'row')}", by_benchmark[name]) for name in benchmarks.rows
    ]
    lines = [describe_leak(mixture, leak) | {"left_out": sure} for leak, sure in zip(leaks, is_sure, strict=True)]
    shown = [
        [
            CurationExample(format_leak(leak), (mixture.show("record", leak.record), show_row(benchmarks, leak, data)))
            for leak in choose_examples(some, [leak.place.benchmark for leak in some], settings.num_shown)
        ]
        for some in (sure, unsure)
    ]
    notes = [f"{name} was not checked: {reason}" for name, reason in benchmarks.unchecked.items()]
    notes += [
        f"{name}: {format_count(count, 'row')} cannot be read and were not checked"
        for name, count in benchmarks.num_bad_rows.items()
    ]
    return CurationResult([leak.record for leak in sure], lines, counts, shown[0], shown[1], [], notes)


def describe_leak(mixture: CuratedMixture, leak: Leak) -> dict[str, Any]:
    """Describe a leak in the list."""
    return mixture.describe(leak.record) | {
        "certainty": leak.certainty.value,
        "picture": leak.picture.value if leak.picture else None,
        "overlap": round(leak.overlap, 4),
        **asdict(leak.place),
    }


def format_leak(leak: Leak) -> str:
    """Format a leak for the page."""
    picture = f"picture: same {leak.picture.value}" if leak.picture else "no picture"
    return f"{leak.certainty.value}; {picture}; {leak.overlap:.0%} of the question's n-grams; {leak.place.benchmark}"


def show_row(benchmarks: BenchmarkFeatures, leak: Leak, data: DataConfig) -> ShownRecord:
    """Prepare a benchmark's row for the page."""
    name = leak.place.benchmark
    row = benchmarks.rows[name].read(leak.place.row)
    text = str(row.get("question") or row.get("captions") or "")
    return show_record(name, leak.place.origin, text, list_row_images(row, name, data.max_image_pixels))


def choose_examples(items: Sequence[Any], groups: Sequence[str], count: int) -> list[Any]:
    """Choose examples spread over the groups, and over the order within each."""
    by_group: dict[str, list[Any]] = {}
    for item, group in zip(items, groups, strict=True):
        by_group.setdefault(group, []).append(item)
    share = -(-count // max(len(by_group), 1))
    spread = [
        [members[place] for place in np.unique(np.linspace(0, len(members) - 1, share).astype(int))]
        for members in by_group.values()
    ]
    return [item for members in spread for item in members][:count] if count else []


def write_results(
    output: Path, mixture: CuratedMixture, result: CurationResult, settings: CurateConfig, request: dict[str, Any]
) -> None:
    """Write selections, lists, page and, last, the summary."""
    features = mixture.features
    out = mixture.is_out.copy()
    out[result.left_out] = True
    for source_id, source in enumerate(mixture.sources):
        before = mixture.selections[source_id]
        passes = (*(before.passes if before else ()), settings.method.value)
        positions = features.positions[(features.source_ids == source_id) & out]
        write_selection(
            output / f"{source.name}{SELECTION_SUFFIX}", source, mixture.identities[source_id], positions, passes
        )
    write_lines(output / LEFT_OUT_FILE, result.lines)
    write_lines(
        output / GROUPS_FILE, [{"records": [mixture.describe(one) for one in group]} for group in result.groups]
    )
    page = CurationPage(
        f"Curation: {settings.method.value}",
        count_sources(mixture, result.left_out),
        result.counts,
        result.examples_out,
        result.examples_kept,
        [(name, str(value)) for name, value in request["curate"].items()],
        result.notes,
        get_command_line(),
    )
    write_curation_page(output / PAGE_FILE, page)
    write_json(
        output / SUMMARY_FILE,
        {
            "request": request,
            "counts": dict(result.counts),
            "sources": [asdict(counts) | {"kept": counts.num_kept} for counts in page.sources],
            "notes": result.notes,
            "cannot_be_read": [f"{name}: {message}" for name, message in features.errors],
        },
        indent=2,
    )


def write_lines(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Write JSON lines atomically."""
    with (
        atomic_write(path, "The lists", OUTPUT_KEY) as draft,
        draft.open("w", encoding="utf-8", errors="replace") as stream,
    ):
        stream.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def count_sources(mixture: CuratedMixture, left_out: Sequence[int]) -> list[SourceCounts]:
    """Count the records of each source."""
    features = mixture.features
    is_now = np.zeros(len(features.rows), bool)
    is_now[list(left_out)] = True
    counts = []
    for source_id, source in enumerate(mixture.sources):
        own = features.source_ids == source_id
        masks = (features.rows["is_bad"] > 0, mixture.is_out, is_now)
        counts.append(SourceCounts(source.name, len(source), *(int((own & mask).sum()) for mask in masks)))
    return counts


def show_results(
    output: Path, mixture: CuratedMixture, result: CurationResult, settings: CurateConfig, data: DataConfig
) -> None:
    """Show a table of the sources and of the results, and the settings that train on the selection."""
    table = Table(title=f"{settings.method.value}: sources", title_justify="left")
    for heading in ("source", "records", "cannot be read", "left out before", "left out now", "stay"):
        table.add_column(heading, justify="left" if heading == "source" else "right")
    sources = count_sources(mixture, result.left_out)
    for one in sources:
        numbers = (one.num_records, one.num_bad, one.num_out_before, one.num_left_out, one.num_kept)
        table.add_row(one.name, *(f"{number:,}" for number in numbers))
    console.print(table)
    for name, count in result.counts:
        say(f"{name}: {count:,}")
    for note in result.notes:
        say(note)
    if mixture.features.errors:
        name, message = mixture.features.errors[0]
        unread = format_count(len(mixture.features.errors), "record")
        say(f"{unread} cannot be read and stay as they are; the first, of {name}: {message}")
    say(f"{output / PAGE_FILE}   {output / LEFT_OUT_FILE}   {output / SUMMARY_FILE}")
    changed = [one.name for one in sources if one.num_left_out or one.num_out_before]
    if changed:
        overrides = (f"data.sources.{name}.selection={output / name}{SELECTION_SUFFIX}" for name in changed)
        say(f"Train without them with: {' '.join(overrides)}")
