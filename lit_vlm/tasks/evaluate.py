"""task=evaluate: score a model on benchmarks with lmms-eval. Read top to bottom."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from lit_vlm.config import Run
from lit_vlm.config.task_settings import JudgeConfig
from lit_vlm.evaluation.benchmark_files import PreparedRows
from lit_vlm.evaluation.benchmarks import BENCHMARKS
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
    HarnessTask,
    read_task,
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
)
from lit_vlm.fault_tolerance.run_lock import RunLock
from lit_vlm.tasks.evaluate_score import (
    EvaluationJob,
    EvaluationPlace,
    HarnessEndpoints,
    prepare,
    score_job,
    uses_judge,
)
from lit_vlm.tasks.terminal import console, say
from lit_vlm.types import UserError

try:
    from lit_vlm.serving.answer_log import ChatAnswerLog
    from lit_vlm.serving.recording_endpoint import AnswerRecorder, run_recorder
    from lit_vlm.tasks.evaluate_endpoint import EvaluatedModel, find_model, open_endpoint, open_judge
except ImportError:  # packages of the extra `serve`
    find_model = None  # type: ignore[assignment]

TASK_PACK = Path(__file__).parents[1] / "evaluation" / "task_pack"


def evaluate(run: Run) -> None:
    """Check the rows of all benchmarks, ask the model, score, and show the scores beside published ones.

    Answers are kept, so the same command asks only what is missing. A benchmark that was scored with the same model, rows and
    settings is not scored again.

    Raises:
        UserError: a setting, a file or a row cannot be used, the environment cannot be made, or requests had no answer.
    """
    if find_model is None:
        raise UserError("task=evaluate needs FastAPI and Uvicorn: pip install -e '.[serve]' -c constraints.txt")
    config, settings = run.config, run.config.evaluate
    with RunLock(run.dir) as run_lock:
        run_lock.acquire()
        if config.overwrite:
            remove_results(run.dir)
        rows = {name: prepare(name, run.dir, settings, config.data.max_image_pixels) for name in config.benchmarks}
        model = find_model(str(run.init_from), settings, config.trainer.accelerator)
        environment = Path(settings.environment).expanduser() if settings.environment else get_default_folder()
        place = EvaluationPlace(run.dir, ensure_environment(environment, say), settings, config.data.max_image_pixels)
        jobs = make_jobs(rows, environment, place, model, config.judge)
        scores = read_scores(run.dir)
        pending = [job for job in jobs if job.identity not in {score.identity for score in scores.values()}]
        for job in jobs:
            if job not in pending:
                say(f"{job.name}: scored already with this model, these rows and settings (overwrite=true asks again)")
        if pending:
            options = {"accelerator": config.trainer.accelerator, "seed": config.seed}
            options["max_image_pixels"] = config.data.max_image_pixels
            with (
                open_judge(config.judge, run.dir / "answers") as judge,
                open_endpoint(model, config.serve, config.model, **options) as upstream,
            ):
                log = ChatAnswerLog(run.dir / "answers" / f"{model.digest[:16]}.jsonl")
                recorder = AnswerRecorder(log, upstream=upstream)
                with run_recorder(recorder) as base_url:
                    endpoints = HarnessEndpoints(recorder, base_url, judge)
                    for job in pending:
                        scores = drop_scores(scores, job) | score_job(job, place, endpoints)
                        write_scores(run.dir, model.to_dict(), scores)
        shutil.rmtree(run.dir / "rows", ignore_errors=True)
    identities = {job.identity for job in jobs}
    show_scores(model.name, [score for score in scores.values() if score.identity in identities], run.dir)


def remove_results(folder: Path) -> None:
    """Remove scores and answers of earlier runs."""
    for path in (folder / JSON_FILE, folder / MARKDOWN_FILE):
        path.unlink(missing_ok=True)
    shutil.rmtree(folder / "answers", ignore_errors=True)


def make_jobs(
    rows: dict[str, PreparedRows | None],
    environment: Path,
    place: EvaluationPlace,
    model: EvaluatedModel,
    judge: JudgeConfig,
) -> list[EvaluationJob]:
    """Make the job of each benchmark, and write its task for the harness."""
    task_files = list_task_files(environment)
    pack = find_tasks(TASK_PACK) if TASK_PACK.is_dir() else {}
    jobs = []
    for name, prepared in rows.items():
        benchmark = BENCHMARKS.get(name)
        if benchmark is not None and prepared is not None:
            file = (pack if benchmark.in_task_pack else task_files)[benchmark.task]
            task = write_task(
                name, benchmark, file, prepared.path, place.dir / "tasks", has_judge=judge.endpoint is not None
            )
        else:
            text, digest = read_task(task_files[name]) if name in task_files else ("", "")
            task = HarnessTask(name, None, text, digest)
        decides = {
            "harness": compute_pins_digest(),
            "task": [task.name, task.digest],
            "rows": prepared.digest if prepared else place.settings.limit,
            "model": model.digest,
            "max_new_tokens": place.settings.max_new_tokens,
            "judge": [judge.endpoint, judge.model] if uses_judge(benchmark, judge) else None,
        }
        identity = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
        jobs.append(EvaluationJob(name, benchmark, prepared, task, identity))
    return jobs


def drop_scores(scores: dict[str, BenchmarkScore], job: EvaluationJob) -> dict[str, BenchmarkScore]:
    """Drop earlier scores of a job; a group of tasks has one score per task."""
    return {name: score for name, score in scores.items() if name != job.name and not name.startswith(f"{job.name}/")}


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
