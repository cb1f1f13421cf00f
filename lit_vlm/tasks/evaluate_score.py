"""Scoring of one benchmark in task=evaluate: its rows, the run of the harness, and the score with all that decides it."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_vlm.config.task_settings import EvaluateConfig, JudgeConfig
from lit_vlm.evaluation.benchmark_files import PreparedRows, format_bad_rows, open_rows, prepare_rows
from lit_vlm.evaluation.benchmarks import BENCHMARKS, Benchmark, JudgeUse
from lit_vlm.evaluation.evaluation_summary import (
    BenchmarkScore,
)
from lit_vlm.evaluation.harness import (
    HarnessRequest,
    HarnessResult,
    HarnessTask,
    compute_relative_score,
    count_random_letters,
    list_unreadable_reviews,
    read_results,
    run_harness,
)
from lit_vlm.evaluation.harness_environment import (
    HARNESS,
    VERSION,
    make_process_environment,
)
from lit_vlm.files import write_text_atomically
from lit_vlm.formatting import format_count
from lit_vlm.tasks.evaluate_progress import show_requests
from lit_vlm.tasks.terminal import say
from lit_vlm.types import UserError

if TYPE_CHECKING:  # it needs packages of the extra `serve`
    from lit_vlm.serving.recording_endpoint import AnswerRecorder
    from lit_vlm.tasks.evaluate_endpoint import EvaluationJudge

MAX_SHOWN = 5  # reasons for requests without an answer that a message lists


@dataclass(frozen=True, slots=True)
class EvaluationJob:
    """One benchmark of this run.

    Attributes:
        name: as the settings name it.
        benchmark: its entry in the registry; None: a task of the harness by its own name.
        rows: its rows; None: the harness loads them itself.
        task: its task.
        identity: digest of everything that decides the score.
    """

    name: str
    benchmark: Benchmark | None
    rows: PreparedRows | None
    task: HarnessTask
    identity: str


@dataclass(frozen=True, slots=True)
class EvaluationPlace:
    """Files and programs of this run.

    Attributes:
        dir: folder of the run.
        python: Python of the harness's environment.
        settings: the section `evaluate`.
        max_pixels: larger images are refused.
    """

    dir: Path
    python: Path
    settings: EvaluateConfig
    max_pixels: int


@dataclass(frozen=True, slots=True)
class HarnessEndpoints:
    """Endpoints that the harness asks: the model's, and the judge's if there is one. Both are behind recorders."""

    recorder: AnswerRecorder
    base_url: str
    judge: EvaluationJudge | None


def prepare(
    name: str, folder: Path, settings: EvaluateConfig, max_pixels: int, excluded: frozenset[int] = frozenset()
) -> PreparedRows | None:
    """Check the rows of a benchmark and write those that are used; None for a task that is not in the registry.

    Raises:
        UserError: the files are missing or lack columns, or rows cannot be used and evaluate.leave_out is false.
    """
    if name not in BENCHMARKS:
        return None
    benchmark = BENCHMARKS[name]
    files = Path(settings.files) if settings.files else None
    if files is not None and not files.is_dir():
        raise UserError(f"evaluate.files={files}: no such folder. Each benchmark has a folder of its name in it.")
    rows, image_root = open_rows(name, benchmark, files, folder / "rows")
    prepared = prepare_rows(
        name,
        benchmark,
        rows,
        image_root,
        folder / "rows" / f"{name}.parquet",
        max_pixels=max_pixels,
        limit=settings.limit,
        excluded=excluded,
    )
    if prepared.bad_rows and not settings.leave_out:
        raise UserError(format_bad_rows(name, prepared.bad_rows))
    if benchmark.num_rows is not None and prepared.num_available != benchmark.num_rows:
        say(f"{name}: {prepared.num_available:,} rows, and the published set has {benchmark.num_rows:,}")
    return prepared


def uses_judge(benchmark: Benchmark | None, judge: JudgeConfig) -> bool:
    """Return True if a judge can be asked about a benchmark; whether a task outside of the registry asks one is unknown."""
    return judge.endpoint is not None and (benchmark is None or benchmark.judge is not JudgeUse.none)


def score_job(job: EvaluationJob, place: EvaluationPlace, endpoints: HarnessEndpoints) -> dict[str, BenchmarkScore]:
    """Run the harness on a benchmark. Returns the scores by name; a group of tasks has several.

    Raises:
        UserError: the harness failed, or requests had no answer and evaluate.leave_out is false.
    """
    recorder, judge = (
        endpoints.recorder,
        endpoints.judge if endpoints.judge and uses_judge(job.benchmark, endpoints.judge.settings) else None,
    )
    started, num_asked, asking = time.monotonic(), recorder.counts.asked, recorder.asking_seconds
    judging = judge.recorder.asking_seconds if judge else 0.0
    rows, left_out = job.rows, dict[str, int]()
    results = run_job(job, place, endpoints, judge, rows)
    failed = results[0][1].failed
    if failed and not (place.settings.leave_out and rows is not None):
        raise UserError(format_failures(job.name, len(results[0][1].samples), recorder))
    if failed and rows is not None:
        excluded = frozenset(rows.numbers[position] for position in failed)
        left_out["requests without an answer"] = len(excluded)
        rows = prepare(job.name, place.dir, place.settings, place.max_pixels, excluded)
        results = run_job(job, place, endpoints, judge, rows)
    if rows is not None and rows.bad_rows:
        left_out["rows that cannot be read"] = len(rows.bad_rows)
    scores = {}
    for task, result in results:
        name = job.name if len(results) == 1 else f"{job.name}/{task}"
        write_samples(place.dir / "samples" / f"{name.replace('/', '--')}.jsonl", result, rows)
        scores[name] = make_score(
            job,
            result,
            place.dir / "harness" / job.name / "harness.log",
            name=name,
            task=task if job.benchmark is None else job.benchmark.task,
            num_questions=len(rows.groups) if rows else len(result.samples),
            num_available=rows.num_available if rows else None,
            left_out=left_out,
            max_new_tokens=place.settings.max_new_tokens,
            seconds=round(time.monotonic() - started, 2),
            model_seconds=round(recorder.asking_seconds - asking, 2),
            judge=judge.name if judge else None,
            judge_seconds=round(judge.recorder.asking_seconds - judging, 2) if judge else 0.0,
            num_asked=recorder.counts.asked - num_asked,
        )
    return scores


def run_job(
    job: EvaluationJob,
    place: EvaluationPlace,
    endpoints: HarnessEndpoints,
    judge: EvaluationJudge | None,
    rows: PreparedRows | None,
) -> list[tuple[str, HarnessResult]]:
    """Run the harness once and read its results.

    Raises:
        UserError: it failed, or the judge did not answer.
    """
    output = place.dir / "harness" / job.name
    shutil.rmtree(output, ignore_errors=True)
    variables = {} if rows is None else {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    if judge is not None:
        variables |= judge.make_variables(has_full_url=job.benchmark is not None and job.benchmark.judge_url_is_full)
        judge.recorder.failures.clear()
    request = HarnessRequest(
        python=place.python,
        task=job.task,
        base_url=endpoints.base_url,
        output=output,
        environment=make_process_environment(output, variables, keep_hub_token=rows is None),
        num_concurrent=place.settings.num_concurrent,
        max_new_tokens=place.settings.max_new_tokens,
        limit=place.settings.limit if rows is None else None,
    )
    endpoints.recorder.failures.clear()
    judge_recorder = judge.recorder if judge else None
    with show_requests(job.name, len(rows.numbers) if rows else None, endpoints.recorder, judge_recorder) as on_wait:
        run_harness(request, on_wait)
    if judge_recorder and judge_recorder.failures:
        raise UserError(format_failures(f"{job.name}: the judge", judge_recorder.counts.received, judge_recorder))
    shutil.rmtree(output / "datasets", ignore_errors=True)
    results = read_results(output, job.name)
    if rows is not None and len(results[0][1].samples) != len(rows.numbers):
        found, needed = len(results[0][1].samples), len(rows.numbers)
        raise UserError(
            f"{job.name}: {HARNESS} {VERSION} scored {found:,} of {needed:,} rows; see {output / 'harness.log'}."
        )
    return results


def format_failures(name: str, num_rows: int, recorder: AnswerRecorder) -> str:
    """Format the message about requests without an answer, which are not scored."""
    questions: dict[str, list[str]] = {}
    for question, error in recorder.failures.values():
        questions.setdefault(error, []).append(question)
    shown = "\n".join(
        f"  {error} {format_count(len(found), 'request')}, e.g. {found[0]!r}"
        for error, found in list(questions.items())[:MAX_SHOWN]
    )
    return (
        f"{name}: {format_count(len(recorder.failures), 'request')} of {num_rows:,} had no answer, so there is no score:\n{shown}\n"
        "The other answers are kept: the same command asks only these again. evaluate.leave_out=true scores without questions that"
        " the model did not answer, and counts them."
    )


def describe_reviews(benchmark: Benchmark, result: HarnessResult, log: Path) -> list[str]:
    """Describe the judge's replies that the harness could not read."""
    notes = []
    if number := len(list_unreadable_reviews(result.samples, benchmark.metric)):
        score = compute_relative_score(result.samples, benchmark.metric)
        without = "" if score is None else f"; the score without them is {score:.2f}"
        notes.append(f"{format_count(number, 'review')} of {len(result.samples):,} had no two scores{without}.")
    if number := count_random_letters(log):
        notes.append(
            f"For {format_count(number, 'answer')} the judge named no letter, and the harness drew one at random."
        )
    if number := int(result.metrics.get("koffvqa_unjudged", 0)):
        notes.append(f"{format_count(number, 'review')} of {len(result.samples):,} had no score and was left out.")
    return notes


