"""Exam: one fixed set of synthetic items that every stage answers, so that stages can be compared in pairs.

It has every built-in kind of sample, easy and hard, in both languages. A cell is a kind, a language and a difficulty. The seed
is above the largest setting `seed`, so no run trains on an item or holds it out.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from lit_vlm.data.markup import parse_mentions
from lit_vlm.data.synthetic import GENERATOR_VERSION, TASKS, BuiltinSource, Picture
from lit_vlm.evaluation.metrics import compute_score
from lit_vlm.files import append_line, handle_write_errors, read_json_lines
from lit_vlm.types import SPECIAL_TOKENS, ControlToken, Language, Sample, SampleKind, UserError

EXAM_VERSION = 1  # increase it with every change of the items, of their scores, or of the way they are asked
EXAM_SEED = 2**32 + 16  # settings end at 2**32 - 1
ITEMS_PER_CELL = 150  # 300 for each kind and language: easy and hard
# Items of a cell are distinct. Some 130 easy questions without an image are not used for training.
CELL_SIZES = {(SampleKind.text, False): 100, (SampleKind.text, True): 200}
EXTRA_TOKENS = 16  # tokens beyond the reference answer after which an answer is cut
MAX_EASY_NUMBER = 20  # of easy sums without an image
LANGUAGES = (Language.ko, Language.en)
KINDS = tuple(
    TASKS
)  # digits are left out: there are 297 held-out ones. Preference pairs ask the questions of other kinds
INSTRUCTIONS = ("gro", "ocr", "plain")  # task token of the question
ALL_CELL = "mean"  # of all cells but those of obedience
EXAM_FILE = "exam.jsonl"


@dataclass(frozen=True)
class ExamItem:
    """One question of the exam. `number` counts from 0 in its cell."""

    sample: Sample
    number: int
    hard: bool

    @property
    def kind(self) -> SampleKind:
        """Kind of the question."""
        return self.sample.kind

    @property
    def instruction(self) -> str:
        """Task token of the question: "gro", "ocr", or "plain" without one."""
        tokens = [piece.token for piece in self.sample.messages[-2].content if isinstance(piece, ControlToken)]
        return next((name for name in INSTRUCTIONS if f"<{name}>" in tokens), "plain")

    @cached_property
    def content(self) -> str:
        """Hash of question, answer and images, 16 hex digits. Equal ids with other contents are other items."""
        texts = [message.text for message in self.sample.messages]
        images = [image.content().hex() for image in self.sample.images if isinstance(image, Picture)]
        return hashlib.blake2b(json.dumps([texts, images]).encode(), digest_size=8).hexdigest()


def make_items(items_per_cell: int | None = None) -> tuple[ExamItem, ...]:
    """Make the first items of each cell, cell by cell; None: all. A smaller number gives a part of the same exam."""
    items: list[ExamItem] = []
    for kind in KINDS:
        for language in LANGUAGES:
            for cell in _make_cells(kind, language):
                items += cell[:items_per_cell]
    return tuple(items)


def find_item(row: dict[str, Any]) -> ExamItem | None:
    """Find the item of a row of answers; None if this version makes another item in its place."""
    cells = _make_cells(SampleKind(row["kind"]), Language(row["language"]))
    cell = cells[1 if row["hard"] else 0]
    item = cell[row["number"]] if row["number"] < len(cell) else None
    return item if item is not None and item.content == row["content"] else None


def get_cell_size(kind: SampleKind, *, hard: bool) -> int:
    """Return the number of items in the cells of a kind and a difficulty."""
    return CELL_SIZES.get((kind, hard), ITEMS_PER_CELL)


@lru_cache(maxsize=len(KINDS) * len(LANGUAGES))
def _make_cells(kind: SampleKind, language: Language) -> tuple[list[ExamItem], list[ExamItem]]:
    """Make the items of a kind and a language, easy and hard. A question that came before is left out."""
    seen, cells = set[str](), ([], [])  # type: ignore[var-annotated]
    for cell, hard in zip(cells, (False, True), strict=True):
        options: dict[str, Any] = {"hard": hard, "seed": EXAM_SEED, "held_out": True}
        source = BuiltinSource("exam", kind, language=language, num_samples=10_000, **options)
        for number in range(len(source)):
            record = source[number]
            assert isinstance(record, Sample)  # KINDS has no pairs
            item = ExamItem(record, len(cell), hard)
            if item.content not in seen and not (hard and _is_easy_sum(record)):
                seen.add(item.content)
                cell.append(item)
            if len(cell) == get_cell_size(kind, hard=hard):
                break
    return cells


def _is_easy_sum(sample: Sample) -> bool:
    """Return True for a sum without an image that also belongs to the easy ones, of which other parts are trained on."""
    numbers = [int(number) for number in re.findall(r"\d+", sample.messages[0].text)]
    return sample.kind is SampleKind.text and bool(numbers) and max(numbers) <= MAX_EASY_NUMBER


def compute_obedience(instruction: str, answer: str) -> float:
    """Compute whether an answer has the form that the task token asks for, 0 or 1.

    `gro`: at least one object with a box. `ocr`: at least one text line with a box. `plain`: no box and no control token.
    """
    tags = {tag for tag, _, _ in parse_mentions(answer)}
    if instruction == "plain":
        return float(not tags and not any(token in answer for token in SPECIAL_TOKENS))
    return float({"gro": "obj", "ocr": "char"}[instruction] in tags)


def score_answer(item: ExamItem, answer: str) -> dict[str, Any]:
    """Score an answer with the main metric of its kind, and its obedience. Returns its row in the file of answers."""
    reference = item.sample.messages[-1].text.strip()
    return {
        "id": item.sample.id,
        "content": item.content,
        "kind": str(item.kind),
        "language": str(item.sample.language),
        "hard": item.hard,
        "number": item.number,
        "instruction": item.instruction,
        "reference": reference,
        "answer": answer,
        "score": compute_score(item.kind, answer, reference),
        "obeys": compute_obedience(item.instruction, answer),
    }


def get_identity() -> dict[str, Any]:
    """Return the identity of the exam: answers to exams of different identity are not compared."""
    return {
        "version": EXAM_VERSION,
        "seed": EXAM_SEED,
        "generator_version": GENERATOR_VERSION,
        "extra_tokens": EXTRA_TOKENS,
    }


@dataclass(frozen=True)
class ExamAnswers:
    """Scored answers of one model.

    Attributes:
        path: file of the answers.
        identity: see `get_identity`.
        weights: digest of the model's weights, or its hub id.
        rows: see `score_answer`.
    """

    path: Path
    identity: dict[str, Any]
    weights: str
    rows: list[dict[str, Any]] = field(repr=False)

    @property
    def contents(self) -> dict[str, str]:
        """Hash of each item by its id."""
        return {row["id"]: row["content"] for row in self.rows}

    @property
    def items_per_cell(self) -> int:
        """Number of items that every cell has; a cell with all its items does not lower it."""
        counts = Counter((row["kind"], row["language"], row["hard"]) for row in self.rows)
        cells = [(kind, language, hard) for kind in KINDS for language in LANGUAGES for hard in (False, True)]
        sizes = {cell: get_cell_size(cell[0], hard=cell[2]) for cell in cells}
        return min((counts[cell] for cell in cells if counts[cell] < sizes[cell]), default=max(sizes.values()))

    def take(self, items_per_cell: int | None) -> ExamAnswers:
        """Take the first items of each cell; None: all."""
        if items_per_cell is None:
            return self
        rows = [row for row in self.rows if row["number"] < items_per_cell]
        return ExamAnswers(self.path, self.identity, self.weights, rows)

    def collect_cells(self) -> dict[str, list[float]]:
        """Collect the scores of each cell in the order of the items.

        Cells are "<kind>_<language>_<easy|hard>", "obeys_<gro|ocr|plain>_<language>_<easy|hard>", and "mean" for all items.
        """
        cells: dict[str, list[float]] = {}
        for row in sorted(self.rows, key=_get_position):
            cells.setdefault(f"{row['kind']}_{_format_group(row)}", []).append(row["score"])
        for name in INSTRUCTIONS:
            for row in sorted(self.rows, key=_get_position):
                if row["instruction"] == name:
                    cells.setdefault(f"obeys_{name}_{_format_group(row)}", []).append(row["obeys"])
        return cells | {ALL_CELL: [row["score"] for row in sorted(self.rows, key=_get_position)]}

    def compute_means(self) -> dict[str, float]:
        """Compute the mean scores under their logged names; see `list_exam_metrics`."""
        groups: dict[str, list[float]] = defaultdict(list)
        for row in self.rows:
            groups[f"exam/{row['kind']}_{row['language']}"].append(row["score"])
            groups[f"exam/obeys_{row['instruction']}_{row['language']}"].append(row["obeys"])
            groups[f"exam/{ALL_CELL}"].append(row["score"])
        return {name: sum(groups[name]) / len(groups[name]) for name in list_exam_metrics() if name in groups}


def _get_position(row: dict[str, Any]) -> tuple[Any, ...]:
    kinds = [str(kind) for kind in KINDS]
    return kinds.index(row["kind"]), row["language"] == "en", row["hard"], row["number"]


def _format_group(row: dict[str, Any]) -> str:
    return f"{row['language']}_{'hard' if row['hard'] else 'easy'}"


def list_exam_metrics() -> list[str]:
    """List the names under which the exam's scores are logged: exam/mean, exam/grounding_ko, exam/obeys_gro_ko, ..."""
    groups = [*map(str, KINDS), *(f"obeys_{name}" for name in INSTRUCTIONS)]
    return [f"exam/{ALL_CELL}", *(f"exam/{group}_{language}" for group in groups for language in LANGUAGES)]


