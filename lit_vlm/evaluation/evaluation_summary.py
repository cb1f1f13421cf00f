"""Scores of benchmarks as they are kept and shown: evaluation.json, evaluation.md, and rows beside published ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from lit_vlm.evaluation.benchmarks import BENCHMARKS, PublishedScore, load_published_scores
from lit_vlm.evaluation.harness_environment import HARNESS, VERSION
from lit_vlm.files import read_json, write_json, write_text_atomically

JSON_FILE, MARKDOWN_FILE = "evaluation.json", "evaluation.md"
SHOWN_MODELS = ("VARCO-VISION-14B", "LLaVA-OneVision-7B", "GPT-4o")  # beside the scores on the terminal


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkScore:
    """Score of a model on a benchmark, and all that decides it.

    Attributes:
        name: name of the benchmark here, or of the harness's task.
        task: name of the task in the harness.
        is_tested: the benchmark is in the registry; False: only the harness says how it is scored.
        score: main score on the scale of published tables; None: the harness names no main score.
        metrics: scores as the harness gives them.
        num_samples: rows that were scored.
        num_questions: questions, each of which may have several rows.
        num_available: rows of the files.
        num_published: rows of the published set; None: unknown.
        left_out: reasons of rows that were not scored -> number of them.
        is_circular: see `Benchmark`.
        judge: judge as "model at endpoint"; None: none was asked.
        prompt: the first request, its text parts only.
        task_digest: SHA-256 of the task's files.
        max_new_tokens: maximum tokens of an answer, where it was changed; None: as the task says.
        seconds: time of all; `model_seconds` of it the model had a request, and `judge_seconds` the judge.
        num_asked: requests to the model in this run; the others were answered before.
        notes: sentences about the score.
        identity: digest of everything that decides the score.
    """

    name: str
    task: str
    is_tested: bool
    score: float | None
    metrics: dict[str, float]
    num_samples: int
    num_questions: int
    num_available: int | None
    num_published: int | None
    left_out: dict[str, int]
    is_circular: bool
    judge: str | None
    prompt: str
    task_digest: str
    max_new_tokens: int | None
    seconds: float
    model_seconds: float
    num_asked: int
    judge_seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    identity: str = ""

    @property
    def harness_seconds(self) -> float:
        """Time in which the harness alone worked: its start, its reading of rows and its scoring."""
        return self.seconds - self.model_seconds - self.judge_seconds


def read_scores(folder: Path) -> dict[str, BenchmarkScore]:
    """Read the scores of a folder by benchmark; {} if there are none.

    Raises:
        CorruptFileError: the file is damaged.
    """
    remedy = "Remove it: the scores are computed again from the answers, which are kept."
    data = read_json(folder / JSON_FILE, remedy) or {}
    names = {one.name for one in fields(BenchmarkScore)}
    rows = data.get("benchmarks", {})
    return {name: BenchmarkScore(**row) for name, row in rows.items() if isinstance(row, dict) and names == row.keys()}


def write_scores(folder: Path, model: Mapping[str, Any], scores: Mapping[str, BenchmarkScore]) -> None:
    """Write evaluation.json and evaluation.md."""
    published = {name: [asdict(row) for row in load_published_scores().get(name, ())] for name in scores}
    data = {
        "model": dict(model),
        "harness": {"name": HARNESS, "version": VERSION},
        "benchmarks": {name: asdict(score) for name, score in scores.items()},
        "published": published,
    }
    write_json(folder / JSON_FILE, data, indent=1)
    write_text_atomically(folder / MARKDOWN_FILE, format_markdown(model, list(scores.values())))


def format_score(score: BenchmarkScore) -> str:
    """Format a score with its number of decimals: one for counts of hits, else two."""
    if score.score is None:
        return ", ".join(f"{name} {value:.4g}" for name, value in sorted(score.metrics.items())) or "none"
    return f"{score.score:.0f}" if score.name == "ocrbench" else f"{score.score:.2f}"


def format_title(score: BenchmarkScore) -> str:
    """Format the name of a benchmark for tables."""
    return BENCHMARKS[score.name].title if score.name in BENCHMARKS else score.name


def format_rows(score: BenchmarkScore) -> str:
    """Format the number of scored rows: `240`, `240 of 4,329`."""
    total = score.num_published or score.num_available
    same = total is None or total == score.num_samples
    return f"{score.num_samples:,}" if same else f"{score.num_samples:,} of {total:,}"


def list_remarks(score: BenchmarkScore) -> Iterator[str]:
    """Yield sentences that a reader of the score must know."""
    if not score.is_tested:
        yield "The task is not tested here."
    if score.is_circular:
        yield "A question counts if all rotations of its options are answered correctly (circular)."
    yield f"Judge: {score.judge}." if score.judge else "No judge."
    if score.max_new_tokens is not None:
        yield f"Answers have at most {score.max_new_tokens} tokens (evaluate.max_new_tokens)."
    for reason, number in score.left_out.items():
        yield f"{number:,} left out: {reason}."
    if score.num_published and score.num_available and score.num_available != score.num_published:
        yield f"The files have {score.num_available:,} rows, the published set has {score.num_published:,}."
    yield from score.notes


def format_markdown(model: Mapping[str, Any], scores: Sequence[BenchmarkScore]) -> str:
    """Format the page of an evaluation."""
    lines = [
        f"# Benchmarks of {model.get('name')}",
        "",
        f"Scored by {HARNESS} {VERSION}, in an environment of its own.",
        "",
    ]
    lines += ["| benchmark | score | rows | model | harness |", "|---|---:|---:|---:|---:|"]
    for score in scores:
        times = f"{score.model_seconds:.1f} s | {score.harness_seconds:.1f} s"
        lines.append(f"| {format_title(score)} | {format_score(score)} | {format_rows(score)} | {times} |")
    for score in scores:
        lines += ["", f"## {format_title(score)}", "", f"Task `{score.task}`, SHA-256 `{score.task_digest[:16]}`.", ""]
        lines += [f"- {remark}" for remark in list_remarks(score)]
        if score.prompt:
            lines += ["", "First prompt:", "", "```text", score.prompt.replace("```", "'''"), "```"]
        if rows := load_published_scores().get(score.name):
            lines += ["", *_format_published(score, rows)]
    return "\n".join(lines) + "\n"


def _format_published(score: BenchmarkScore, rows: Sequence[PublishedScore]) -> Iterator[str]:
    yield "| model | score | source |"
    yield "|---|---:|---|"
    yield f"| **this model** | **{format_score(score)}** | {HARNESS} {VERSION} |"
    for row in rows:
        note = f" ({row.note})" if row.note else ""
        yield f"| {row.model} | {row.score:g} | {row.source}{note} |"


def get_published(name: str, model: str) -> str:
    """Return the first published score of a model as text; "" if there is none."""
    rows = [row for row in load_published_scores().get(name, ()) if row.model == model]
    return f"{rows[0].score:g}" if rows else ""
