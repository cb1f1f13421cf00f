"""Worked cases of chrF, ROUGE-L and ANLS in Korean, compared with libraries, and the registry of metrics."""

import unicodedata

import pytest
from torchmetrics.functional.text import chrf_score, edit_distance, rouge_score

from lit_vlm.evaluation.metrics import (
    METRICS,
    AnswerMetric,
    compute_score,
    compute_text_scores,
    get_main_metric,
    list_score_names,
    list_text_metrics,
)
from lit_vlm.evaluation.task_pack.text_scores import split_tokens, take_best
from lit_vlm.reports.run_record import RunRecord
from lit_vlm.types import SampleKind

TEXT_METRICS = ("chrf", "rouge_l", "anls")
LONG = (
    "대한민국의 수도는 서울이다. 부산은 큰 항구 도시이다.",
    "대한민국의 수도는 서울이고 부산은 아주 큰 항구 도시이다.",
)


def compute(name, answer, *references):
    """Compute one metric with the normalisation of a run."""
    return compute_text_scores(SampleKind.instruction, answer, references)[name]


@pytest.mark.parametrize("name", TEXT_METRICS)
@pytest.mark.parametrize("text", ["원", "빨간 원", "빨간 원이 있다.", "a red circle", "3개", "!", "값이 과하다", ""])
def test_the_reference_scores_one_also_when_it_is_short(name, text):
    assert compute(name, text, text) == 1.0


@pytest.mark.parametrize("name", TEXT_METRICS)
def test_an_empty_answer_scores_zero(name):
    assert compute(name, "", "빨간 원") == 0.0
    assert compute(name, " <|im_end|>", "빨간 원") == 0.0
    assert compute(name, "빨간 원", "") == 0.0


@pytest.mark.parametrize("name", TEXT_METRICS)
def test_decomposed_hangul_counts_as_syllables(name):
    answer, reference = "빨간 점이 있다", "빨간 원이 있다"
    composed = compute(name, answer, reference)
    assert 0 < composed < 1
    assert compute(name, unicodedata.normalize("NFD", answer), reference) == composed
    assert compute(name, answer, unicodedata.normalize("NFD", reference)) == composed


@pytest.mark.parametrize("name", TEXT_METRICS)
def test_the_best_of_several_references_counts(name):
    references = ("파란 네모가 두 개 있다", "빨간 원이 하나 있다", "별")
    assert compute(name, "빨간 원이 하나 있다", *references) == 1.0
    best = max(compute(name, "빨간 원이 둘 있다", reference) for reference in references)
    assert compute(name, "빨간 원이 둘 있다", *references) == best
    assert compute(name, "빨간 원") == 0.0  # no reference


def test_spacing_of_korean_does_not_change_chrf_and_rouge_l():
    for name in ("chrf", "rouge_l"):
        assert compute(name, "빨간원이있다", "빨간 원이 있다") == 1.0
    # ANLS counts each missing space as an edit: two of eight characters
    assert compute("anls", "빨간원이있다", "빨간 원이 있다") == pytest.approx(6 / 8)


def test_different_korean_answers_are_not_equal_because_of_a_shared_digit():
    assert compute("rouge_l", "파란 네모 3개", "빨간 원 3개") == pytest.approx(2 * 2 / (6 + 5))  # 3, 개
    assert compute("chrf", "파란 네모 3개", "빨간 원 3개") < 0.5


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("빨간 원이 있다.", ["빨", "간", "원", "이", "있", "다"]),
        ("A red circle, 3 of them!", ["a", "red", "circle", "3", "of", "them"]),
        ("iPhone15를 샀다", ["iphone15", "를", "샀", "다"]),
        ("원(圓)과 漢字 ㅋㅋ", ["원", "圓", "과", "漢", "字", "ㅋ", "ㅋ"]),
        ("snake_case don't 3.5%", ["snake", "case", "don", "t", "3", "5"]),
        ("...!?", []),
    ],
)
def test_rouge_l_splits_hangul_into_syllables_and_other_scripts_into_words(text, tokens):
    assert split_tokens(text) == tokens


