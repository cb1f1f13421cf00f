"""Which answers make a pair, and the reason why others make none."""

import pytest

from lit_vlm.curation.choice import (
    AnswerOrigin,
    AnswerPair,
    AnswerState,
    CandidateAnswer,
    NoPairReason,
    choose_control_pair,
    choose_response_pair,
)
from lit_vlm.curation.control import remove_control_token
from lit_vlm.data.markup import build_object_mention
from lit_vlm.types import Box, ControlToken, ImagePlaceholder, Language, Message, Role, Sample, SampleKind

BOXES = build_object_mention("별", Box(0.1, 0.1, 0.5, 0.5))


def answer(text, score=None, origin=AnswerOrigin.sample, state=AnswerState.graded):
    return CandidateAnswer((text,) if isinstance(text, str) else text, origin, state, score)


def test_the_best_answer_is_chosen_and_the_worst_rejected():
    pair = choose_response_pair(
        [answer("b", 0.5), answer("a", 1.0), answer("c", 0.0), answer("A", 1.0), answer("d", 0.0)], 0
    )
    assert (pair.chosen.text, pair.rejected.text) == ("a", "c")  # the first of equals


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        ([answer("a", 1.0), answer("b", 1.0)], NoPairReason.tie),
        ([answer("a", 0.0), answer("a", 0.0)], NoPairReason.equal),
        ([answer("a", 1.0), answer("a ", 0.0)], NoPairReason.equal),  # a judge that is not sure of itself
        ([answer("a", 1.0), answer("b", 0.8)], NoPairReason.margin),
        ([answer("a", 1.0), answer("b", state=AnswerState.cut)], NoPairReason.too_few),
        (
            [answer("a", 1.0), answer("", state=AnswerState.empty), answer("b", state=AnswerState.ungraded)],
            NoPairReason.too_few,
        ),
        ([answer("a", 1.0, AnswerOrigin.reference), answer("b", state=AnswerState.cut)], NoPairReason.too_few),
        ([answer("a", 1.0, AnswerOrigin.reference), answer("a", 1.0)], NoPairReason.equal),
    ],
)
def test_what_makes_no_pair_is_told_by_its_reason(answers, reason):
    assert choose_response_pair(answers, min_margin=0.3) is reason


def test_the_known_answer_is_chosen_only_where_no_sample_is_as_good():
    reference = answer("right", 1.0, AnswerOrigin.reference)
    wrong = choose_response_pair([answer("a", 0.5), answer("b", 0.2), reference], 0)
    assert wrong.chosen.origin is AnswerOrigin.reference and wrong.rejected.text == "b"
    right = choose_response_pair([answer("right", 1.0), answer("b", 0.2), reference], 0)
    assert right.chosen.origin is AnswerOrigin.sample


def test_a_control_pair_rejects_an_answer_that_ignores_the_token():
    pair = choose_control_pair(
        [answer("별", 0.9), answer(BOXES, 1.0), answer("별입니다", 0.0, AnswerOrigin.uncontrolled)], 0
    )
    assert isinstance(pair, AnswerPair) and pair.chosen.content == BOXES and pair.rejected.text == "별입니다"


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        ([answer(BOXES, 1.0), answer(BOXES, 1.0, AnswerOrigin.uncontrolled)], NoPairReason.boxes),
        ([answer(BOXES, 1.0), answer((*BOXES[:3], "0.1"), 0.0, AnswerOrigin.uncontrolled)], NoPairReason.boxes),
        ([answer("별", 0.0), answer("별", 0.0, AnswerOrigin.uncontrolled)], NoPairReason.no_boxes),
        (
            [answer("<obj>별</obj><bbox>0.1, 0.1, 0.5, 0.5</bbox>", 1.0), answer("별", 0.0, AnswerOrigin.uncontrolled)],
            NoPairReason.no_boxes,
        ),
        ([answer(BOXES, 0.0), answer("별", 0.0, AnswerOrigin.uncontrolled)], NoPairReason.tie),
        (
            [answer(BOXES, 1.0), answer("별", origin=AnswerOrigin.uncontrolled, state=AnswerState.cut)],
            NoPairReason.too_few,
        ),
        ([answer(BOXES, 0.2), answer("별", 0.0, AnswerOrigin.uncontrolled)], NoPairReason.margin),
    ],
)
def test_a_control_pair_needs_boxes_on_one_side_alone(answers, reason):
    assert choose_control_pair(answers, min_margin=0.3) is reason


@pytest.mark.parametrize(
    ("asked", "bare"),
    [
        ((ImagePlaceholder(0), ControlToken("<gro>"), "\n어디?"), (ImagePlaceholder(0), "어디?")),
        ((ImagePlaceholder(0), ControlToken("<ocr>")), (ImagePlaceholder(0),)),
        ((ImagePlaceholder(0), "<gro> as text"), None),
        ((ImagePlaceholder(0), "where?"), None),
    ],
)
def test_the_control_token_of_the_last_question_is_taken_out(asked, bare):
    first = (Message(Role.user, ("first",)), Message(Role.assistant, ("one",)))
    messages = (*first, Message(Role.user, asked), Message(Role.assistant, ("answer",)))
    sample = Sample("1", "s", "s:1", SampleKind.grounding, Language.ko, messages)
    found = remove_control_token(sample)
    assert (found.messages[2].content if found else None) == bare
    assert found is None or (found.messages[:2], found.messages[3]) == (first, messages[3])
