"""Scorers that grade an answer from 0 to 1: by ground truth, by a judge model, or by a class of the user."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

from lit_vlm.config.user_classes import instantiate
from lit_vlm.data.processor import Processor
from lit_vlm.evaluation.generation import format_prompt, generate_answers
from lit_vlm.evaluation.metrics import compute_score
from lit_vlm.formatting import format_count
from lit_vlm.types import ContentPart, ImagePlaceholder, Language, Message, Role, Sample, UserError

if TYPE_CHECKING:
    from lit_vlm.model.classes import VisionLanguageModel

GradeRequest = tuple[Sample, str]  # a sample, whose last message is the reference answer, and the answer to grade

MAX_GRADE = 10
MAX_NEW_TOKENS = 8  # of a grade; a longer text is no grade

# The three fields are filled with plain text: control tokens and image placeholders in it stay text for the judge.
JUDGE_PROMPT = """\
You grade an answer to a question. If there are pictures above, the question is about them.

[Question]
{question}

[Reference answer]
{reference}

[Answer to grade]
{answer}

Give 10 to an answer that is correct, complete, fluent and in the language of the question, 0 to one that is wrong or \
says nothing, and a number between them to one that is right in parts. Names in tags such as <obj> and numbers in <bbox> \
are positions in the picture, as fractions of its width and height.
Reply with one whole number from 0 to 10 and nothing else."""


class Scorer(Protocol):
    """Interface of a class that grades answers. A class of the user needs this method and a constructor without arguments."""

    def grade(self, asked: Sequence[GradeRequest]) -> Sequence[float | None]:
        """Grade each answer from 0 to 1, or None if it cannot be graded."""
        ...


class ExactScorer:
    """Scorer that compares with the reference answer, by the metric of the kind; see `evaluation.scoring.compute_score`."""

    def grade(self, asked: Sequence[GradeRequest]) -> list[float | None]:
        return [compute_score(sample.kind, answer, sample.messages[-1].text) for sample, answer in asked]


class ModelJudge:
    """Judge model that grades with `JUDGE_PROMPT` and greedy decoding.

    Its reply is parsed strictly: a whole number from 0 to 10 and nothing else. Any other reply is no grade.

    Args:
        max_tokens, max_tiles: limits of one generation batch.
    """

    def __init__(self, model: VisionLanguageModel, processor: Processor, max_tokens: int, max_tiles: int) -> None:
        self.model, self.processor = model, processor
        self.max_tokens, self.max_tiles = max_tokens, max_tiles

    def grade(self, asked: Sequence[GradeRequest]) -> list[float | None]:
        samples = [build_judge_sample(sample, answer) for sample, answer in asked]
        replies = [
            text
            for group in self._group_within_limits(samples)
            for text in generate_answers(self.model, self.processor, group, MAX_NEW_TOKENS)
        ]
        return [parse_grade(text) for text in replies]

    def _group_within_limits(self, samples: list[Sample]) -> Iterator[list[Sample]]:
        """Group neighbouring samples within the limits; a single larger sample is a group of its own."""
        group: list[Sample] = []
        longest = tiles = 0
        for sample in samples:
            cost = self.processor.compute_cost(sample)
            longest, tiles = max(longest, cost.num_tokens), tiles + cost.num_tiles
            if group and (longest * (len(group) + 1) > self.max_tokens or tiles > self.max_tiles):
                yield group
                group, longest, tiles = [], cost.num_tokens, cost.num_tiles
            group.append(sample)
        if group:
            yield group


def build_judge_sample(sample: Sample, answer: str) -> Sample:
    """Build the judge's prompt as a sample: the images, then `JUDGE_PROMPT` as plain text."""
    slots: list[ContentPart] = [ImagePlaceholder(number) for number in range(len(sample.images))]
    text = JUDGE_PROMPT.format(
        question=format_prompt(sample.messages[:-1]), reference=sample.messages[-1].text, answer=answer
    )
    messages = (Message(Role.user, (*slots, text)), Message(Role.assistant, ("0",)))
    return Sample(
        sample.id, sample.source, sample.origin, sample.kind, Language.en, messages, sample.images, sample.max_tiles
    )


def parse_grade(text: str) -> float | None:
    """Parse a reply that is a whole number from 0 to 10 into a grade from 0 to 1, else None."""
    found = re.fullmatch(r"10|[0-9]", text.strip())
    return int(found[0]) / MAX_GRADE if found else None


def load_custom_scorer(path: str) -> Scorer:
    """Load a scorer of the user from an import path.

    Raises:
        UserError: it is no class, or it has no method `grade`.
    """
    needed, remedy = "a class with a method grade", "Give it one, see docs/preferences.md"
    return instantiate("prefer.judge", path, lambda found: callable(getattr(found, "grade", None)), needed, remedy)


def compute_grades(scorer: Scorer, requests: Sequence[GradeRequest]) -> list[float | None]:
    """Compute the grades of all requests; equal answers to one sample are graded once.

    Raises:
        UserError: the scorer returned an invalid grade or a wrong number of grades.
    """
    distinct_requests = list({(id(sample), answer): (sample, answer) for sample, answer in requests}.values())
    grades = list(scorer.grade(distinct_requests)) if distinct_requests else []
    invalid = [grade for grade in grades if grade is not None and not _is_valid_grade(grade)]
    if len(grades) != len(distinct_requests) or invalid:
        problem = (
            f"{format_count(len(grades), 'grade')} for {format_count(len(distinct_requests), 'answer')}"
            if len(grades) != len(distinct_requests)
            else repr(invalid[0])
        )
        raise UserError(
            f"prefer.judge: {type(scorer).__name__}.grade gave {problem}; it must give a number from 0 to 1, or None, for each."
        )
    grade_by_request = {
        (id(sample), answer): grade for (sample, answer), grade in zip(distinct_requests, grades, strict=True)
    }
    return [grade_by_request[id(sample), answer] for sample, answer in requests]


def _is_valid_grade(grade: object) -> bool:
    return isinstance(grade, int | float) and math.isfinite(grade) and 0 <= grade <= 1
