"""task=runs: list the runs below run_dir, with the settings in which they differ. It reads files and imports no torch."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from lit_vlm.config import Run
from lit_vlm.config.choices import StageName
from lit_vlm.config.run_name import is_non_identity_key
from lit_vlm.config.validation import RUN_SUBFOLDERS
from lit_vlm.evaluation.metrics import METRICS
from lit_vlm.fault_tolerance.run_lock import is_holder_alive, read_holder
from lit_vlm.files import read_csv_rows
from lit_vlm.formatting import format_bytes, format_count, format_duration
from lit_vlm.reports.run_record import RunRecord
from lit_vlm.runs.run_folder import MANIFEST, read_manifest
from lit_vlm.tasks.terminal import console, say
from lit_vlm.types import UserError, escape_control_characters

RUN_FILES = (MANIFEST, "metrics.csv", "checkpoints")  # a folder with one of them is a run
SOURCE_TABLES = ("data.sources", "data.validation.sources")
MAX_SETTING_COLUMNS = 6  # of the table; further settings are named below it
MAX_VALUE_CHARS = 32  # of a setting in the table; a longer one loses its beginning


@dataclass(slots=True)
class RunSummary:
    """State and figures of one run. None: unknown."""

    name: str  # relative to run_dir
    path: str
    stage: str  # "" if unknown
    status: str  # finished, stopped, running, interrupted, damaged
    step: int | None = None  # optimizer steps that metrics.csv has
    steps: int | None = None  # of the plan
    train_loss: float | None = None  # last value
    val_loss: float | None = None  # last value
    best_val_loss: float | None = None
    score: float | None = None  # mean over kinds and languages after the stage
    text_scores: dict[str, float] = field(
        default_factory=dict
    )  # metric -> mean over kinds and languages after the stage
    started: str = ""  # ISO 8601, UTC
    finished: str = ""
    seconds: float | None = None  # of training
    num_bytes: int = 0  # of the folder
    settings: dict[str, Any] = field(default_factory=dict)  # those that define the run: dotted key -> value
    note: str = ""


def list_runs(run: Run) -> None:
    """Print the runs below run_dir: one table for each stage, or with `runs.json` one JSON object in each line.

    Raises:
        UserError: run_dir does not exist.
    """
    root = Path(run.config.run_dir)
    if not root.is_dir():
        raise UserError(f"run_dir={root}: there is no such folder. Name the folder of your runs with run_dir=...")
    summaries = [summarize_run(path, root) for path in find_run_folders(root)]
    groups = group_by_stage(summaries)
    if run.config.runs.json:
        for group in groups.values():
            differing = set(find_differing_settings(group))
            for summary in group:
                row = asdict(summary) | {"settings": {k: v for k, v in summary.settings.items() if k in differing}}
                print(json.dumps(row, ensure_ascii=False))
        return
    if not summaries:
        say(f"{root}: holds no run. Name another folder with run_dir=...")
    for stage, group in groups.items():
        keys = sorted(find_differing_settings(group), key=lambda key: -_count_values(group, key))
        console.print(make_table(stage, group, keys[:MAX_SETTING_COLUMNS]))
        if len(keys) > MAX_SETTING_COLUMNS:
            say(f"They also differ in {', '.join(keys[MAX_SETTING_COLUMNS:])} (runs.json=true prints all values).")
        for summary in group:
            if summary.note:
                say(f"{summary.name}: {summary.note}")


def find_run_folders(root: Path) -> Iterator[Path]:
    """Find the run folders at and below a folder, by name. Links are not followed."""
    for folder, names, files in os.walk(root):
        names.sort()
        if any(name in RUN_FILES for name in (*names, *files)):
            yield Path(folder)
            names[:] = [name for name in names if name not in RUN_SUBFOLDERS]


def summarize_run(path: Path, root: Path) -> RunSummary:
    """Summarise a run folder. A file that is missing or damaged is noted, and the rest is shown."""
    name = escape_control_characters(str(path.relative_to(root)))
    summary = RunSummary(name=name if name != "." else path.name, path=str(path), stage="", status="damaged")
    _add_metrics(summary, path / "metrics.csv")
    summary.num_bytes = compute_folder_size(path)
    try:
        manifest = read_manifest(path)
    except (UserError, OSError) as error:
        summary.note = str(error)
        return summary
    if manifest is None:
        summary.note = f"it has no {MANIFEST}; its own command makes it again from what lies beside it."
        return summary
    _add_manifest(summary, manifest, path)
    return summary


def _add_manifest(summary: RunSummary, manifest: dict[str, Any], path: Path) -> None:
    """Add the entries of a manifest. An entry of a wrong type is left out."""
    record = RunRecord(path, manifest, {}, [], [], "")
    figures, plan = record.figures, manifest.get("plan") or {}
    summary.stage = str(manifest.get("stage") or "")
    summary.status = _get_status(str(manifest.get("status") or ""), path)
    summary.steps = _to_int(plan.get("steps"))
    summary.started, summary.finished = str(manifest.get("started") or ""), str(manifest.get("finished") or "")
    summary.seconds = _to_number(figures.get("seconds"))
    summary.train_loss = _first_known(_to_number(figures.get("loss_last")), summary.train_loss)
    summary.val_loss = _first_known(_to_number(figures.get("val/loss")), summary.val_loss)
    summary.best_val_loss = _first_known(summary.best_val_loss, summary.val_loss)
    with suppress(AttributeError, TypeError):  # scores of a wrong type
        summary.score = _compute_mean(record.get_scores("after"))
        scores = {name: _compute_mean(groups) for name, groups in record.get_text_scores("after").items()}
        summary.text_scores = {name: mean for name, mean in scores.items() if mean is not None}
    if summary.status == "finished":
        summary.step = _first_known(_to_int(figures.get("steps")), summary.step)
    elif summary.step is not None and summary.steps is not None:
        summary.step = min(summary.step, summary.steps)  # the last row of a run has the number of its steps
    summary.settings = flatten_settings(manifest.get("config") or {})
    if parent := (manifest.get("parent") or {}).get("path"):
        summary.settings["init_from"] = parent


def _get_status(status: str, path: Path) -> str:
    """Return the state of a run. The manifest of a killed run says "running": the holder of its lock tells the truth."""
    if status != "running":
        return status or "unknown"
    holder = read_holder(path)
    return "running" if holder and is_holder_alive(holder) else "interrupted"


def _add_metrics(summary: RunSummary, path: Path) -> None:
    """Add steps and losses of metrics.csv: the last values, and the lowest held-out loss. An incomplete row is skipped."""
    try:
        rows = read_csv_rows(path)
    except (OSError, csv.Error):
        return
    for row in rows:
        step, train_loss, val_loss = (_parse_cell(row.get(name)) for name in ("step", "train/loss", "val/loss"))
        summary.step = summary.step if step is None else int(step) + 1
        summary.train_loss = _first_known(train_loss, summary.train_loss)
        if val_loss is not None:
            summary.val_loss = val_loss
            summary.best_val_loss = min(val_loss, _first_known(summary.best_val_loss, val_loss))


def compute_folder_size(path: Path) -> int:
    """Compute the bytes of all files of a folder; a file with several names counts once."""
    sizes: dict[tuple[int, int], int] = {}
    for folder, _, files in os.walk(path):
        for name in files:
            with suppress(OSError):  # it was removed meanwhile
                found = os.lstat(os.path.join(folder, name))
                sizes[found.st_dev, found.st_ino] = found.st_size
    return sum(sizes.values())


# ---- settings


def flatten_settings(config: dict[str, Any]) -> dict[str, Any]:
    """Flatten the settings that define what a run computes: dotted key -> value. Source tables also give their names."""
    flat = {key: value for key, value in _iter_settings(config, "") if not is_non_identity_key(key)}
    flat.pop("init_from", None)  # the manifest's parent is the folder that was used
    for table in SOURCE_TABLES:
        if names := dict.fromkeys(
            key[len(table) + 1 :].partition(".")[0] for key in flat if key.startswith(f"{table}.")
        ):
            flat[table] = ", ".join(sorted(names))
    return flat


def _iter_settings(value: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _iter_settings(item, f"{prefix}.{name}" if prefix else str(name))
    else:
        yield prefix, value


def find_differing_settings(summaries: Sequence[RunSummary]) -> list[str]:
    """Find the settings that have more than one value among the runs.

    A setting that a run does not have is not compared: older manifests lack newer settings.
    """
    keys = dict.fromkeys(key for summary in summaries for key in summary.settings)
    return [key for key in keys if _count_values(summaries, key) > 1]


def _count_values(summaries: Sequence[RunSummary], key: str) -> int:
    return len({json.dumps(one.settings[key], sort_keys=True) for one in summaries if key in one.settings})


# ---- the table


def group_by_stage(summaries: Sequence[RunSummary]) -> dict[str, list[RunSummary]]:
    """Group the runs by stage, in the order of the recipe, and by their start: settings of different stages always differ."""
    order = [stage.value for stage in StageName]
    stages = sorted(
        {summary.stage for summary in summaries}, key=lambda s: (order.index(s) if s in order else len(order), s)
    )
    return {
        stage: sorted((one for one in summaries if one.stage == stage), key=lambda one: (one.started, one.name))
        for stage in stages
    }


def make_table(stage: str, summaries: Sequence[RunSummary], keys: Sequence[str]) -> Table:
    """Make the table of one stage. Columns without any value are left out."""
    means = dict.fromkeys(name for summary in summaries for name in summary.text_scores)
    columns = {
        "run": [summary.name for summary in summaries],
        "status": [summary.status for summary in summaries],
        "step": [_format_steps(summary) for summary in summaries],
        "train loss": [_format_number(summary.train_loss) for summary in summaries],
        "val loss": [_format_number(summary.val_loss) for summary in summaries],
        "best": [_format_number(summary.best_val_loss) for summary in summaries],
        "score": [_format_number(summary.score) for summary in summaries],
        **{_get_title(name): [_format_number(one.text_scores.get(name)) for one in summaries] for name in means},
        "started": [summary.started[:16].replace("T", " ") for summary in summaries],
        "time": [format_duration(summary.seconds) for summary in summaries],
        "size": [format_bytes(summary.num_bytes) for summary in summaries],
    }
    headings = shorten_keys(keys)
    columns |= {
        headings[key]: [_format_value(one.settings[key]) if key in one.settings else "" for one in summaries]
        for key in keys
    }
    title = f"{stage or 'unknown stage'}: {format_count(len(summaries), 'run')}"
    table = Table(title=escape_control_characters(title), title_justify="left")
    shown = {heading: cells for heading, cells in columns.items() if any(cells)}
    for heading in shown:
        is_text = heading in ("run", "status", "started") or heading in headings.values()
        table.add_column(Text(heading), justify="left" if is_text else "right", overflow="fold")
    for row in zip(*shown.values(), strict=True):
        table.add_row(*(Text(escape_control_characters(cell)) for cell in row))
    return table


def shorten_keys(keys: Sequence[str]) -> dict[str, str]:
    """Shorten dotted keys to their last names, at least two of them and as many as tell them apart: key -> heading."""

    def get_ends(key: str, num_names: int) -> str:
        return ".".join(key.split(".")[-num_names:])

    headings = {}
    for key in keys:
        counts = range(2, key.count(".") + 2)
        unique = (n for n in counts if sum(get_ends(other, n) == get_ends(key, n) for other in keys) == 1)
        headings[key] = get_ends(key, next(unique, key.count(".") + 1))
    return headings


def _get_title(name: str) -> str:
    return METRICS[name].title if name in METRICS else name


def _format_steps(summary: RunSummary) -> str:
    if summary.step is None:
        return ""
    return f"{summary.step:,}" if summary.steps in (None, summary.step) else f"{summary.step:,} / {summary.steps:,}"


def _format_number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _format_value(value: Any) -> str:
    """Format the value of a setting as it is typed; of a long one, such as a path, the end."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= MAX_VALUE_CHARS else f"…{text[-MAX_VALUE_CHARS + 1 :]}"


# ---- numbers of files that may be damaged


def _to_number(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    with suppress(OverflowError):  # an integer beyond the range of a float
        return float(value) if is_number and math.isfinite(value) else None
    return None


def _to_int(value: Any) -> int | None:
    number = _to_number(value)
    return None if number is None else int(number)


def _parse_cell(cell: str | None) -> float | None:
    with suppress(ValueError):
        return _to_number(float(cell)) if cell else None
    return None


def _first_known(first: Any, second: Any) -> Any:
    return second if first is None else first


def _compute_mean(values: dict[str, Any]) -> float | None:
    known = [number for number in map(_to_number, values.values()) if number is not None]
    return sum(known) / len(known) if known else None
