"""Grades: by ground truth, by a judge's words, by a class of one's own."""

import pytest
from support import builtin, sample

from lit_vlm.curation import scorers
from lit_vlm.curation.scorers import (
    ExactScorer,
    ModelJudge,
    build_judge_sample,
    compute_grades,
    load_custom_scorer,
    parse_grade,
)
from lit_vlm.types import ImagePlaceholder, SampleKind, UserError


def test_exact_grades_go_by_the_kind_of_the_sample():
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
    said = grounding.messages[-1].text
    assert ExactScorer().grade([(grounding, f"여기: {said}")]) == [1.0]  # words around a mention are free


@pytest.mark.parametrize(("said", "grade"), [("7", 0.7), (" 10\n", 1.0), ("0", 0.0)])
def test_a_grade_is_a_whole_number_from_0_to_10(said, grade):
    assert parse_grade(said) == grade


@pytest.mark.parametrize("said", ["", "11", "8/10", "7.5", "Grade: 7", "7 because", "-1", "seven", "1 0", "٧"])
def test_anything_else_is_no_grade(said):
    assert parse_grade(said) is None


def test_a_judge_sees_the_pictures_and_the_texts_as_text():
    record = builtin(SampleKind.grounding, n=1)[0][0]
    question = build_judge_sample(record, "<|im_end|> {answer} <image>").messages[0].content
    assert question[:-1] == (ImagePlaceholder(0),) and isinstance(question[-1], str)
    for part in ("[Answer to grade]\n<|im_end|> {answer} <image>\n", record.messages[-1].text, "<gro>"):
        assert part in question[-1]


def test_a_judges_answers_are_grades_in_the_order_of_what_was_asked(processor, monkeypatch):
    groups = []

    def ask(model, processor, group, most):
        groups.append(len(group))
        return [text.split("[Answer to grade]\n")[1][0] for text in (one.messages[0].text for one in group)]

    monkeypatch.setattr(scorers, "generate_answers", ask)
    asked = [(sample("?", "!", (56, 56), seed=n), answer) for n, answer in enumerate(("3", "x", "9", "0"))]
    judge = ModelJudge(None, processor, max_tokens=1100, max_tiles=64)
    assert judge.grade(asked) == [0.3, None, 0.9, 0.0]
    assert len(groups) > 1 and sum(groups) == 4


def test_an_answer_that_was_drawn_twice_is_graded_once():
    class Counting:
        asked = 0

        def grade(self, asked):
            self.asked += len(asked)
            return [0.5] * len(asked)

    one, other, judge = sample("a", "b"), sample("a", "b", seed=1), Counting()
    assert compute_grades(judge, [(one, "x"), (other, "x"), (one, "x"), (one, "y")]) == [0.5] * 4
    assert judge.asked == 3


@pytest.mark.parametrize("grades", [[2.0], [float("nan")], ["good"], []])
def test_a_class_that_gives_no_grades_is_told_what_they_are(grades):
    class Wrong:
        def grade(self, asked):
            return grades

    with pytest.raises(UserError, match="Wrong.grade gave .*a number from 0 to 1, or None"):
        compute_grades(Wrong(), [(sample("a", "b"), "x")])


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere.Judge", "cannot be imported"),
        ("json.JSONDecoder", "is not a class with a method grade"),
        ("lit_vlm.curation.scorers.ModelJudge", "cannot be made without arguments"),
    ],
)
def test_a_class_that_cannot_judge_is_refused(path, message):
    with pytest.raises(UserError, match=f"prefer.judge: {path} {message}"):
        load_custom_scorer(path)
