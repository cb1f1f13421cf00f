"""Slices of benchmarks for a stage in training: questions that the harness asks, collected once, and scores of answers.

The harness asks a recorder, which stores the requests. While the stage trains, its ranks answer them, and the harness reads the
answers from the recorder as if a server had given them. So prompts and scores are the harness's own.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lit_vlm.config.task_settings import EvaluateConfig
from lit_vlm.evaluation.benchmark_files import PreparedRows
from lit_vlm.evaluation.benchmark_slices import BenchmarkSlices
from lit_vlm.evaluation.benchmarks import BENCHMARKS
from lit_vlm.evaluation.generation import make_prompt_sample
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
    compute_pins_digest,
    ensure_environment,
    find_tasks,
    get_default_folder,
    list_task_files,
    make_process_environment,
)
from lit_vlm.files import lock_file
from lit_vlm.formatting import format_count
from lit_vlm.tasks.evaluate import TASK_PACK
from lit_vlm.tasks.evaluate_score import prepare
from lit_vlm.tasks.terminal import say
from lit_vlm.types import UserError

try:
    from lit_vlm.serving.answer_log import ChatAnswerLog, LoggedAnswer, RequestFolder
    from lit_vlm.serving.chat_request import RequestError, RequestReader
    from lit_vlm.serving.recording_endpoint import AnswerRecorder, RecordingMode, run_recorder
except ImportError:  # packages of the extra `serve`
    run_recorder = None  # type: ignore[assignment]

DEFAULT_NEW_TOKENS = 1024  # of a request that names no limit, as the server's default


@dataclass(frozen=True, slots=True)
class SliceScorer:
    """Scorer of answers: it runs the harness on the answers of a log.

    Attributes:
        folder: folder with `tasks`, `rows` and `requests` of these slices.
        python: Python of the harness's environment.
        task: all tasks together.
        rows: rows of each benchmark.
        keys: keys of the requests, in the order of the questions.
    """

    folder: Path
    python: Path
    task: HarnessTask
    rows: dict[str, PreparedRows]
    settings: EvaluateConfig
    keys: tuple[str, ...]

    def __call__(self, answers: Sequence[str], log: Path, on_wait: Callable[[], None]) -> dict[str, float]:
        """Score answers in the order of the questions. They are kept in `log`. See `ScoreAnswers`."""
        answer_log = ChatAnswerLog(log)
        for key, text in zip(self.keys, answers, strict=True):
            answer_log.add(LoggedAnswer(key, text))
        output = log.with_suffix("")
        results = self.run(AnswerRecorder(answer_log, RecordingMode.replay), output, on_wait)
        shutil.rmtree(output)
        return {name: self._read_score(name, results) for name in self.rows}

    def run(self, recorder: AnswerRecorder, output: Path, on_wait: Callable[[], None]) -> dict[str, HarnessResult]:
        """Run the harness on all slices. Returns the results by task.

        Raises:
            UserError: it failed.
        """
        shutil.rmtree(output, ignore_errors=True)
        offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
        with run_recorder(recorder) as base_url:
            request = HarnessRequest(
                python=self.python,
                task=self.task,
                base_url=base_url,
                output=output,
                environment=make_process_environment(output, offline, keep_hub_token=False),
                num_concurrent=self.settings.num_concurrent,
                max_new_tokens=self.settings.max_new_tokens,
            )
            run_harness(request, on_wait)
        return dict(read_results(output, ", ".join(self.rows)))

    def _read_score(self, name: str, results: dict[str, HarnessResult]) -> float:
        benchmark, result = BENCHMARKS[name], results.get(f"lit_vlm_{name}")
        if result is None or benchmark.metric not in result.metrics:
            raise UserError(f"{name}: the harness gave no {benchmark.metric}.")
        if result.failed:
            raise UserError(
                f"{name}: the harness asked {format_count(len(result.failed), 'question')} in other words than before."
                f" Remove {self.folder}, so that the questions are collected again."
            )
        return result.metrics[benchmark.metric] * benchmark.scale


def open_benchmark_slices(
    names: Sequence[str], settings: EvaluateConfig, cache: Path, max_pixels: int, *, has_markup: bool
) -> BenchmarkSlices:
    """Open slices of `evaluate.training_rows` questions of each benchmark.

    The first start makes the harness's environment and collects its requests; later starts find them. Each rank calls it.

    Args:
        cache: folder for rows, tasks and requests, shared by all runs.
        max_pixels: larger images are refused.
        has_markup: the model has the control tokens of boxes.

    Raises:
        UserError: a package or a file is missing, or a row cannot be used.
    """
    if run_recorder is None:
        raise UserError("benchmarks=... needs FastAPI and Uvicorn: pip install -e '.[serve]' -c constraints.txt")
    environment = Path(settings.environment).expanduser() if settings.environment else get_default_folder()
    with lock_file(cache / "benchmarks.lock"):
        python = ensure_environment(environment, say)
        scorer = _prepare_slices(names, settings, cache, max_pixels, environment, python)
        requests = RequestFolder(scorer.folder / "requests")
        if not (scorer.folder / "collected").exists():
            say(f"Collecting the questions of {', '.join(names)}")
            recorder = AnswerRecorder(
                ChatAnswerLog(scorer.folder / "none.jsonl"), RecordingMode.collect, None, requests
            )
            scorer.run(recorder, scorer.folder / "collecting", lambda: None)
            shutil.rmtree(scorer.folder / "collecting")
            (scorer.folder / "collected").touch()
    reader = RequestReader("model", None, max_pixels, has_markup)
    keys, samples, limits = [], [], []
    for key, body in requests.read():
        try:
            request = reader.read({**body, "model": "model"})
        except RequestError as error:
            raise UserError(f"benchmarks: a question cannot be asked: {error.message}") from None
        keys.append(key)
        samples.append(make_prompt_sample(request.messages, request.images))
        limits.append(request.max_new_tokens or DEFAULT_NEW_TOKENS)
    return BenchmarkSlices(tuple(names), tuple(samples), tuple(limits), replace(scorer, keys=tuple(keys)))


def _prepare_slices(
    names: Sequence[str], settings: EvaluateConfig, cache: Path, max_pixels: int, environment: Path, python: Path
) -> SliceScorer:
    """Write rows and tasks into a folder whose name is the digest of all that decides the requests."""
    scratch, limited = cache / "scratch", replace(settings, limit=settings.training_rows)
    shutil.rmtree(scratch, ignore_errors=True)
    prepared = {name: prepare(name, scratch, limited, max_pixels) for name in names}
    rows = {
        name: one for name, one in prepared.items() if one is not None
    }  # names are of the registry, so all have rows
    yaml_files = _find_yaml_files(names, environment)
    decides: list[object] = [compute_pins_digest(), settings.max_new_tokens]
    decides += [(name, rows[name].digest, read_task(path)[1]) for name, path in yaml_files.items()]
    digest = hashlib.sha256(json.dumps(decides).encode()).hexdigest()
    folder = cache / digest[:16]
    if not folder.exists():
        scratch.rename(folder)
    shutil.rmtree(scratch, ignore_errors=True)
    rows = {name: replace(one, path=folder / "rows" / one.path.name) for name, one in rows.items()}
    tasks = [
        write_task(name, BENCHMARKS[name], path, rows[name].path, folder / "tasks", has_judge=False)
        for name, path in yaml_files.items()
    ]
    task = HarnessTask(",".join(task.name for task in tasks), folder / "tasks", "", digest)
    return SliceScorer(folder, python, task, rows, settings, ())


def _find_yaml_files(names: Sequence[str], environment: Path) -> dict[str, Path]:
    task_files, pack = list_task_files(environment), find_tasks(TASK_PACK)
    return {name: (pack if BENCHMARKS[name].in_task_pack else task_files)[BENCHMARKS[name].task] for name in names}