# ---- the file of answers


def read_answers(path: Path) -> ExamAnswers | None:
    """Read a file of answers; None if it is missing or not one. Lines that a killed process cut off are skipped."""
    header, *rows = read_json_lines(path) or [{}]
    identity = header.get("exam")
    if not isinstance(identity, dict):
        return None
    by_id = {row["id"]: row for row in rows if _is_row(row)}
    return ExamAnswers(path, identity, str(header.get("weights", "")), list(by_id.values()))


def _is_row(row: dict[str, Any]) -> bool:
    kinds, instructions = set(map(str, KINDS)), set(INSTRUCTIONS)
    return (
        isinstance(row.get("id"), str)
        and row.get("kind") in kinds
        and row.get("language") in ("ko", "en")
        and row.get("instruction") in instructions
        and all(isinstance(row.get(name), int | float) for name in ("hard", "number", "score", "obeys"))
    )


def get_answers_path(model: str, run_dir: Path) -> Path:
    """Return the file of a model's answers: in its run folder, or below run_dir/exam for a model without one.

    `hf-step-N`, the model of a checkpoint, has a folder of its own in the run folder.
    """
    folder = Path(model)
    if folder.name.startswith("hf") and (folder.parent / "manifest.json").is_file():
        return folder.parent / EXAM_FILE if folder.name == "hf" else folder.parent / "exam" / folder.name / EXAM_FILE
    name = folder.parent.name if folder.name == "hf" else folder.name
    return run_dir / "exam" / (name if folder.is_dir() else model) / EXAM_FILE


