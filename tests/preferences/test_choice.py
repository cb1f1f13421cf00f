"""Choice of the answers of a pair, and the reasons why no pair is made."""

import pytest

from lit_vlm.data.markup import build_object_mention
from lit_vlm.preferences.pairs import (
    AnswerOrigin,
    AnswerPair,
    AnswerState,
    CandidateAnswer,
    NoPairReason,
    choose_control_pair,
    choose_response_pair,
    remove_control_token,
)
from lit_vlm.types import Box, ControlToken, ImagePlaceholder, Language, Message, Role, Sample, SampleKind

BOXES = build_object_mention("별", Box(0.1, 0.1, 0.5, 0.5))


def make_answer(text, score=None, origin=AnswerOrigin.sample, state=AnswerState.graded):
    return CandidateAnswer((text,) if isinstance(text, str) else text, origin, state, score)


def test_the_best_answer_is_chosen_and_the_worst_rejected():
    pair = choose_response_pair(
        [
            make_answer("b", 0.5),
            make_answer("a", 1.0),
            make_answer("c", 0.0),
            make_answer("A", 1.0),
            make_answer("d", 0.0),
        ],
        0,
    )
    assert (pair.chosen.text, pair.rejected.text) == ("a", "c")  # the first of equal answers


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        ([make_answer("a", 1.0), make_answer("b", 1.0)], NoPairReason.tie),
        ([make_answer("a", 0.0), make_answer("a", 0.0)], NoPairReason.equal),
        ([make_answer("a", 1.0), make_answer("a ", 0.0)], NoPairReason.equal),  # an inconsistent judge
        ([make_answer("a", 1.0), make_answer("b", 0.8)], NoPairReason.margin),
        ([make_answer("a", 1.0), make_answer("b", state=AnswerState.cut)], NoPairReason.too_few),
        (
            [
                make_answer("a", 1.0),
                make_answer("", state=AnswerState.empty),
                make_answer("b", state=AnswerState.ungraded),
            ],
            NoPairReason.too_few,
        ),
        (
            [make_answer("a", 1.0, AnswerOrigin.reference), make_answer("b", state=AnswerState.cut)],
            NoPairReason.too_few,
        ),
        ([make_answer("a", 1.0, AnswerOrigin.reference), make_answer("a", 1.0)], NoPairReason.equal),
    ],
)
def test_answers_without_a_pair_have_a_reason(answers, reason):
    assert choose_response_pair(answers, min_margin=0.3) is reason


def test_the_reference_answer_is_chosen_only_if_no_sample_is_as_good():
    reference = make_answer("right", 1.0, AnswerOrigin.reference)
    wrong = choose_response_pair([make_answer("a", 0.5), make_answer("b", 0.2), reference], 0)
    assert wrong.chosen.origin is AnswerOrigin.reference and wrong.rejected.text == "b"
    right = choose_response_pair([make_answer("right", 1.0), make_answer("b", 0.2), reference], 0)
    assert right.chosen.origin is AnswerOrigin.sample


def test_a_control_pair_rejects_an_answer_that_ignores_the_token():
    pair = choose_control_pair(
        [make_answer("별", 0.9), make_answer(BOXES, 1.0), make_answer("별입니다", 0.0, AnswerOrigin.uncontrolled)], 0
    )
    assert isinstance(pair, AnswerPair) and pair.chosen.content == BOXES and pair.rejected.text == "별입니다"


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        ([make_answer(BOXES, 1.0), make_answer(BOXES, 1.0, AnswerOrigin.uncontrolled)], NoPairReason.boxes),
        (
            [make_answer(BOXES, 1.0), make_answer((*BOXES[:3], "0.1"), 0.0, AnswerOrigin.uncontrolled)],
            NoPairReason.boxes,
        ),
        ([make_answer("별", 0.0), make_answer("별", 0.0, AnswerOrigin.uncontrolled)], NoPairReason.no_boxes),
        (
            [
                make_answer("<obj>별</obj><bbox>0.1, 0.1, 0.5, 0.5</bbox>", 1.0),
                make_answer("별", 0.0, AnswerOrigin.uncontrolled),
            ],
            NoPairReason.no_boxes,
        ),
        ([make_answer(BOXES, 0.0), make_answer("별", 0.0, AnswerOrigin.uncontrolled)], NoPairReason.tie),
        (
            [make_answer(BOXES, 1.0), make_answer("별", origin=AnswerOrigin.uncontrolled, state=AnswerState.cut)],
            NoPairReason.too_few,
        ),
        ([make_answer(BOXES, 0.2), make_answer("별", 0.0, AnswerOrigin.uncontrolled)], NoPairReason.margin),
    ],
)
def test_a_control_pair_needs_boxes_in_exactly_one_answer(answers, reason):
    assert choose_control_pair(answers, min_margin=0.3) is reason


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ((ImagePlaceholder(0), ControlToken("<gro>"), "\n어디?"), (ImagePlaceholder(0), "어디?")),
        ((ImagePlaceholder(0), ControlToken("<ocr>")), (ImagePlaceholder(0),)),
        ((ImagePlaceholder(0), "<gro> as text"), None),
        ((ImagePlaceholder(0), "where?"), None),
    ],
)
def test_the_control_token_of_the_last_question_is_removed(question, expected):
    first = (Message(Role.user, ("first",)), Message(Role.assistant, ("one",)))
    messages = (*first, Message(Role.user, question), Message(Role.assistant, ("answer",)))
    sample = Sample("1", "s", "s:1", SampleKind.grounding, Language.ko, messages)
    found = remove_control_token(sample)
    assert (found.messages[2].content if found else None) == expected
    assert found is None or (found.messages[:2], found.messages[3]) == (first, messages[3])
