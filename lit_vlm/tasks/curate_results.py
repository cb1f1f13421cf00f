"""Results of task=curate: selections, new sources, lists, the page and the summary, and what is printed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.markup import escape
from rich.table import Table

from lit_vlm.config.choices import CurationMethod
from lit_vlm.config.curation import CurateConfig
from lit_vlm.curation.mixture import CuratedMixture, CurationResult
from lit_vlm.data.generated import GENERATED_SUFFIX, write_generated
from lit_vlm.data.selection import SELECTION_SUFFIX, write_selection
from lit_vlm.files import atomic_write, read_json, write_json
from lit_vlm.formatting import format_count
from lit_vlm.reports.curation import CurationPage, SourceCounts, show_examples, write_curation_page
from lit_vlm.runs.run_folder import get_command_line
from lit_vlm.tasks.terminal import console, say
from lit_vlm.types import UserError

SUMMARY_FILE, LEFT_OUT_FILE, PAGE_FILE, GROUPS_FILE = (
    "summary.json",
    "left_out.jsonl",
    "page.html",
    "same_pictures.jsonl",
)
OUTPUT_KEY = "curate.output"
KEPT_TITLES = {
    CurationMethod.balance: "Stays",
    CurationMethod.prune: "Stays",
    CurationMethod.capfilt: "Stays",
    CurationMethod.labels: "Suspected, and stays",
}  # headings of the examples that stay


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
    for source, identity in zip(mixture.sources, mixture.identities, strict=True):
        path, rows = output / f"{source.name}{GENERATED_SUFFIX}", result.generated.get(source.name)
        if rows:
            write_generated(path, source, identity, request["curate"], rows, OUTPUT_KEY)
        else:
            path.unlink(missing_ok=True)
    write_lines(output / LEFT_OUT_FILE, result.lines)
    write_lines(
        output / GROUPS_FILE, [{"records": [mixture.describe(one) for one in group]} for group in result.groups]
    )
    page = CurationPage(
        f"Curation: {settings.method.value}",
        count_sources(mixture, result.left_out),
        result.counts,
        show_examples(result.examples_out),
        show_examples(result.examples_kept),
        format_settings(request["curate"]),
        result.notes,
        get_command_line(),
        result.tables,
        KEPT_TITLES.get(settings.method, "Similar, and stays"),
        result.scores,
    )
    write_curation_page(output / PAGE_FILE, page)
    write_json(
        output / SUMMARY_FILE,
        {
            "request": request,
            "counts": dict(result.counts),
            "tables": {
                table.title: [dict(zip(table.headings, row, strict=True)) for row in table.rows]
                for table in result.tables
            },
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


def format_settings(settings: dict[str, Any]) -> list[tuple[str, str]]:
    """Format the settings of a search for its page, without those that are off. The page's title names the method."""
    return [
        (name, ", ".join(map(str, value)) if isinstance(value, list) else str(value))
        for name, value in settings.items()
        if name != "method" and value not in (None, False, [])
    ]


def show_results(output: Path, mixture: CuratedMixture, result: CurationResult, settings: CurateConfig) -> None:
    """Show a table of the sources and of the results, and the settings that train on the selection."""
    table = Table(title=f"{settings.method.value}: sources", title_justify="left")
    for heading in ("source", "records", "cannot be read", "left out before", "left out now", "stay"):
        table.add_column(heading, justify="left" if heading == "source" else "right")
    sources = count_sources(mixture, result.left_out)
    for one in sources:
        numbers = (one.num_records, one.num_bad, one.num_out_before, one.num_left_out, one.num_kept)
        table.add_row(one.name, *(f"{number:,}" for number in numbers))
    console.print(table)
    for shown in result.tables:
        table = Table(title=shown.title, title_justify="left")
        for number, heading in enumerate(shown.headings):
            table.add_column(heading, justify="right" if number else "left")
        for row in shown.rows:
            table.add_row(*map(escape, row))
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
    if made := [name for name, rows in result.generated.items() if rows]:
        overrides = (f"data.sources.{name}.generated={output / name}{GENERATED_SUFFIX}" for name in made)
        say(f"Train on the new source with: {' '.join(overrides)}")
    changed = [one.name for one in sources if one.num_left_out or one.num_out_before]
    if changed:
        overrides = (f"data.sources.{name}.selection={output / name}{SELECTION_SUFFIX}" for name in changed)
        say(f"Train without them with: {' '.join(overrides)}")