class ExamLog:
    """File of answers of one model, which an interrupted exam resumes.

    Args:
        path: the file.
        weights: digest of the model's weights, or its hub id.
        model: folder or hub id, for readers of the file.
    """

    def __init__(self, path: Path, weights: str, model: str) -> None:
        self.path, self.weights, self.model = path, weights, model

    def open(self, *, overwrite: bool) -> ExamAnswers:
        """Open the file and return the answers in it. A file of other weights or of another exam is kept under another name.

        Args:
            overwrite: replace the answers, also those of this model.

        Raises:
            UserError: the file is not one of answers, or cannot be written.
        """
        known = read_answers(self.path)
        if known is None and self.path.exists() and self.path.read_bytes().strip():
            raise UserError(f"{self.path} was not written by task=exam. Move it away, and start the exam again.")
        matches = known is not None and (known.weights, known.identity) == (self.weights, get_identity())
        if known is not None and matches and not overwrite:
            return known
        with handle_write_errors(self.path.parent, "The exam's answers", "run_dir"):
            if known is not None and not matches:
                self.path.rename(self.path.with_name(f"exam-{_shorten(known.weights)}.jsonl"))
            self.path.unlink(missing_ok=True)
            header = {"exam": get_identity(), "weights": self.weights, "model": self.model}
            append_line(self.path, _encode(header))
        return ExamAnswers(self.path, get_identity(), self.weights, [])

    def append(self, rows: Sequence[dict[str, Any]]) -> None:
        """Append rows; they are on the disk on return."""
        with handle_write_errors(self.path.parent, "The exam's answers", "run_dir"):
            append_line(self.path, b"\n".join(map(_encode, rows)))


def find_missing_items(answers: ExamAnswers, items: Iterable[ExamItem]) -> Iterator[ExamItem]:
    """Find the items that have no answer yet."""
    contents = answers.contents
    return (item for item in items if contents.get(item.sample.id) != item.content)


def _encode(row: dict[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode("utf-8", "replace")


def _shorten(digest: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in digest)[:12] or "unknown"
