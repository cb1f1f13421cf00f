"""Exam in the reports: the table of scores after each stage, and the paired comparison with the stage before in words."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from lit_vlm.evaluation.exam import (
    ALL_CELL,
    EXAM_FILE,
    INSTRUCTIONS,
    KINDS,
    LANGUAGES,
    ExamAnswers,
    read_answers,
)
from lit_vlm.evaluation.exam_comparison import (
    CellDifference,
    Verdict,
    compare_exams,
    format_difference,
    format_verdicts,
)
from lit_vlm.runs.run_folder import read_manifest_or_empty
from lit_vlm.types import UserError

MARKS = {Verdict.gained: "▲", Verdict.lost: "▼", Verdict.unchanged: ""}
DIFFICULTIES = ("easy", "hard")
TITLES = {"gro": "<gro> gives boxes", "ocr": "<ocr> gives lines", "plain": "no boxes unasked"}


@dataclass(frozen=True, slots=True)
class ExamColumn:
    """Scores of one stage, and their comparison with the stage before.

    Attributes:
        differences: by the name of the cell; empty for the first stage, and if the two exams cannot be compared.
        note: comparison in words, or the reason why there is none.
    """

    title: str
    means: dict[str, float]
    differences: dict[str, CellDifference]
    note: str

    def get_mark(self, cell: str) -> str:
        """Return the mark of a cell: gained, lost or none."""
        return MARKS[self.differences[cell].verdict] if cell in self.differences else ""

    def list_changes(self, verdict: Verdict) -> list[str]:
        """List the cells with a verdict, with difference and interval."""
        return [format_difference(one) for one in self.differences.values() if one.verdict is verdict]


def find_answers(run_dir: Path) -> ExamAnswers | None:
    """Find the answers of a finished run's model; None without any, and if they belong to other weights."""
    answers = read_answers(run_dir / EXAM_FILE)
    digest = read_manifest_or_empty(run_dir).get("weights_digest")
    return answers if answers is not None and answers.weights == digest and answers.items_per_cell else None


def find_parent_answers(model: str) -> ExamAnswers | None:
    """Find the answers of the run from which the run of this model started; None without any."""
    parent = read_manifest_or_empty(Path(model).parent).get("parent") or {}
    return find_answers(Path(parent["path"]).parent) if parent.get("path") else None


def list_exams(runs: list[Path]) -> list[tuple[str, ExamAnswers]]:
    """List the exams of runs with their titles, in their order; before a single run comes the run that it started from."""
    names = {run: str(read_manifest_or_empty(run).get("stage") or run.name) for run in runs}
    exams = [(names[run], answers) for run in runs if (answers := find_answers(run)) is not None]
    if len(runs) == 1 and exams and (parent := find_parent_answers(str(runs[0] / "hf"))) is not None:
        exams.insert(0, (parent.path.parent.name, parent))
    return exams


def collect_columns(exams: list[tuple[str, ExamAnswers]]) -> list[ExamColumn]:
    """Collect the columns of the table: title and answers of each stage, each compared with the one before.

    All stages are compared on the items that each of them has answered.
    """
    if not exams:
        return []
    shared = min(answers.items_per_cell for _, answers in exams)
    columns, previous = [], None
    for title, answers in exams:
        part = answers.take(shared)
        means = {cell: sum(scores) / len(scores) for cell, scores in part.collect_cells().items()}
        differences: list[CellDifference] = []
        note = ""
        if previous is not None:
            try:
                differences = compare_exams(previous, part)
                note = format_verdicts(differences)
            except UserError as error:
                note = str(error)
        columns.append(ExamColumn(title, means, {one.cell: one for one in differences}, note))
        previous = part
    return columns


def format_comparison(before: ExamAnswers, after: ExamAnswers) -> str:
    """Format the comparison of two models in words; of two different exams, the reason why there is none."""
    return collect_columns([("", before), ("", after)])[1].note


def list_rows() -> list[tuple[str, str, str]]:
    """List the rows of the table: title, language, and the beginning of the names of its cells."""
    groups = [(str(kind).replace("_", " "), str(kind)) for kind in KINDS]
    groups += [(TITLES[name], f"obeys_{name}") for name in INSTRUCTIONS]
    return [(title, str(language), f"{group}_{language}") for title, group in groups for language in LANGUAGES]


def make_exam_table(exams: list[tuple[str, ExamAnswers]]) -> Table:
    """Make the table for the terminal: easy and hard for each stage, with a mark where a stage gained or lost."""
    columns = collect_columns(exams)
    count = len(exams[0][1].take(min(answers.items_per_cell for _, answers in exams)).rows) if exams else 0
    table = Table(title=f"Exam of {count:,} questions: ▲ gained, ▼ lost", title_justify="left")
    table.add_column("kind")
    table.add_column("")
    for column in columns:
        for difficulty in DIFFICULTIES:
            table.add_column(f"{column.title}\n{difficulty}", justify="right")
    for title, language, group in list_rows():
        cells = [_format_cell(column, f"{group}_{level}") for column in columns for level in DIFFICULTIES]
        table.add_row(title, language, *cells)
    table.add_section()
    table.add_row("mean", "", *(text for column in columns for text in (_format_cell(column, ALL_CELL), "")))
    return table


def _format_cell(column: ExamColumn, cell: str) -> str:
    if cell not in column.means:
        return "-"
    return f"{column.means[cell]:.2f}{column.get_mark(cell) or ' '}"


def collect_exam(exams: list[tuple[str, ExamAnswers]]) -> dict[str, Any]:
    """Collect the values of `report_exam.html`; {} without an exam."""
    columns = collect_columns(exams)
    if not columns:
        return {}
    rows = [
        {
            "title": title,
            "language": language,
            "cells": [_make_cell(column, f"{group}_{difficulty}") for column in columns for difficulty in DIFFICULTIES],
        }
        for title, language, group in list_rows()
    ]
    stages = [
        {
            "title": column.title,
            "note": column.note,
            "gained": column.list_changes(Verdict.gained),
            "lost": column.list_changes(Verdict.lost),
            "mean": _make_cell(column, ALL_CELL),
        }
        for column in columns
    ]
    shared = min(answers.items_per_cell for _, answers in exams)
    return {"stages": stages, "rows": rows, "num_items": len(exams[0][1].take(shared).rows)}


def _make_cell(column: ExamColumn, cell: str) -> dict[str, Any]:
    difference = column.differences.get(cell)
    return {
        "score": column.means.get(cell),
        "mark": column.get_mark(cell),
        "detail": format_difference(difference) if difference else "",
    }
