"""Report page of one run or of a pipeline of stages, readable on a phone and on paper."""

from __future__ import annotations

import base64
import io
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup
from PIL import Image
from rich.table import Table

from lit_vlm.evaluation.exam import ALL_CELL
from lit_vlm.evaluation.metrics import METRICS
from lit_vlm.formatting import format_change, format_duration, format_short
from lit_vlm.messages import tell, tell_count
from lit_vlm.reports.changed_answers import collect_changed_answers
from lit_vlm.reports.charts import ChartLine, draw_line_chart, smooth
from lit_vlm.reports.exam import collect_exam, list_exams
from lit_vlm.reports.retrieval import collect_retrieval, format_best_recalls, list_recall_curves
from lit_vlm.reports.run_record import RunRecord, read_run, split_group
from lit_vlm.reports.templates import PageTemplate, write_page
from lit_vlm.types import SPECIAL_TOKENS

HEADINGS = ("stage", "trained", "samples", "tokens", "tokens/s", "loss", "held-out score")
MAX_INLINE_BYTES = 60_000  # of a PNG; a larger one is embedded as JPEG
SAMPLES_SINGLE_RUN, SAMPLES_SEVERAL_RUNS = 4, 1  # samples for each kind and language
IMAGE_PLACEHOLDER = re.compile(r"<image>\s?")  # removed, since the images are shown above the prompt
MAX_TABLE_POINTS = 2  # of a curve; so few values are a table
MAX_DOTS = 60  # of a curve; with more points it has no dots
CONTROL_TOKEN = re.compile("(" + "|".join(map(re.escape, SPECIAL_TOKENS)) + ")")
_PAGE = PageTemplate("report_page.html", short=format_short, percent=lambda share: f"{100 * share:.1f} %")


def write_report(path: Path, runs: list[Path], title: str) -> None:
    """Write the report page. Run folders may lack any of their files; the page then shows the rest."""
    records = [read_run(run) for run in runs]
    exams = list_exams(runs)
    page = _PAGE.render(
        title=title,
        headings=HEADINGS,
        split=_split_control_tokens,
        rows=[list(zip(HEADINGS, make_summary_row(record), strict=True)) for record in records],
        stages=[
            _collect_stage(record, SAMPLES_SINGLE_RUN if len(records) == 1 else SAMPLES_SEVERAL_RUNS)
            for record in records
        ],
        ladder=_collect_stage_scores(records),
        exam=collect_exam(exams),
        changed=collect_changed_answers(exams),
        lead=_format_totals(records),
        origin=_collect_origin(records),
    )
    write_page(path, page)


def make_summary_table(runs: list[Path]) -> Table:
    """Make the first table of the page, for the terminal."""
    table = Table()
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading in HEADINGS[:2] else "right")
    for run in runs:
        table.add_row(*("\n".join(lines) for lines in make_summary_row(read_run(run))))
    return table


def make_summary_row(record: RunRecord) -> list[list[str]]:
    """Make the cells of a stage in the columns of `HEADINGS`; each cell is a list of lines."""
    figures = record.figures
    parts = [
        f"{part.get('part')} {format_short(part.get('trainable'))} ({part.get('how')})" for part in record.trained_parts
    ]
    return [
        [record.name, format_duration(figures.get("seconds"))],
        [part.replace(" (all)", "") for part in parts],
        [format_short(figures.get("samples"))],
        [format_short(figures.get("tokens"))],
        [format_short(figures.get("tokens_per_second"))],
        [format_change(figures.get("loss_first"), figures.get("loss_last"))],
        [
            format_change(record.compute_mean_score("before"), record.compute_mean_score("after")),
            *_format_preference_accuracies(record),
            *format_best_recalls(record),
        ],
    ]


