"""Choice of a preference pair among the answers to a prompt, or the reason why there is none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from lit_vlm.data.markup import boxes_of
from lit_vlm.evaluation.scoring import normalise
from lit_vlm.types import SPECIAL_TOKENS, Content, Control, Message, Role

CONTROLS = tuple(token for token in SPECIAL_TOKENS if token not in ("<gro>", "<ocr>"))


class Origin(StrEnum):
    """Origin of an answer."""

    sample = "sample"  # by the model, to the prompt
    reference = "reference"  # of the record
    uncontrolled = "uncontrolled"  # by the model, to the prompt without its control token


class State(StrEnum):
    """State of an answer; only graded answers are used."""

    graded = "graded"
    cut = "cut"  # by the length limit
    empty = "empty"
    ungraded = "ungraded"  # the judge gave no valid grade


class Reason(StrEnum):
    """Reason why a prompt yields no pair."""

    too_few = "too few answers"  # that are complete, not empty and graded
    equal = "equal answers"
    tie = "tie"
    margin = "margin too small"
    boxes = "boxes unasked"  # the model answered with box markup, complete or not, without the control token, too
    no_boxes = "no answer with boxes"  # to the prompt with the control token


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer to a prompt; `score`, 0 to 1, if it is graded."""

    content: tuple[Content, ...]
    origin: Origin
    state: State
    score: float | None = None

    @property
    def text(self) -> str:
        return Message(Role.assistant, self.content).text

    @property
    def has_marks(self) -> bool:
        """True if the answer has control tokens of box markup, valid or not. Text that looks like them does not count."""
        return any(piece.token in CONTROLS for piece in self.content if isinstance(piece, Control))

    @property
    def has_boxes(self) -> bool:
        return self.has_marks and bool(boxes_of(self.text))


@dataclass(frozen=True, slots=True)
class Pair:
    """Chosen and rejected answer of one prompt."""

    chosen: Answer
    rejected: Answer


def response_pair(answers: Sequence[Answer], min_margin: float) -> Pair | Reason:
    """Choose the best answer as chosen and the worst one as rejected; of equally good ones the first.

    Args:
        answers: all answers to one prompt. A reference among them is chosen only if it is better than all samples.
        min_margin: minimum difference of the two scores.
    """
    usable = _usable(answers)
    samples = [answer for answer in usable if answer.origin is Origin.sample]
    if not samples or len(usable) < 2:
        return Reason.too_few
    return _judged(_best(usable), min(samples, key=_score), samples, min_margin)


def control_pair(answers: Sequence[Answer], min_margin: float) -> Pair | Reason:
    """Choose the best answer with boxes, and reject an answer that ignores the control token, i.e. has no box markup."""
    usable = _usable(answers)
    uncontrolled = [answer for answer in usable if answer.origin is Origin.uncontrolled]
    if not uncontrolled:
        return Reason.too_few
    without_markup = [answer for answer in uncontrolled if not answer.has_marks]
    if not without_markup:
        return Reason.boxes
    with_boxes = [answer for answer in usable if answer.origin is not Origin.uncontrolled and answer.has_boxes]
    if not with_boxes:
        return Reason.no_boxes
    return _judged(_best(with_boxes), without_markup[0], [], min_margin)


def _judged(chosen: Answer, rejected: Answer, samples: list[Answer], min_margin: float) -> Pair | Reason:
    margin = _score(chosen) - _score(rejected)
    if margin <= 0:
        texts = {normalise(answer.text) for answer in (chosen, rejected, *samples)}
        return Reason.equal if len(texts) == 1 else Reason.tie
    if normalise(chosen.text) == normalise(rejected.text):
        return Reason.equal
    return Pair(chosen, rejected) if margin >= min_margin else Reason.margin


def _usable(answers: Sequence[Answer]) -> list[Answer]:
    return [answer for answer in answers if answer.state is State.graded]


def _best(answers: Sequence[Answer]) -> Answer:
    """Select the best answer; of equally good ones a sample, which the model can generate, before the reference, then the first."""
    return max(answers, key=lambda answer: (_score(answer), answer.origin is Origin.sample))


def _score(answer: Answer) -> float:
    assert answer.score is not None
    return answer.score
