"""Registry of the benchmarks that task=evaluate runs and that are tested: their rows, their task in lmms-eval, their scores.

The module imports no other layer and no torch, so the checks of settings can read the names. Each number of rows and each licence
is that of the data set's card; None where it says nothing.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cache
from importlib.resources import files
from typing import Any

CHOICES = frozenset("ABCD")
YES_NO = frozenset({"yes", "no"})
NON_COMMERCIAL = "CC BY-NC 4.0"
CIRCULAR_STEP = 1_000_000  # a rotation of the options adds a multiple of it to the index of the question


class ColumnKind(StrEnum):
    """Kind of the values of a column."""

    text = "text"
    optional_text = "optional_text"  # may be empty
    integer = "integer"
    texts = "texts"  # one text or several
    image = "image"
    images = "images"  # one image or several


class JudgeUse(StrEnum):
    """Use of a judge by the scoring of a benchmark."""

    none = "none"
    optional = "optional"  # it reads answers that the rules cannot; without one, such answers are wrong
    needed = "needed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """A benchmark.

    Attributes:
        title: its name in tables.
        task: its task in the harness.
        hub: data set on the Hugging Face hub; None: it is not there, and `obtain` says where it is.
        hub_config: configuration of the data set there.
        split: its split.
        obtain: where the data comes from, if it is not on the hub.
        licence: of the data; None: the card names none.
        columns: columns that the task reads, with the kind of their values.
        other_names: other names of columns, such as those of VLMEvalKit's TSV files.
        num_rows: rows of the published file; None: unverified.
        only_rows: (column, value) of the rows that are used; None: all.
        constants: column -> value that every row gets, where the task reads only this one.
        answers: possible values of the column `answer`; None: any.
        has_inline_options: the task takes the options from the question, and reads no columns A to D.
        max_new_tokens: of an answer, the task's own value; 1,024 is the harness's default.
        metric: key of the main score in the harness's results.
        scale: factor from the harness's score to the one of published tables.
        other_metrics: further keys to keep.
        is_circular: a question counts only if all rotations of its options are answered correctly.
        judge: whether the scoring asks a judge.
        judge_url_is_full: the task posts to OPENAI_API_URL itself; False: it is a base address.
        rule_overrides: keys of the task that make it score without a judge.
        in_task_pack: the task is in lit_vlm/evaluation/task_pack, the harness has none.
        note: sentence about the rule, shown beside the score.
    """

    title: str
    task: str
    split: str
    columns: Mapping[str, ColumnKind]
    metric: str
    hub: str | None = None
    hub_config: str | None = None
    obtain: str = ""
    licence: str | None = None
    other_names: Mapping[str, str] = field(default_factory=dict)
    num_rows: int | None = None
    only_rows: tuple[str, str] | None = None
    constants: Mapping[str, str] = field(default_factory=dict)
    answers: frozenset[str] | None = None
    has_inline_options: bool = False
    max_new_tokens: int = 1024
    scale: float = 100.0
    other_metrics: tuple[str, ...] = ()
    is_circular: bool = False
    judge: JudgeUse = JudgeUse.none
    judge_url_is_full: bool = False
    rule_overrides: str = ""
    in_task_pack: bool = False
    note: str = ""

    @property
    def how_to_get(self) -> str:
        """Sentence that says where the data comes from, with its licence."""
        rows = f", {self.num_rows:,} rows" if self.num_rows else ""
        licence = self.licence or "its card names no licence"
        place = f"https://huggingface.co/datasets/{self.hub}" if self.hub else self.obtain
        return f"{place} (split {self.split}{rows}; {licence})"


_TEXT, _IMAGE = ColumnKind.text, ColumnKind.image
_LETTERED = {"choice_a": "A", "choice_b": "B", "choice_c": "C", "choice_d": "D"}
_FIRST_LETTER = "Only the first character of an answer counts, so '정답은 A' and '(A)' are wrong."
_MMBENCH_COLUMNS = {
    "index": ColumnKind.integer,
    "question": _TEXT,
    "hint": ColumnKind.optional_text,
    **{letter: ColumnKind.optional_text for letter in "ABCD"},
    "answer": _TEXT,
    "category": _TEXT,
    "source": ColumnKind.optional_text,
    "split": ColumnKind.optional_text,
    "image": _IMAGE,
}
# The harness's Korean task always asks a judge for answers that its rules cannot read, and draws a letter at random where
# there is none. Its English task has a variant without a judge, whose function reads the same columns.
_MMBENCH_RULES = """metric_list:
  - metric: gpt_eval_score
    aggregation: !function lmms_eval.tasks.mmbench.en_utils.mmbench_aggregate_dev_results_static
    higher_is_better: true