def make_scores_table(runs: list[Path]) -> Table:
    """Make a table of held-out scores by kind and language after each stage, for the terminal."""
    records = [record for record in map(read_run, runs) if record.get_scores("after")]
    ladder = _collect_stage_scores(records)
    table = Table(title="Held-out score after each stage", title_justify="left")
    table.add_column("kind")
    for record in records:
        for language in ladder["languages"]:
            table.add_column(f"{record.stage} {language}", justify="right")
    for row in ladder["rows"]:
        cells = ["-" if score is None else f"{score:.2f}" for score in row["scores"]]
        table.add_row(row["kind"].replace("_", " "), *cells)
    return table


def _format_preference_accuracies(record: RunRecord) -> list[str]:
    """Format two shares of a preference stage's held-out pairs: with the higher reward for the chosen answer, and with the likelier chosen answer."""
    names = ("val/rewards/accuracies", "val/reference_ranking_accuracy", "val/ranking_accuracy")
    reward, before, after = (record.figures.get(name) for name in names)
    lines = [] if reward is None else [tell("reward accuracy {value}", value=f"{reward:.2f}")]
    ranking = tell("ranking accuracy {change}", change=format_change(before, after))
    return lines if after is None else [*lines, ranking]


def _format_totals(records: list[RunRecord]) -> str:
    """Format the totals in one line: stages, samples, tokens and time."""

    def sum_figure(name: str) -> float:
        return sum(record.figures.get(name) or 0 for record in records)

    if not sum_figure("tokens"):
        return ""
    amounts = {name: format_short(sum_figure(name)) for name in ("samples", "tokens")}
    amounts["time"] = format_duration(sum_figure("seconds"))
    if len(records) == 1:
        return tell("{samples} samples, {tokens} tokens, {time} of training", **amounts)
    return tell(
        "{stages} stages, {samples} samples, {tokens} tokens, {time} of training", stages=len(records), **amounts
    )


def _collect_origin(records: list[RunRecord]) -> dict[str, Any]:
    """Collect commit, times, versions and commands of the page, from the last run with a manifest."""
    manifest = next((record.manifest for record in reversed(records) if record.manifest), {})
    git = manifest.get("git") or {}
    starts = [record.manifest["started"] for record in records if record.manifest.get("started")]
    return {
        "commit": (git.get("commit") or "")[:12] + (tell(", with local changes") if git.get("dirty") else ""),
        "started": _format_time(min(starts)) if starts else "",
        "finished": _format_time(manifest.get("finished") or ""),
        "versions": manifest.get("versions") or {},
        "commands": [record.manifest["command"] for record in records if record.manifest.get("command")],
    }


def _format_time(iso: str) -> str:
    return iso[:16].replace("T", " ") + (" UTC" if iso.endswith(("+00:00", "Z")) else "")


def _collect_stage(record: RunRecord, num_samples: int) -> dict[str, Any]:
    mixture = record.data.get("mixture") or []
    return {
        "name": record.name,
        "stage": record.stage,
        "command": record.manifest.get("command") or "",
        "unfinished": bool(record.manifest)
        and record.manifest.get("status") != "finished"
        and not record.manifest.get("finished"),
        "facts": _collect_facts(record),
        "charts": _draw_charts(record),
        "scores": _collect_scores(record),
        "text_scores": _collect_text_scores(record),
        "retrieval": collect_retrieval(record),
        "mixture": _prepare_mixture(mixture),
        "languages": _format_languages(mixture),
        "groups": _group_samples(record, num_samples),
        "nothing_held_out": record.data.get("num_held_out") == 0,
        "quarantined": _summarize_quarantine(record),
        "unread": record.data.get("unread") or {},
        "settings": record.settings,
    }


def _collect_facts(record: RunRecord) -> list[tuple[str, str]]:
    plan, figures, parent = (record.manifest.get("plan") or {}), record.figures, record.manifest.get("parent") or {}
    waited, memory = figures.get("data_wait"), figures.get("peak_memory_bytes")
    facts = [
        ("steps", format_short(figures.get("steps", plan.get("steps")))),
        ("batch", _format_batch_size(plan)),
        ("micro-batches per step", f"{plan['k']}" if "k" in plan else ""),
        ("ranks", str(plan.get("world_size", ""))),
        ("time", format_duration(figures.get("seconds"))),
        ("waited for data", f"{waited:.1%}" if waited is not None else ""),
        ("peak memory", f"{memory / 2**30:.2f} GiB" if memory else ""),
        ("starts from", str(parent.get("path") or "")),
    ]
    return [(tell(name), value) for name, value in facts if value]


