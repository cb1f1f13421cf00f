"""Runs of lmms-eval in its own environment: the task of a benchmark on local rows, its process, and its results."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lit_vlm.evaluation.benchmarks import Benchmark
from lit_vlm.evaluation.harness_environment import HARNESS, VERSION
from lit_vlm.files import read_json_lines, read_json_or_none, write_text_atomically
from lit_vlm.redaction import redact_text
from lit_vlm.types import UserError

FAILED = "[LMMS_EVAL_REQUEST_FAILED"  # beginning of the "answer" that the harness writes for a request without one
TASK_PREFIX = "lit_vlm_"  # of our variants of the harness's tasks
POLL_SECONDS = 0.2
END_SECONDS = 10.0  # within which the harness ends when it is told to
MAX_SHOWN_LINES = 8
_NO_LETTER = "GPT output includes 0 / >1 letter"
JUDGE_TRIES = 3  # of the harness's MMBench tasks
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_RESULTS = re.compile(r"\d{8}_\d{6}_results\.json")  # some tasks write files of a similar name themselves
_INCLUDE = re.compile(r"^include\s*:\s*['\"]?([^'\"\n#]+?)['\"]?\s*$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class HarnessTask:
    """Task for the harness.

    Attributes:
        name: for --tasks.
        folder: for --include_path; None: a task of the harness by its own name.
        text: text of its YAML files, ours first.
        digest: SHA-256 of these files and of the Python and JSON files beside them, where prompt and rule are.
    """

    name: str
    folder: Path | None
    text: str
    digest: str


@dataclass(frozen=True, slots=True)
class HarnessResult:
    """Results of one task.

    Attributes:
        metrics: metric -> value; the harness's filter is left out.
        samples: one dict for each row, as the harness logged it.
    """

    metrics: dict[str, float]
    samples: list[dict[str, Any]] = field(repr=False)

    @property
    def failed(self) -> list[int]:
        """Positions of the rows whose request had no answer."""
        return [int(row["doc_id"]) for row in self.samples if str(row.get("filtered_resps", "")).startswith(FAILED)]


def write_task(
    name: str, benchmark: Benchmark, yaml_file: Path, data: Path, folder: Path, *, has_judge: bool
) -> HarnessTask:
    """Write a task that is the harness's own, but reads a local parquet file.

    Args:
        yaml_file: the harness's file of the task.
        data: the parquet file.
        folder: folder to write the task into.
        has_judge: a judge can be asked.
    """
    task = f"{TASK_PREFIX}{name}"
    text = (
        f"include: {json.dumps(str(yaml_file))}\n"
        f"task: {task}\n"
        "dataset_path: parquet\n"
        "dataset_name: null\n"
        "dataset_kwargs:\n"
        "  data_files:\n"
        f"    {benchmark.split}: {json.dumps(str(data))}\n"
        f"test_split: {benchmark.split}\n"
    )
    if benchmark.rule_overrides and not has_judge:
        text += benchmark.rule_overrides
    folder.mkdir(parents=True, exist_ok=True)
    write_text_atomically(folder / f"{task}.yaml", text)
    overrides = benchmark.rule_overrides if not has_judge else ""
    texts, digest = read_task(yaml_file, overrides)
    return HarnessTask(task, folder, texts, digest)


def read_task(yaml_file: Path, overrides: str = "") -> tuple[str, str]:
    """Read the text of a task, with the files that it includes, and its digest.

    The digest covers the Python and JSON files beside these files and one folder up, where the task pack has shared scores.
    """
    texts = [overrides] if overrides else []
    hasher = hashlib.sha256(overrides.encode())
    pending, seen = [yaml_file], set[Path]()
    while pending:
        path = pending.pop(0)
        if path in seen or not path.is_file():
            continue
        seen.add(path)
        text = path.read_text(encoding="utf-8", errors="replace")
        texts.append(text)
        pending += [path.parent / include for include in _INCLUDE.findall(text)]
    folders = {folder for file in seen for folder in (file.parent, file.parent.parent)}
    beside = {path for folder in folders for suffix in ("*.py", "*.json") for path in folder.glob(suffix)}
    for path in sorted({*seen, *beside}, key=lambda p: (p.parent.name, p.name)):
        hasher.update(f"\n{path.parent.name}/{path.name}\n".encode() + path.read_bytes())
    return "\n".join(texts), hasher.hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class HarnessRequest:
    """One run of the harness.

    Attributes:
        python: Python of its environment.
        task: its task.
        base_url: endpoint of the model.
        output: folder for its results and its log.
        environment: environment variables.
        num_concurrent: requests at the same time.
        max_new_tokens: maximum tokens of an answer; None: as the task says.
        limit: number of rows, for a task without local rows.
    """

    python: Path
    task: HarnessTask
    base_url: str
    output: Path
    environment: dict[str, str]
    num_concurrent: int
    max_new_tokens: int | None = None
    limit: int | None = None

    @property
    def command(self) -> list[str]:
        """The command line."""
        # The recorder retries nothing and answers at once, so a second try only covers a lost connection
        model = f"model_version=model,base_url={self.base_url},num_concurrent={self.num_concurrent},max_retries=2"
        command = [str(self.python), "-m", "lmms_eval", "--model", "openai", "--model_args", model, "--batch_size", "1"]
        command += ["--tasks", self.task.name, "--output_path", str(self.output), "--log_samples", "--timezone", "UTC"]
        if self.task.folder is not None:
            command += ["--include_path", str(self.task.folder)]
        if self.max_new_tokens is not None:
            command += ["--gen_kwargs", f"max_new_tokens={self.max_new_tokens}"]
        if self.limit is not None:
            command += ["--limit", str(self.limit)]
        return command


def run_harness(request: HarnessRequest, on_wait: Callable[[], None]) -> None:
    """Run the harness until it ends. Its output goes to `harness.log` in the output folder.

    Args:
        on_wait: called several times a second; an error that it raises ends the harness.

    Raises:
        UserError: the harness failed; with the end of its output.
    """
    request.output.mkdir(parents=True, exist_ok=True)
    log = request.output / "harness.log"
    with log.open("w", encoding="utf-8") as stream, _start_process(request, stream) as process:
        while process.poll() is None:
            on_wait()
            time.sleep(POLL_SECONDS)
    if process.returncode != 0:
        raise UserError(f"{HARNESS} {VERSION} failed on {request.task.name}:{_format_log(log)}")


@contextmanager
def _start_process(request: HarnessRequest, stream: Any):  # type: ignore[no-untyped-def]
    """Start the harness in a process group of its own; it is ended with the block."""
    process = subprocess.Popen(
        request.command,
        cwd=request.output,
        env=request.environment,
        stdin=subprocess.DEVNULL,
        stdout=stream,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # Ctrl-C is for this process, which ends the harness itself
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def read_results(output: Path, task: str) -> list[tuple[str, HarnessResult]]:
    """Read the results of a run. Returns them by the harness's task; a group has several.

    Raises:
        UserError: there are none.
    """
    paths = sorted(path for path in output.glob("**/*_results.json") if _RESULTS.fullmatch(path.name))
    results = read_json_or_none(paths[-1]) if paths else None
    found = []
    for name, values in (results or {}).get("results", {}).items():
        metrics = _read_metrics(values)
        samples = sorted(output.glob(f"**/*_samples_{name}.jsonl"))
        if metrics and samples:
            rows = sorted(read_json_lines(samples[-1]), key=lambda row: int(row["doc_id"]))
            found.append((name, HarnessResult(metrics, rows)))
    if not found:  # it ends with status 0 after an error, too
        raise UserError(f"{HARNESS} {VERSION} gave no score for {task}:{_format_log(output / 'harness.log')}")
    return found


def _format_log(path: Path) -> str:
    """Format the end of the harness's output for a message."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    lines = [line for line in _COLOUR.sub("", text).splitlines() if line.strip()]
    shown = "\n".join(f"  {line}" for line in lines[-MAX_SHOWN_LINES:])
    return redact_text(f"\n{shown}\nAll of it is in {path}.")


