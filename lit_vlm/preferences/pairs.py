"""Prompts without their control token: answers to them serve as rejected answers, which ignore `<gro>` or `<ocr>`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from lit_vlm.data.markup import parse_mentions
from lit_vlm.evaluation.task_pack.text_scores import normalize_answer
from lit_vlm.types import SPECIAL_TOKENS, ContentPart, ControlToken, Message, Role, Sample

BOX_REQUEST_TOKENS = (ControlToken("<gro>"), ControlToken("<ocr>"))


def remove_control_token(sample: Sample) -> Sample | None:
    """Remove `<gro>` or `<ocr>`, and the line break after it, from the last question of a conversation.

    Returns:
        The changed sample; None if the last question has neither token.
    """
    position = next((n for n in reversed(range(len(sample.messages))) if sample.messages[n].role is Role.user), None)
    if position is None or not any(piece in BOX_REQUEST_TOKENS for piece in sample.messages[position].content):
        return None
    content: list[ContentPart] = []
    after_control = False
    for piece in sample.messages[position].content:
        if piece in BOX_REQUEST_TOKENS:
            after_control = True
            continue
        content += [piece.lstrip("\n")] if after_control and isinstance(piece, str) else [piece]
        after_control = False
    question = replace(sample.messages[position], content=tuple(piece for piece in content if piece != ""))
    return replace(sample, messages=(*sample.messages[:position], question, *sample.messages[position + 1 :]))


MARKUP_TOKENS = tuple(token for token in SPECIAL_TOKENS if token not in ("<gro>", "<ocr>"))


class AnswerOrigin(StrEnum):
    """Origin of an answer."""

    sample = "sample"  # by the model, to the prompt
    reference = "reference"  # of the record
    uncontrolled = "uncontrolled"  # by the model, to the prompt without its control token


class AnswerState(StrEnum):
    """State of an answer; only graded answers are used."""

    graded = "graded"
    cut = "cut"  # by the length limit
    empty = "empty"
    ungraded = "ungraded"  # the judge gave no valid grade


class NoPairReason(StrEnum):
    """Reason why a prompt yields no pair."""

    too_few = "too few answers"  # that are complete, not empty and graded
    equal = "equal answers"
    tie = "tie"
    margin = "margin too small"
    boxes = "boxes unasked"  # the model answered with box markup, complete or not, without the control token, too
    no_boxes = "no answer with boxes"  # to the prompt with the control token


@dataclass(frozen=True, slots=True)
class CandidateAnswer:
    """One answer to a prompt; `score`, 0 to 1, if it is graded."""

    content: tuple[ContentPart, ...]
    origin: AnswerOrigin
    state: AnswerState
    score: float | None = None

    @property
    def text(self) -> str:
        return Message(Role.assistant, self.content).text

    @property
    def has_markup(self) -> bool:
        """True if the answer has control tokens of box markup, valid or not. Text that looks like them does not count."""
        return any(piece.token in MARKUP_TOKENS for piece in self.content if isinstance(piece, ControlToken))

    @property
    def has_boxes(self) -> bool:
        return self.has_markup and bool(parse_mentions(self.text))


@dataclass(frozen=True, slots=True)
class AnswerPair:
    """Chosen and rejected answer of one prompt."""

    chosen: CandidateAnswer
    rejected: CandidateAnswer


def choose_response_pair(answers: Sequence[CandidateAnswer], min_margin: float) -> AnswerPair | NoPairReason:
    """Choose the best answer as chosen and the worst one as rejected; of equally good ones the first.

    Args:
        answers: all answers to one prompt. A reference among them is chosen only if it is better than all samples.
        min_margin: minimum difference of the two scores.
    """
    usable = _filter_graded(answers)
    samples = [answer for answer in usable if answer.origin is AnswerOrigin.sample]
    if not samples or len(usable) < 2:
        return NoPairReason.too_few
    return _make_pair(_select_best(usable), min(samples, key=_get_score), samples, min_margin)


def choose_control_pair(answers: Sequence[CandidateAnswer], min_margin: float) -> AnswerPair | NoPairReason:
    """Choose the best answer with boxes, and reject an answer that ignores the control token, i.e. has no box markup."""
    usable = _filter_graded(answers)
    uncontrolled = [answer for answer in usable if answer.origin is AnswerOrigin.uncontrolled]
    if not uncontrolled:
        return NoPairReason.too_few
    without_markup = [answer for answer in uncontrolled if not answer.has_markup]
    if not without_markup:
        return NoPairReason.boxes
    with_boxes = [answer for answer in usable if answer.origin is not AnswerOrigin.uncontrolled and answer.has_boxes]
    if not with_boxes:
        return NoPairReason.no_boxes
    return _make_pair(_select_best(with_boxes), without_markup[0], [], min_margin)


def _make_pair(
    chosen: CandidateAnswer, rejected: CandidateAnswer, samples: list[CandidateAnswer], min_margin: float
) -> AnswerPair | NoPairReason:
    margin = _get_score(chosen) - _get_score(rejected)
    if margin <= 0:
        texts = {normalize_answer(answer.text) for answer in (chosen, rejected, *samples)}
        return NoPairReason.equal if len(texts) == 1 else NoPairReason.tie
    if normalize_answer(chosen.text) == normalize_answer(rejected.text):
        return NoPairReason.equal
    return AnswerPair(chosen, rejected) if margin >= min_margin else NoPairReason.margin


def _filter_graded(answers: Sequence[CandidateAnswer]) -> list[CandidateAnswer]:
    return [answer for answer in answers if answer.state is AnswerState.graded]


def _select_best(answers: Sequence[CandidateAnswer]) -> CandidateAnswer:
    """Select the best answer; of equally good ones a sample, which the model can generate, before the reference, then the first."""
    return max(answers, key=lambda answer: (_get_score(answer), answer.origin is AnswerOrigin.sample))


def _get_score(answer: CandidateAnswer) -> float:
    assert answer.score is not None
    return answer.score