def _format_batch_size(plan: dict[str, Any]) -> str:
    for key, what in (("global_batch_size", "sample"), ("global_batch_tokens", "token")):
        if plan.get(key):
            return tell_count(plan[key], what)
    return ""


def _draw_charts(record: RunRecord) -> list[dict[str, Any]]:
    metrics, figures = record.metrics, record.figures
    loss, held_out = metrics.get("train/loss", []), metrics.get("val/loss", [])
    name = tell("training loss")
    lines = [ChartLine(name, loss, "raw"), ChartLine(name, smooth(loss), "main")]
    lines.append(ChartLine(tell("held-out loss"), held_out, "second", dots=len(held_out) <= MAX_DOTS))
    svg = draw_line_chart(lines, label=tell("loss of {name} by step", name=record.name), allow_log=True)
    charts = [_make_chart(tell("Loss"), svg, lines, _format_loss_note(record))]
    accuracy, margin = metrics.get("train/rewards/accuracies", []), metrics.get("train/rewards/margins", [])
    held_out = metrics.get("val/rewards/accuracies", [])
    name = tell("of training pairs")
    lines = [ChartLine(name, accuracy, "raw"), ChartLine(name, smooth(accuracy), "main")]
    lines.append(ChartLine(tell("of held-out pairs"), held_out, "second", dots=len(held_out) <= MAX_DOTS))
    svg = draw_line_chart(lines, label=tell("reward accuracy of {name} by step", name=record.name), low=0.0, high=1.0)
    note = (
        tell("margin of the rewards {change}", change=format_change(margin[0][1], margin[-1][1], ".3f"))
        if margin
        else ""
    )
    charts.append(_make_chart(tell("Reward accuracy"), svg, lines, note))
    scores = metrics.get(f"exam/{ALL_CELL}", [])
    lines = [ChartLine(tell("mean score"), scores, "main", dots=len(scores) <= MAX_DOTS)]
    svg = draw_line_chart(lines, label=tell("exam of {name} by step", name=record.name), low=0.0, high=1.0)
    share = (figures.get("exam") or {}).get("time_share")
    charts.append(
        _make_chart(
            tell("Exam"), svg, lines, tell("{share} of the training time", share=f"{share:.0%}") if share else ""
        )
    )
    charts.append(_draw_retrieval_chart(record))
    charts += _draw_benchmark_charts(record)
    return [chart for chart in charts if chart["svg"] or chart["rows"]]


def _draw_retrieval_chart(record: RunRecord) -> dict[str, Any]:
    """Draw recall at 1 in both directions by step."""
    curves = list_recall_curves(record)
    lines = [
        ChartLine(name, points, style, dots=len(points) <= MAX_DOTS)
        for (name, points), style in zip(curves, ("main", "second"), strict=False)
    ]
    svg = draw_line_chart(lines, label=tell("retrieval of {name} by step", name=record.name), low=0.0, high=1.0)
    return _make_chart(tell("Retrieval"), svg, lines, "")


def _draw_benchmark_charts(record: RunRecord) -> list[dict[str, Any]]:
    """Draw the scores of each benchmark that the stage was asked while it trained."""
    figures = record.figures.get("benchmark") or {}
    charts = []
    for metric in figures.get("last") or {}:
        scores, name = record.metrics.get(metric, []), metric.partition("/")[2]
        lines = [ChartLine(tell("score of {name}", name=name), scores, "main", dots=len(scores) <= MAX_DOTS)]
        svg = draw_line_chart(lines, label=tell("{metric} of {name} by step", metric=name, name=record.name), low=0.0)
        note = tell("a slice; all benchmarks took {share} of the training time", share=f"{figures['time_share']:.0%}")
        charts.append(_make_chart(tell("Benchmark {name}", name=name), svg, lines, note))
    return charts


