"""Scores, by kind."""

import unicodedata

import pytest

from lit_vlm.evaluation.scoring import iou, score
from lit_vlm.types import Box, Kind

CIRCLE = "<obj>빨간 원</obj><bbox>0.1, 0.3, 0.5, 0.8</bbox>"
LINES = "<char>백범로</char><bbox>0.1, 0.1, 0.5, 0.3</bbox>\n<char>42</char><bbox>0.1, 0.5, 0.5, 0.7</bbox>"


@pytest.mark.parametrize("kind", list(Kind))
@pytest.mark.parametrize("text", ["빨간 원", "a red circle", "7", CIRCLE, LINES])
def test_the_reference_itself_scores_one(kind, text):
    assert score(kind, text, text) == 1.0


@pytest.mark.parametrize("kind", list(Kind))
def test_an_empty_prediction_scores_zero(kind):
    assert score(kind, "", CIRCLE if kind is Kind.grounding else LINES) == 0.0


def test_decomposed_hangul_space_and_end_marks_do_not_matter():
    assert score(Kind.word, " " + unicodedata.normalize("NFD", "사과") + "<|im_end|>\n<|im_end|>", "사과") == 1.0


def test_exact_match_minds_case_and_every_letter():
    assert score(Kind.caption, "a Red circle", "a red circle") == 0.0
    assert score(Kind.number, "470", "47") == 0.0


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
def test_grounding_needs_the_phrase_and_every_box_to_a_tenth(prediction, expected):
    assert score(Kind.grounding, prediction, CIRCLE) == expected


def test_grounding_minds_all_boxes_of_a_phrase_in_any_order():
    reference = "<obj>two</obj><bbox>0.1, 0.1, 0.2, 0.2<delim>0.5, 0.5, 0.6, 0.6</bbox>"
    swapped = "<obj>two</obj><bbox>0.5, 0.5, 0.6, 0.6<delim>0.1, 0.1, 0.2, 0.2</bbox>"
    assert score(Kind.grounding, swapped, reference) == 1.0
    assert score(Kind.grounding, "<obj>two</obj><bbox>0.1, 0.1, 0.2, 0.2</bbox>", reference) == 0.0


def test_ocr_is_f1_over_the_lines_found():
    first, second = LINES.split("\n")
    assert score(Kind.ocr, second + "\n" + first, LINES) == 1.0
    assert score(Kind.ocr, first, LINES) == pytest.approx(2 / 3)
    assert score(Kind.ocr, first + first, first) == pytest.approx(2 / 3)
    assert score(Kind.ocr, "<char>백범로</char><bbox>0.6, 0.1, 0.9, 0.3</bbox>", LINES) == 0.0
    assert score(Kind.ocr, "백범로\n42", LINES) == 0.0


def test_iou_of_known_boxes():
    box = Box(0.0, 0.0, 0.4, 0.4)
    assert iou(box, box) == 1.0
    assert iou(box, Box(0.2, 0.0, 0.6, 0.4)) == pytest.approx(1 / 3)
    assert iou(box, Box(0.5, 0.5, 0.6, 0.6)) == 0.0
    assert iou(Box(0.1, 0.1, 0.1, 0.1), Box(0.2, 0.2, 0.2, 0.2)) == 0.0