"""
_MMSTAR_COLUMNS = {
    "index": ColumnKind.integer,
    "question": _TEXT,
    "answer": _TEXT,
    "category": _TEXT,
    "l2_category": _TEXT,
    "image": _IMAGE,
}
_MMSTAR_METRICS = (
    *("coarse perception", "fine-grained perception", "instance reasoning", "logical reasoning"),
    *("science & technology", "math"),
)
_ICDAR = "https://rrc.cvc.uab.es, after registration, through lit_vlm/evaluation/task_pack/ocr_popeval/prepare_icdar.py"
_POPEVAL: dict[str, Any] = {
    "split": "test",
    "columns": {"ground_truth": _TEXT, "image": _IMAGE},
    "metric": "popeval_h",
    "scale": 1.0,
    "other_metrics": ("popeval_precision", "popeval_recall"),
    "in_task_pack": True,
    "note": "The score is PopEval's H, in percent of characters.",
}

BENCHMARKS: Mapping[str, Benchmark] = {
    "k_dtcbench": Benchmark(
        title="K-DTCBench",
        task="dtcbench",
        hub="NCSOFT/K-DTCBench",
        split="test",
        licence=NON_COMMERCIAL,
        columns={
            "index": ColumnKind.integer,
            "question": _TEXT,
            **dict.fromkeys(_LETTERED, _TEXT),
            "answer": _TEXT,
            "image": _IMAGE,
        },
        other_names=_LETTERED,
        num_rows=240,
        answers=CHOICES,
        metric="dtcbench_acc",
        note=_FIRST_LETTER,
    ),
    "k_mmbench": Benchmark(
        title="K-MMBench",
        task="mmbench_ko_dev",
        hub="NCSOFT/K-MMBench",
        split="dev",
        licence=NON_COMMERCIAL,
        columns=_MMBENCH_COLUMNS | {"l2-category": _TEXT},
        num_rows=4329,
        answers=CHOICES,
        metric="gpt_eval_score",
        scale=1.0,
        is_circular=True,
        judge=JudgeUse.optional,
        judge_url_is_full=True,
        rule_overrides=_MMBENCH_RULES,
    ),
    "k_seed": Benchmark(
        title="K-SEED",
        task="seedbench_ko",
        hub="NCSOFT/K-SEED",
        split="test",
        licence=NON_COMMERCIAL,
        columns={
            "question_id": _TEXT,
            "question": _TEXT,
            **dict.fromkeys(_LETTERED, _TEXT),
            "answer": _TEXT,
            "image": _IMAGE,
        },
        other_names=_LETTERED | {"question_id": "index"},
        constants={"data_type": "image"},  # the task adds up no other type, and this set is of images only
        answers=CHOICES,
        metric="seed_image",
        note=_FIRST_LETTER,
    ),
    "k_mmstar": Benchmark(
        title="K-MMStar",
        task="mmstar_ko",
        hub="NCSOFT/K-MMStar",
        split="val",
        licence=NON_COMMERCIAL,
        columns=_MMSTAR_COLUMNS,
        num_rows=1500,
        answers=CHOICES,
        has_inline_options=True,
        metric="average",
        other_metrics=_MMSTAR_METRICS,
        note="The score is the mean of the 18 categories' means.",
    ),
    "k_llava_w": Benchmark(
        title="K-LLaVA-W",
        task="llava_in_the_wild_ko",
        hub="NCSOFT/K-LLaVA-W",
        split="test",
        licence=NON_COMMERCIAL,
        columns={"question": _TEXT, "caption": _TEXT, "gpt_answer": _TEXT, "category": _TEXT, "image": _IMAGE},
        other_names={"gpt_answer": "gpt4_ans"},
        num_rows=60,
        max_new_tokens=4096,
        metric="gpt_eval_llava_all",
        scale=1.0,
        other_metrics=("gpt_eval_llava_conv", "gpt_eval_llava_detail", "gpt_eval_llava_complex"),
        judge=JudgeUse.needed,
        note="The score is relative to GPT-4's answers; the harness counts a review that it cannot read as -1 for both.",
    ),
    "mmbench": Benchmark(
        title="MMBench",
        task="mmbench_en_dev",
        hub="lmms-lab-encoder/MMBench",
        hub_config="en",
        split="dev",
        columns=_MMBENCH_COLUMNS | {"L2-category": _TEXT},
        other_names={"L2-category": "l2-category"},
        num_rows=4329,
        answers=CHOICES,
        metric="gpt_eval_score",
        scale=1.0,
        is_circular=True,
        judge=JudgeUse.optional,
        judge_url_is_full=True,
        rule_overrides=_MMBENCH_RULES,
        note="Published rows are of MMBench v1.1.",
    ),
    "seed_image": Benchmark(
        title="SEED-Bench (image)",
        task="seedbench",
        hub="lmms-lab-encoder/SEED-Bench",
        split="test",
        columns={
            "question_id": _TEXT,
            "question": _TEXT,
            **dict.fromkeys(_LETTERED, _TEXT),
            "answer": _TEXT,
            "data_type": _TEXT,
            "image": ColumnKind.images,
        },
        other_names=_LETTERED | {"question_id": "index"},
        only_rows=("data_type", "image"),
        answers=CHOICES,
        metric="seed_image",
        note="Only the first character of an answer counts.",
    ),
    "mmstar": Benchmark(
        title="MMStar",
        task="mmstar",
        hub="Lin-Chen/MMStar",
        split="val",
        columns=_MMSTAR_COLUMNS,
        num_rows=1500,
        answers=CHOICES,
        has_inline_options=True,
        metric="average",
        other_metrics=_MMSTAR_METRICS,
        note="The score is the mean of the 18 categories' means.",
    ),
    "ocrbench": Benchmark(
        title="OCRBench",
        task="ocrbench",
        hub="echo840/OCRBench",
        split="test",
        columns={
            "dataset": _TEXT,
            "question": _TEXT,
            "question_type": _TEXT,
            "answer": ColumnKind.texts,
            "image": _IMAGE,
        },
        num_rows=1000,
        max_new_tokens=128,
        metric="ocrbench_accuracy",
        scale=1000.0,
        note="The score is the number of hits, of 1,000 questions.",
    ),
    "pope": Benchmark(
        title="POPE",
        task="pope",
        hub="lmms-lab-encoder/POPE",
        split="test",
        columns={
            "question_id": _TEXT,
            "question": _TEXT,
            "answer": _TEXT,
            "category": ColumnKind.optional_text,
            "image": _IMAGE,
        },
        other_names={"question_id": "index"},
        num_rows=9000,
        answers=YES_NO,
        max_new_tokens=128,
        metric="pope_f1_score",
        other_metrics=("pope_accuracy", "pope_precision", "pope_recall"),
        note="The score is F1 of 'yes'; an answer other than 'yes' and 'no', also 'Yes.', is wrong.",
    ),
    "kreta": Benchmark(
        title="KRETA",
        task="kreta",
        hub="tabtoyou/KRETA",
        split="test",
        columns={
            "question": _TEXT,
            **{letter: ColumnKind.optional_text for letter in "ABCD"},
            "answer": _TEXT,
            "topic_difficulty": ColumnKind.optional_text,
            "image": _IMAGE,
        },
        num_rows=2577,
        answers=CHOICES,
        metric="kreta_acc",
        scale=1.0,
        other_metrics=("kreta_acc_guess", "kreta_read_letter", "kreta_unread"),
        in_task_pack=True,
        note="The published rule guesses where it reads no letter; here such an answer is wrong.",
    ),
    "koffvqa": Benchmark(
        title="KOFFVQA",
        task="koffvqa",
        hub="maum-ai/KOFFVQA_Data",
        split="test",
        licence="Apache-2.0",
        columns={
            "index": ColumnKind.optional_text,
            "question": _TEXT,
            "answer": _TEXT,
            "category": ColumnKind.optional_text,
            "image": _IMAGE,
        },
        num_rows=275,
        metric="koffvqa_score",
        scale=1.0,
        other_metrics=("koffvqa_not_korean", "koffvqa_unjudged"),
        judge=JudgeUse.needed,
        judge_url_is_full=True,
        in_task_pack=True,
        note="The published judge is google/gemma-2-9b-it with its own prompt.",
    ),
    "k_viscuit": Benchmark(
        title="K-Viscuit",
        task="k_viscuit",
        hub="ddehun/k-viscuit",
        split="test",
        columns={
            "question": _TEXT,
            "options": ColumnKind.texts,
            "answer": ColumnKind.integer,
            "image": _IMAGE,
        },
        other_names={"image": "image_path"},
        answers=frozenset("0123"),
        max_new_tokens=32,
        metric="k_viscuit_exact",
        scale=1.0,
        other_metrics=("k_viscuit_read_letter", "k_viscuit_unread"),
        in_task_pack=True,
        note="Only an answer that is exactly the letter counts. The questions are in English.",
    ),
    "cord_popeval": Benchmark(
        title="CORD (PopEval)",
        task="cord_popeval",
        hub="naver-clova-ix/cord-v2",
        licence="CC BY 4.0",
        num_rows=100,
        **_POPEVAL,
    ),
    "icdar2013_popeval": Benchmark(
        title="ICDAR 2013 (PopEval)", task="icdar2013_popeval", num_rows=233, obtain=_ICDAR, **_POPEVAL
    ),
    "icdar2015_popeval": Benchmark(
        title="ICDAR 2015 (PopEval)", task="icdar2015_popeval", num_rows=500, obtain=_ICDAR, **_POPEVAL
    ),
    "xm3600_ko": Benchmark(
        title="Crossmodal-3600 (ko)",
        task="xm3600_ko",
        hub="floschne/xm3600",
        split="ko",
        licence="CC BY 4.0",
        columns={"captions": ColumnKind.texts, "image": _IMAGE},
        num_rows=3600,
        max_new_tokens=128,
        metric="caption_rouge_l",
        scale=1.0,
        other_metrics=("caption_chrf", "caption_not_korean"),
        in_task_pack=True,
        note="The score is ROUGE-L on syllables.",
    ),
    "grounding_markup": Benchmark(
        title="Grounding (own rows)",
        task="grounding_markup",
        split="test",
        obtain="your own rows: image, question, and answer with boxes in markup",
        columns={"question": _TEXT, "answer": _TEXT, "image": _IMAGE},
        metric="grounding_acc_50",
        scale=1.0,
        other_metrics=("grounding_iou",),
        in_task_pack=True,
        note="The score is the share of boxes with IoU of 0.5 or more.",
    ),
}


@dataclass(frozen=True, slots=True)
class PublishedScore:
    """Score that a publication gives.

    Attributes:
        source: publication or table.
        note: how it was measured, where this is known.
    """

    model: str
    score: float
    source: str
    note: str


@cache
def load_published_scores() -> Mapping[str, tuple[PublishedScore, ...]]:
    """Load the published scores by benchmark, in the order of published_scores.csv."""
    found: dict[str, list[PublishedScore]] = {}
    text = files("lit_vlm.evaluation").joinpath("published_scores.csv").read_text(encoding="utf-8")
    for row in csv.DictReader(text.splitlines()):
        score = PublishedScore(row["model"], float(row["score"]), row["source"], row["note"])
        found.setdefault(row["benchmark"], []).append(score)
    return {name: tuple(scores) for name, scores in found.items()}


@cache
def list_harness_tasks() -> frozenset[str]:
    """List the names of all tasks, groups and tags of the pinned lmms-eval, without its environment."""
    return frozenset(files("lit_vlm.evaluation").joinpath("lmms_eval_tasks.txt").read_text(encoding="utf-8").split())