def _make_chart(title: str, svg: str, lines: list[ChartLine], note: str) -> dict[str, Any]:
    """Make a chart of the page: a curve, or a table of its values if no line has more than `MAX_TABLE_POINTS` points."""
    shown = [line for line in lines if line.points and line.style != "raw"]
    if not shown or max(len(line.points) for line in shown) > MAX_TABLE_POINTS:
        return {"title": title, "svg": Markup(svg), "legend": _make_legend(lines), "rows": [], "note": note}
    steps = sorted({step for line in shown for step, _ in line.points})
    rows = [
        (
            line.name,
            [f"{dict(line.points)[step]:.4g}" if step in dict(line.points) else "" for step in steps],
        )
        for line in shown
    ]
    return {"title": title, "svg": "", "legend": [], "steps": [step + 1 for step in steps], "rows": rows, "note": note}


def _make_legend(lines: list[ChartLine]) -> list[tuple[str, str]]:
    """Make the legend. A raw curve shares the entry of its smoothed curve."""
    return [(line.style, line.name) for line in lines if line.points and line.style != "raw"]


def _format_loss_note(record: RunRecord) -> str:
    last = {name: points[-1][1] for name, points in record.metrics.items() if name.startswith("val/loss")}
    if "val/loss" not in last:
        return ""
    languages = [f"{name} {last[f'val/loss_{name}']:.3g}" for name in ("ko", "en") if f"val/loss_{name}" in last]
    found = tell("held-out at the end {loss}", loss=f"{last['val/loss']:.3g}")
    return found + (f" ({', '.join(languages)})" if languages else "")


def _collect_scores(record: RunRecord) -> list[dict[str, Any]]:
    """Collect the scores: one row for each kind, with before and after for each language."""
    before, after = record.get_scores("before"), record.get_scores("after")
    counts = record.figures.get("num_scored") or {}
    kinds: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for group in {**after, **before}:
        kind, language = split_group(group)
        pair = {"before": before.get(group), "after": after.get(group)}
        kinds[kind].append(
            {
                "language": language,
                **pair,
                "num": counts.get(group),
                "text": format_change(pair["before"], pair["after"]),
            }
        )
    return [{"kind": kind, "languages": rows} for kind, rows in kinds.items()]


def _collect_text_scores(record: RunRecord) -> dict[str, Any]:
    """Collect chrF, ROUGE-L and ANLS: one row for each kind and language, one column for each metric."""
    before, after = record.get_text_scores("before"), record.get_text_scores("after")
    names = list(dict.fromkeys([*after, *before]))
    groups = dict.fromkeys(group for phase in (after, before) for scores in phase.values() for group in scores)
    rows = [
        {
            "kind": kind,
            "language": language,
            "cells": [
                format_change((before.get(name) or {}).get(group), (after.get(name) or {}).get(group)) for name in names
            ],
        }
        for group in groups
        for kind, language in [split_group(group)]
    ]
    return {"titles": [_get_metric_title(name) for name in names], "rows": rows}


def _get_metric_title(name: str) -> str:
    """Return the title of a metric; the name itself for one that this version does not know."""
    return METRICS[name].title if name in METRICS else name


def _format_text_scores(scores: Any) -> str:
    """Format the scores of one answer: "chrF 0.81, ROUGE-L 0.70"."""
    return ", ".join(f"{_get_metric_title(name)} {value:.2f}" for name, value in (scores or {}).items())


def _collect_stage_scores(records: list[RunRecord]) -> dict[str, Any]:
    """Collect the scores of each kind after each stage, by language: they show learning and forgetting."""
    groups = dict.fromkeys(split_group(group) for record in records for group in record.get_scores("after"))
    kinds, languages = dict.fromkeys(kind for kind, _ in groups), sorted({language for _, language in groups})[::-1]
    rows = [
        {"kind": kind, "scores": [r.get_scores("after").get(f"{kind}_{name}") for r in records for name in languages]}
        for kind in kinds
    ]
    return {"languages": languages, "rows": rows}