def test_punctuation_and_case_do_not_change_rouge_l():
    assert compute("rouge_l", "빨간 원이 있다", "빨간 원이, 있다!") == 1.0
    assert compute("rouge_l", "A Red circle.", "a red circle") == 1.0
    assert compute("rouge_l", "빨간 원은", "빨간 원이") == pytest.approx(3 / 4)  # one particle of four syllables


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("서울역", "서울력", 2 / 3),
        ("ab", "ac", 0.0),  # the distance is half of the length: 0, as in the paper
        ("abc", "abd", 2 / 3),
        ("서울", "부산", 0.0),
        ("SEOUL", "seoul", 1.0),
        ("서울  특별시", "서울 특별시", 1.0),
        ("12,000원", "12000원", 6 / 7),
        ("정답은 서울역입니다", "서울역", 0.0),
    ],
)
def test_anls_is_zero_from_half_of_the_length_on(answer, reference, expected):
    assert compute("anls", answer, reference) == pytest.approx(expected)


def test_the_metrics_equal_those_of_torchmetrics_on_long_korean_text():
    answer, reference = LONG
    rouge = rouge_score(answer, reference, rouge_keys="rougeL", normalizer=lambda text: text, tokenizer=split_tokens)
    assert compute("rouge_l", answer, reference) == pytest.approx(rouge["rougeL_fmeasure"].item(), abs=1e-6)
    expected = chrf_score([answer], [[reference]], n_word_order=0).item()
    assert compute("chrf", answer, reference) == pytest.approx(expected, abs=1e-5)  # it computes in float32
    distance = edit_distance(answer, reference, reduction=None).item()
    assert compute("anls", answer, reference) == pytest.approx(1 - distance / max(map(len, LONG)))


def test_chrf_leaves_out_the_orders_that_a_short_answer_does_not_have():
    # 2 of 3 characters, no pair and no triple; orders 4 to 6 do not exist
    assert compute("chrf", "빨강원", "빨간원") == pytest.approx((2 / 3 + 0 + 0) / 3)
    # 3 of 4 and 5 characters, 2 of 3 and 4 pairs, 1 of 2 and 3 triples, 0 of 1 and 2 quadruples
    precision, recall = (3 / 4 + 2 / 3 + 1 / 2) / 4, (3 / 5 + 2 / 4 + 1 / 3) / 4
    expected = 5 * precision * recall / (4 * precision + recall)
    assert compute("chrf", "큰 빨간 원", "작은 빨간 원") == pytest.approx(expected)


@pytest.mark.parametrize("kind", list(SampleKind))
def test_each_kind_has_one_main_metric_and_numbers_have_no_other(kind):
    mains = [name for name, metric in METRICS.items() if metric.is_main and kind in metric.kinds]
    assert mains == [get_main_metric(kind)]
    if kind in (SampleKind.number, SampleKind.digit, SampleKind.arithmetic, SampleKind.grounding, SampleKind.ocr):
        assert list_text_metrics(kind) == []
    else:
        assert list_text_metrics(kind)


def test_a_registered_metric_is_computed_logged_and_named_in_reports(monkeypatch):
    """CONTRIBUTING's recipe: one entry in `METRICS`."""
    starts_right = take_best(lambda answer, reference: float(answer[:1] == reference[:1]))
    monkeypatch.setitem(METRICS, "first", AnswerMetric("first character", starts_right, (SampleKind.number,)))
    assert compute_text_scores(SampleKind.number, "470", ["47"]) == {"first": 1.0}
    assert compute_score(SampleKind.number, "470", "47") == 0.0  # the main metric stays
    assert "score/first/number_ko" in list_score_names()
    from lit_vlm.reports.report import _collect_text_scores

    figures = {"text_scores": {"after": {"first": {"number_ko": 0.5}}}}
    table = _collect_text_scores(RunRecord(None, {"figures": figures}, {}, [], [], ""))
    assert table == {
        "titles": ["first character"],
        "rows": [{"kind": "number", "language": "ko", "cells": ["0.50"]}],
    }
