"""task=evaluate: score a model on benchmarks with lmms-eval. Read top to bottom."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from lit_vlm.config import Run
from lit_vlm.config.schema import EvaluateConfig
from lit_vlm.evaluation.benchmark_files import PreparedRows, format_bad_rows, open_rows, prepare_rows
from lit_vlm.evaluation.benchmarks import BENCHMARKS, Benchmark, JudgeUse
from lit_vlm.evaluation.evaluation_summary import (
    JSON_FILE,
    MARKDOWN_FILE,
    SHOWN_MODELS,
    BenchmarkScore,
    format_rows,
    format_score,
    format_title,
    get_published,
    list_remarks,
    read_scores,
    write_scores,
)
from lit_vlm.evaluation.harness import (
    HarnessRequest,
    HarnessResult,
    HarnessTask,
    read_results,
    read_task,
    run_harness,
    write_task,
)
from lit_vlm.evaluation.harness_environment import (
    HARNESS,
    VERSION,
    compute_pins_digest,
    ensure_environment,
    find_tasks,
    get_default_folder,
    list_task_files,
    make_process_environment,
)
from lit_vlm.fault_tolerance.run_lock import RunLock
from lit_vlm.files import write_text_atomically
from lit_vlm.formatting import format_count
from lit_vlm.tasks.evaluate_progress import show_requests
from lit_vlm.tasks.terminal import console, say
from lit_vlm.types import UserError

try:
    from lit_vlm.serving.answer_log import ChatAnswerLog
    from lit_vlm.serving.recording_endpoint import AnswerRecorder, run_recorder
    from lit_vlm.tasks.evaluate_endpoint import EvaluatedModel, find_model, open_endpoint
except ImportError:  # packages of the extra `serve`
    find_model = None  # type: ignore[assignment]

TASK_PACK = Path(__file__).parents[1] / "evaluation" / "task_pack"
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


def evaluate(run: Run) -> None:
    """Check the rows of all benchmarks, ask the model, score, and show the scores beside published ones.

    Answers are kept, so the same command asks only what is missing. A benchmark that was scored with the same model, rows and
    settings is not scored again.

    Raises:
        UserError: a setting, a file or a row cannot be used, the environment cannot be made, or requests had no answer.
    """
    if find_model is None:
        raise UserError("task=evaluate needs FastAPI, Uvicorn and httpx: pip install -e '.[serve]' -c constraints.txt")
    config, settings = run.config, run.config.evaluate
    with RunLock(run.dir) as run_lock:
        run_lock.acquire()
        if config.overwrite:
            remove_results(run.dir)
        rows = {name: prepare(name, run.dir, settings, config.data.max_image_pixels) for name in config.benchmarks}
        model = find_model(str(run.init_from), settings, config.trainer.accelerator)
        environment = Path(settings.environment).expanduser() if settings.environment else get_default_folder()
        place = EvaluationPlace(run.dir, ensure_environment(environment, say), settings, config.data.max_image_pixels)
        jobs = make_jobs(rows, environment, place, model)
        scores = read_scores(run.dir)
        pending = [job for job in jobs if job.identity not in {score.identity for score in scores.values()}]
        for job in jobs:
            if job not in pending:
                say(f"{job.name}: scored already with this model, these rows and settings (overwrite=true asks again)")
        if pending:
            options = {"accelerator": config.trainer.accelerator, "seed": config.seed}
            options["max_image_pixels"] = config.data.max_image_pixels
            with open_endpoint(model, config.serve, config.model, **options) as upstream:
                log = ChatAnswerLog(run.dir / "answers" / f"{model.digest[:16]}.jsonl")
                recorder = AnswerRecorder(log, upstream=upstream)
                with run_recorder(recorder) as base_url:
                    for job in pending:
                        scores = drop_scores(scores, job) | score_job(job, place, recorder, base_url)
                        write_scores(run.dir, model.to_dict(), scores)
        shutil.rmtree(run.dir / "rows", ignore_errors=True)
    identities = {job.identity for job in jobs}
    show_scores(model.name, [score for score in scores.values() if score.identity in identities], run.dir)


def remove_results(folder: Path) -> None:
    """Remove scores and answers of earlier runs."""
    for path in (folder / JSON_FILE, folder / MARKDOWN_FILE):
        path.unlink(missing_ok=True)
    shutil.rmtree(folder / "answers", ignore_errors=True)


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
    if benchmark.judge is JudgeUse.needed:
        raise UserError(f"{name}: needs a judge, which task=evaluate does not ask yet. Leave it out of benchmarks.")
    files = Path(settings.files).expanduser() if settings.files else None
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


def make_jobs(
    rows: dict[str, PreparedRows | None], environment: Path, place: EvaluationPlace, model: EvaluatedModel
) -> list[EvaluationJob]:
    """Make the job of each benchmark, and write its task for the harness."""
    task_files = list_task_files(environment)
    pack = find_tasks(TASK_PACK) if TASK_PACK.is_dir() else {}
    jobs = []
    for name, prepared in rows.items():
        benchmark = BENCHMARKS.get(name)
        if benchmark is not None and prepared is not None:
            file = (pack if benchmark.in_task_pack else task_files)[benchmark.task]
            task = write_task(name, benchmark, file, prepared.path, place.dir / "tasks", has_judge=False)
        else:
            text, digest = read_task(task_files[name]) if name in task_files else ("", "")
            task = HarnessTask(name, None, text, digest)
        decides = {
            "harness": compute_pins_digest(),
            "task": [task.name, task.digest],
            "rows": prepared.digest if prepared else place.settings.limit,
            "model": model.digest,
            "max_new_tokens": place.settings.max_new_tokens,
        }
        identity = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
        jobs.append(EvaluationJob(name, benchmark, prepared, task, identity))
    return jobs


def drop_scores(scores: dict[str, BenchmarkScore], job: EvaluationJob) -> dict[str, BenchmarkScore]:
    """Drop earlier scores of a job; a group of tasks has one score per task."""
    return {name: score for name, score in scores.items() if name != job.name and not name.startswith(f"{job.name}/")}


def score_job(
    job: EvaluationJob, place: EvaluationPlace, recorder: AnswerRecorder, base_url: str
) -> dict[str, BenchmarkScore]:
    """Run the harness on a benchmark. Returns the scores by name; a group of tasks has several.

    Raises:
        UserError: the harness failed, or requests had no answer and evaluate.leave_out is false.
    """
    started, asked, asking = time.monotonic(), recorder.counts.asked, recorder.asking_seconds
    rows, left_out = job.rows, dict[str, int]()
    results = run_job(job, place, recorder, base_url, rows)
    failed = results[0][1].failed
    if failed and not (place.settings.leave_out and rows is not None):
        raise UserError(format_failures(job.name, len(results[0][1].samples), recorder))
    if failed and rows is not None:
        excluded = frozenset(rows.numbers[position] for position in failed)
        left_out["requests without an answer"] = len(excluded)
        rows = prepare(job.name, place.dir, place.settings, place.max_pixels, excluded)
        results = run_job(job, place, recorder, base_url, rows)
    if rows is not None and rows.bad_rows:
        left_out["rows that cannot be read"] = len(rows.bad_rows)
    scores = {}
    for task, result in results:
        name = job.name if len(results) == 1 else f"{job.name}/{task}"
        write_samples(place.dir / "samples" / f"{name.replace('/', '--')}.jsonl", result, rows)
        scores[name] = make_score(
            job,
            result,
            name=name,
            task=task if job.benchmark is None else job.benchmark.task,
            num_questions=len(rows.groups) if rows else len(result.samples),
            num_available=rows.num_available if rows else None,
            left_out=left_out,
            max_new_tokens=place.settings.max_new_tokens,
            seconds=round(time.monotonic() - started, 2),
            model_seconds=round(recorder.asking_seconds - asking, 2),
            num_asked=recorder.counts.asked - asked,
        )
    return scores


def run_job(
    job: EvaluationJob, place: EvaluationPlace, recorder: AnswerRecorder, base_url: str, rows: PreparedRows | None
) -> list[tuple[str, HarnessResult]]:
    """Run the harness once and read its results."""
    output = place.dir / "harness" / job.name
    shutil.rmtree(output, ignore_errors=True)
    variables = {} if rows is None else {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    request = HarnessRequest(
        python=place.python,
        task=job.task,
        base_url=base_url,
        output=output,
        environment=make_process_environment(output, variables, keep_hub_token=rows is None),
        num_concurrent=place.settings.num_concurrent,
        max_new_tokens=place.settings.max_new_tokens,
        limit=place.settings.limit if rows is None else None,
    )
    recorder.failures.clear()
    with show_requests(job.name, len(rows.numbers) if rows else None, recorder) as on_wait:
        run_harness(request, on_wait)
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
        "The other answers are kept: the same command asks only these again. evaluate.leave_out=true scores without them and"
        " counts them."
    )


def make_score(job: EvaluationJob, result: HarnessResult, **values: Any) -> BenchmarkScore:
    """Make the score of a task from the harness's results."""
    benchmark, score, notes = job.benchmark, None, list[str]()
    if benchmark is not None:
        if benchmark.metric not in result.metrics:
            found = ", ".join(result.metrics)
            raise UserError(
                f"{job.name}: {HARNESS} {VERSION} gave no {benchmark.metric}, only {found}. Its rows may be of another set."
            )
        score = result.metrics[benchmark.metric] * benchmark.scale
        notes += [benchmark.note] if benchmark.note else []
        if benchmark.rule_overrides:
            notes.append("Answers that the rules cannot read are wrong.")
    return BenchmarkScore(
        is_tested=benchmark is not None,
        score=score,
        metrics=result.metrics,
        num_samples=len(result.samples),
        num_published=benchmark.num_rows if benchmark else None,
        is_circular=benchmark.is_circular if benchmark else False,
        judge=None,
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


def show_scores(model: str, scores: Sequence[BenchmarkScore], folder: Path) -> None:
    """Print the scores beside published ones, and the remarks on each."""
    table = Table(title=f"{model}, scored by {HARNESS} {VERSION}", title_justify="left")
    table.add_column("benchmark")
    for heading in ("score", "rows", "model", "harness", *SHOWN_MODELS):
        table.add_column(heading, justify="right")
    for score in scores:
        times = (f"{score.model_seconds:.1f} s", f"{score.harness_seconds:.1f} s")
        published = (get_published(score.name, name) for name in SHOWN_MODELS)
        table.add_row(format_title(score), format_score(score), format_rows(score), *times, *published)
    console.print(table)
    for score in scores:
        say(f"{format_title(score)}: {' '.join(list_remarks(score))}")
    say(f"All scores and published rows: {folder / MARKDOWN_FILE}")