def _prepare_mixture(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Prepare the rows of the mixture: sources, languages, text alone, kinds. `width` is in percent of the largest share."""
    most = max((row["samples"] for row in rows), default=0.0) or 1.0
    return [row | {"width": 100 * row["samples"] / most} for row in rows]


def _format_languages(rows: list[dict[str, Any]]) -> str:
    found = sorted((row for row in rows if row["group"] == "language"), key=lambda row: -row["samples"])
    return ", ".join(f"{row['name']} {row['samples']:.0%}" for row in found)


def _summarize_quarantine(record: RunRecord) -> dict[str, Any]:
    counts = record.data.get("quarantined") or Counter(str(row.get("source")) for row in record.quarantine)
    total = sum(counts.values()) if isinstance(counts, dict) else 0
    return {"total": total, "counts": counts, "first": record.quarantine[:8]}


@dataclass(slots=True)
class SampleCard:
    """Held-out sample with prompt, reference, and the answer of each phase."""

    prompt: list[tuple[str, bool]]
    kind: str
    language: str
    reference: list[tuple[str, bool]]
    answers: list[dict[str, Any]]
    pictures: list[dict[str, str]]
    marked: bool  # the images have boxes


def _group_samples(record: RunRecord, num_samples: int) -> list[tuple[str, list[SampleCard]]]:
    """Group the first samples of each kind and language by kind."""
    rows: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for row in record.samples:
        rows[str(row.get("kind")), str(row.get("language"))][f"{row.get('source')}/{row.get('id')}"].append(row)
    groups: dict[str, list[SampleCard]] = defaultdict(list)
    for (kind, _), samples in rows.items():
        groups[kind if num_samples > 1 else ""] += [
            _make_card(record.path, phases) for phases in list(samples.values())[:num_samples]
        ]
    return list(groups.items())


def _make_card(folder: Path, phases: list[dict[str, Any]]) -> SampleCard:
    phases = sorted(phases, key=lambda row: row.get("phase") != "before")
    first = phases[0]
    keys = ("phase", "score")
    answers = [
        {key: row.get(key) for key in keys}
        | {
            "pieces": _split_control_tokens(row.get("prediction")),
            "text_scores": _format_text_scores(row.get("text_scores")),
        }
        for row in phases
    ]
    pictures: dict[str, str] = {}  # an image without boxes is the same in both phases
    for row in phases:
        for path in row.get("images") or []:
            pictures.setdefault(path, str(row.get("phase")))
    differs = len(set(pictures.values())) > 1
    images = [
        {"source": _encode_data_url(folder, path), "phase": phase if differs else ""}
        for path, phase in pictures.items()
    ]
    return SampleCard(
        prompt=_split_control_tokens(IMAGE_PLACEHOLDER.sub("", str(first.get("prompt") or ""))),
        kind=str(first.get("kind") or "").replace("_", " "),
        language=str(first.get("language") or ""),
        reference=_split_control_tokens(first.get("reference")),
        answers=answers,
        pictures=[picture for picture in images if picture["source"]],
        marked=any(Path(path).stem.endswith(f"_{phase}") for path, phase in pictures.items()),
    )


def _split_control_tokens(text: Any) -> list[tuple[str, bool]]:
    """Split a text at control tokens. Returns pieces, and whether each is a control token."""
    return [(piece, bool(CONTROL_TOKEN.fullmatch(piece))) for piece in CONTROL_TOKEN.split(str(text or "")) if piece]


def _encode_data_url(folder: Path, name: str) -> str:
    """Encode an image of the run folder as a data: URL; "" if the file is missing."""
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()) or not path.is_file():
        return ""
    data, kind = path.read_bytes(), "png"
    if len(data) > MAX_INLINE_BYTES:
        stream = io.BytesIO()
        Image.open(io.BytesIO(data)).convert("RGB").save(stream, "JPEG", quality=85)
        data, kind = stream.getvalue(), "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
