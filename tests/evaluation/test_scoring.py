"""Scores by kind of sample."""

import unicodedata

import pytest

from lit_vlm.evaluation.metrics import compute_iou, compute_score
from lit_vlm.types import Box, SampleKind

CIRCLE = "<obj>빨간 원</obj><bbox>0.1, 0.3, 0.5, 0.8</bbox>"
LINES = "<char>백범로</char><bbox>0.1, 0.1, 0.5, 0.3</bbox>\n<char>42</char><bbox>0.1, 0.5, 0.5, 0.7</bbox>"


@pytest.mark.parametrize("kind", list(SampleKind))
@pytest.mark.parametrize("text", ["빨간 원", "a red circle", "7", CIRCLE, LINES])
def test_the_reference_answer_scores_one(kind, text):
    assert compute_score(kind, text, text) == 1.0


@pytest.mark.parametrize("kind", list(SampleKind))
def test_an_empty_prediction_scores_zero(kind):
    assert compute_score(kind, "", CIRCLE if kind is SampleKind.grounding else LINES) == 0.0


def test_decomposed_hangul_space_and_end_marks_do_not_matter():
    assert (
        compute_score(SampleKind.word, " " + unicodedata.normalize("NFD", "사과") + "<|im_end|>\n<|im_end|>", "사과")
        == 1.0
    )


def test_exact_match_compares_case_and_every_letter():
    assert compute_score(SampleKind.caption, "a Red circle", "a red circle") == 0.0
    assert compute_score(SampleKind.number, "470", "47") == 0.0


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ("<obj>빨간 원</obj><bbox>0.14, 0.26, 0.52, 0.8</bbox>", 1.0),
        ("네, <obj>빨간 원</obj><bbox>0.1,0.3,0.5,0.8</bbox>입니다.", 1.0),
        ("<obj>빨간 원</obj><bbox>0.2, 0.3, 0.5, 0.8</bbox>", 0.0),
        ("<obj>파란 원</obj><bbox>0.1, 0.3, 0.5, 0.8</bbox>", 0.0),
        ("빨간 원", 0.0),
        (CIRCLE + "<obj>별</obj><bbox>0.1, 0.1, 0.2, 0.2</bbox>", 0.0),
        ("<obj>빨간 원</obj><bbox>0.1, 0.3, 0.5", 0.0),
    ],
)
def test_grounding_needs_the_phrase_and_every_box(prediction, expected):
    assert compute_score(SampleKind.grounding, prediction, CIRCLE) == expected


def test_grounding_compares_all_boxes_of_a_phrase_in_any_order():
    reference = "<obj>two</obj><bbox>0.1, 0.1, 0.2, 0.2<delim>0.5, 0.5, 0.6, 0.6</bbox>"
    swapped = "<obj>two</obj><bbox>0.5, 0.5, 0.6, 0.6<delim>0.1, 0.1, 0.2, 0.2</bbox>"
    assert compute_score(SampleKind.grounding, swapped, reference) == 1.0
    assert compute_score(SampleKind.grounding, "<obj>two</obj><bbox>0.1, 0.1, 0.2, 0.2</bbox>", reference) == 0.0


def test_ocr_is_f1_over_the_lines_found():
    first, second = LINES.split("\n")
    assert compute_score(SampleKind.ocr, second + "\n" + first, LINES) == 1.0
    assert compute_score(SampleKind.ocr, first, LINES) == pytest.approx(2 / 3)
    assert compute_score(SampleKind.ocr, first + first, first) == pytest.approx(2 / 3)
    assert compute_score(SampleKind.ocr, "<char>백범로</char><bbox>0.6, 0.1, 0.9, 0.3</bbox>", LINES) == 0.0
    assert compute_score(SampleKind.ocr, "백범로\n42", LINES) == 0.0


def test_iou_of_known_boxes():
    box = Box(0.0, 0.0, 0.4, 0.4)
    assert compute_iou(box, box) == 1.0
    assert compute_iou(box, Box(0.2, 0.0, 0.6, 0.4)) == pytest.approx(1 / 3)
    assert compute_iou(box, Box(0.5, 0.5, 0.6, 0.6)) == 0.0
    assert compute_iou(Box(0.1, 0.1, 0.1, 0.1), Box(0.2, 0.2, 0.2, 0.2)) == 0.0
