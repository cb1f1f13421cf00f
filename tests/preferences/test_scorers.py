"""Grades from the reference answer, from a judge model and from a custom class."""

import pytest
from support import builtin, sample

from lit_vlm.preferences import scorers
from lit_vlm.preferences.scorers import (
    ExactScorer,
    ModelJudge,
    build_judge_sample,
    compute_grades,
    load_custom_scorer,
    parse_grade,
)
from lit_vlm.types import ImagePlaceholder, SampleKind, UserError


def test_exact_grades_depend_on_the_kind_of_the_sample():
    for kind in (
        SampleKind.word,
        SampleKind.number,
        SampleKind.caption,
        SampleKind.grounding,
        SampleKind.ocr,
        SampleKind.text,
    ):
        record = builtin(kind, n=1)[0][0]
        right = record.messages[-1].text
        assert ExactScorer().grade([(record, right), (record, "다른 답")]) == [1.0, 0.0], kind
    grounding = builtin(SampleKind.grounding, n=1)[0][0]
    answer_text = grounding.messages[-1].text
    assert ExactScorer().grade([(grounding, f"여기: {answer_text}")]) == [1.0]  # text around a mention is ignored


@pytest.mark.parametrize(("text", "grade"), [("7", 0.7), (" 10\n", 1.0), ("0", 0.0)])
def test_a_grade_is_a_whole_number_from_0_to_10(text, grade):
    assert parse_grade(text) == grade


@pytest.mark.parametrize("text", ["", "11", "8/10", "7.5", "Grade: 7", "7 because", "-1", "seven", "1 0", "٧"])
def test_anything_else_is_no_grade(text):
    assert parse_grade(text) is None


def test_a_judge_sees_the_pictures_and_control_tokens_as_text():
    record = builtin(SampleKind.grounding, n=1)[0][0]
    question = build_judge_sample(record, "<|im_end|> {answer} <image>").messages[0].content
    assert question[:-1] == (ImagePlaceholder(0),) and isinstance(question[-1], str)
    for part in ("[Answer to grade]\n<|im_end|> {answer} <image>\n", record.messages[-1].text, "<gro>"):
        assert part in question[-1]


def test_grades_of_a_judge_are_in_the_order_of_the_answers(processor, monkeypatch):
    groups = []

    def answer_group(model, processor, group, max_tokens):
        groups.append(len(group))
        return [text.split("[Answer to grade]\n")[1][0] for text in (one.messages[0].text for one in group)]

    monkeypatch.setattr(scorers, "generate_answers", answer_group)
    graded = [(sample("?", "!", (56, 56), seed=n), answer) for n, answer in enumerate(("3", "x", "9", "0"))]
    judge = ModelJudge(None, processor, max_tokens=1100, max_tiles=64)
    assert judge.grade(graded) == [0.3, None, 0.9, 0.0]
    assert len(groups) > 1 and sum(groups) == 4


def test_an_answer_that_was_sampled_twice_is_graded_once():
    class CountingScorer:
        num_graded = 0

        def grade(self, answers):
            self.num_graded += len(answers)
            return [0.5] * len(answers)

    one, other, judge = sample("a", "b"), sample("a", "b", seed=1), CountingScorer()
    assert compute_grades(judge, [(one, "x"), (other, "x"), (one, "x"), (one, "y")]) == [0.5] * 4
    assert judge.num_graded == 3


@pytest.mark.parametrize("grades", [[2.0], [float("nan")], ["good"], []])
def test_a_class_that_returns_invalid_grades_gets_an_error_with_the_valid_ones(grades):
    class Wrong:
        def grade(self, answers):
            return grades

    with pytest.raises(UserError, match="Wrong.grade gave .*a number from 0 to 1, or None"):
        compute_grades(Wrong(), [(sample("a", "b"), "x")])


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere.Judge", "cannot be imported"),
        ("json.JSONDecoder", "is not a class with a method grade"),
        ("lit_vlm.preferences.scorers.ModelJudge", "cannot be made without arguments"),
    ],
)
def test_a_class_that_cannot_judge_is_refused(path, message):
    with pytest.raises(UserError, match=f"prefer.judge: {path} {message}"):
        load_custom_scorer(path)