def make_score(job: EvaluationJob, result: HarnessResult, log: Path, **values: Any) -> BenchmarkScore:
    """Make the score of a task from the harness's results and its log."""
    benchmark, score, notes = job.benchmark, None, list[str]()
    if benchmark is not None:
        if benchmark.metric not in result.metrics:
            found = ", ".join(result.metrics)
            raise UserError(
                f"{job.name}: {HARNESS} {VERSION} gave no {benchmark.metric}, only {found}. Its rows may be of another set."
            )
        score = result.metrics[benchmark.metric] * benchmark.scale
        notes += [benchmark.note] if benchmark.note else []
        notes += describe_reviews(benchmark, result, log) if values["judge"] else []
        if benchmark.rule_overrides and not values["judge"]:
            notes.append("Answers that the rules cannot read are wrong.")
    return BenchmarkScore(
        is_tested=benchmark is not None,
        score=score,
        metrics=result.metrics,
        num_samples=len(result.samples),
        num_published=benchmark.num_rows if benchmark else None,
        is_circular=benchmark.is_circular if benchmark else False,
        prompt=str(result.samples[0].get("input", "")),
        task_digest=job.task.digest,
        notes=notes,
        identity=job.identity,
        **values,
    )


def write_samples(path: Path, result: HarnessResult, rows: PreparedRows | None) -> None:
    """Write the answers of a benchmark with their questions, references and scores, one JSON object per line."""
    lines = []
    for position, sample in enumerate(result.samples):
        scores = {name: sample[name] for name in result.metrics if name in sample}
        number = rows.numbers[position] if rows else position
        row = {"id": number, "question": sample.get("input"), "answer": sample.get("filtered_resps")}
        lines.append(json.dumps(row | {"reference": sample.get("target"), "scores": scores}, ensure_ascii=False))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(path, "\n".join(lines) + "\n", remove_secrets=False)