def _read_metrics(values: dict[str, Any]) -> dict[str, float]:
    """Read `metric,filter: value` pairs without their errors of estimation."""
    metrics = {}
    for key, value in values.items():
        metric, separator, _ = key.partition(",")
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if separator and is_number and not metric.endswith(("_stderr", "_stderr_clt", "_stderr_clustered")):
            metrics[metric] = float(value)
    return metrics


def list_unreadable_reviews(samples: Sequence[dict[str, Any]], metric: str) -> list[int]:
    """List the rows whose review by the judge holds no two scores, of a task that rates two answers (LLaVA-W)."""
    found = []
    for row in samples:
        value = row.get(metric)
        scores = value.get("scores") if isinstance(value, dict) else None
        if isinstance(scores, list) and any(score == -1 for score in scores):
            found.append(int(row["doc_id"]))
    return found


def count_random_letters(log: Path) -> int:
    """Count the answers for which the harness drew a letter at random, as the judge's three replies named none (MMBench)."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    return text.count(_NO_LETTER) // JUDGE_TRIES


def compute_relative_score(samples: Sequence[dict[str, Any]], metric: str) -> float | None:
    """Compute 100 x mean rating of the answers / mean rating of the references, without unreadable reviews; None without any."""
    pairs = [row[metric]["scores"] for row in samples if isinstance(row.get(metric), dict)]
    pairs = [pair for pair in pairs if isinstance(pair, list) and len(pair) == 2 and min(pair) >= 0]
    reference = sum(pair[0] for pair in pairs)
    return 100 * sum(pair[1] for pair in pairs) / reference if reference else None
