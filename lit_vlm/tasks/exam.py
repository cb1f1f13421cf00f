"""task=exam: scores a finished model on the fixed exam, and compares it with the stage that it started from."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from lit_vlm.config import Run
from lit_vlm.config.schema import TrainerConfig
from lit_vlm.evaluation.exam import (
    EXTRA_TOKENS,
    ExamAnswers,
    ExamItem,
    ExamLog,
    find_missing_items,
    get_answers_path,
    make_items,
    score_answer,
)
from lit_vlm.evaluation.generation import count_answer_tokens, generate_answers_continuously
from lit_vlm.fault_tolerance.exit_status import INTERRUPTED
from lit_vlm.files import lock_file
from lit_vlm.formatting import format_count
from lit_vlm.reports.exam import find_parent_answers, format_comparison, make_exam_table
from lit_vlm.reports.report import write_report
from lit_vlm.runs.run_folder import describe_parent, read_manifest_or_empty, require_finished_parent
from lit_vlm.tasks.pretrained import PretrainedModel, open_pretrained
from lit_vlm.tasks.terminal import console, say

PROGRESS_SECONDS = 30.0
ROWS_PER_WRITE = 64
TILE_LIMIT_FACTOR = 4  # factor on the training tile limit: generation keeps no activations for a backward pass


def run_exam(run: Run) -> None:
    """Answer the exam, score the answers, and print the table. An interrupted exam resumes; a finished one is reported.

    The answers are in `exam.jsonl` of the model's run folder, or below run_dir/exam for any other model.

    Raises:
        UserError: no model is given, or a file is in the way.
    """
    config = run.config
    assert run.init_from is not None  # checked with the settings
    require_finished_parent(run.init_from)
    limits = (config.data.tokens_per_micro_batch, TILE_LIMIT_FACTOR * config.data.tiles_per_micro_batch)
    path = get_answers_path(run.init_from, Path(config.run_dir))
    weights = (describe_parent(run.init_from) or {})["digest"] or run.init_from
    log, items = ExamLog(path, weights, run.init_from), make_items(config.evaluate.exam_items)
    with lock_file(path.with_name("exam.lock")):
        answers = log.open(overwrite=config.overwrite)
        pending = list(find_missing_items(answers, items))
        if pending:
            say(
                f"{run.init_from}: exam of {format_count(len(items), 'question')}, {len(items) - len(pending):,} answered before"
            )
            model = open_pretrained(run.init_from, config.model, config.trainer.accelerator, config.seed)
            limit_threads(config.trainer)
            answer_items(model, log, pending, limits)
            answers = log.open(overwrite=False)
    show_result(answers.take(config.evaluate.exam_items), run.init_from)
    update_report(path.parent)


def update_report(folder: Path) -> None:
    """Write the report of the model's run again, with the exam. A model without a run has no report."""
    name = read_manifest_or_empty(folder).get("name")
    if name:
        write_report(folder / "report.html", [folder], name)


def limit_threads(trainer: TrainerConfig) -> None:
    """Set the number of CPU threads to that of training."""
    if trainer.num_threads:
        torch.set_num_threads(trainer.num_threads)


def answer_items(model: PretrainedModel, log: ExamLog, items: list[ExamItem], limits: tuple[int, int]) -> None:
    """Answer and score the items. Rows are on the disk after every `ROWS_PER_WRITE` answers.

    Args:
        limits: maximum tokens and tiles of prompts whose images are encoded together.
    """
    started = last_report = time.monotonic()
    rows: list[dict[str, Any]] = []
    samples = [item.sample for item in items]
    answered = generate_answers_continuously(
        model.load(),
        model.processor,
        samples,
        [count_answer_tokens(model.processor, sample) + EXTRA_TOKENS for sample in samples],
        max_tokens=limits[0],
        max_tiles=limits[1],
    )
    try:
        for count, (number, answer) in enumerate(answered, 1):
            rows.append(score_answer(items[number], answer))
            if len(rows) == ROWS_PER_WRITE:
                log.append(rows)
                rows = []
            if time.monotonic() - last_report > PROGRESS_SECONDS:
                last_report = time.monotonic()
                left = (last_report - started) / count * (len(items) - count)
                say(f"{count:,} of {format_count(len(items), 'question')}; {left / 60:.1f} minutes left")
    except KeyboardInterrupt:
        say("interrupted; the same command goes on where this one came to")
        raise SystemExit(INTERRUPTED) from None
    finally:
        if rows:
            log.append(rows)


def show_result(answers: ExamAnswers, init_from: str) -> None:
    """Print the table of scores, and the comparison with the stage that the model started from, if that took this exam."""
    parent = find_parent_answers(init_from)
    columns = [(one.path.parent.name, one) for one in (parent, answers) if one is not None]
    console.print(make_exam_table(columns))
    if parent is not None:
        say(f"Against {parent.path.parent}: {format_comparison(parent, answers)}.")
    say(f"Answers: {answers.path}")
