"""Metrics of an answer against its references, from 0 to 1. The score of a run is the mean over samples.

`METRICS` is the one place where a metric is registered: `Samples`, metrics.csv, W&B, the reports and the checks of a sweep
read it. All functions get texts from `normalize_answer`: in NFC a Hangul syllable is one character. The scores that the
tasks of `task_pack/` share stand there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rapidfuzz.distance import Levenshtein

from lit_vlm.data.markup import parse_mentions
from lit_vlm.evaluation.task_pack.box_scores import MIN_IOU, compute_box_iou
from lit_vlm.evaluation.task_pack.text_scores import compute_chrf, compute_rouge_l, normalize_answer, take_best
from lit_vlm.types import Box, SampleKind

MetricFunction = Callable[[str, Sequence[str]], float]  # of an answer and its references


@dataclass(frozen=True, slots=True)
class AnswerMetric:
    """Metric of answers.

    Args:
        title: heading in reports.
        compute: function of an answer and its references, both normalised.
        kinds: kinds of samples whose answers it scores.
        is_main: it gives the one score of its kinds, `score/<kind>_<language>`. Each kind has one main metric. The others
            are logged as `score/<metric>/<kind>_<language>`.
        higher_is_better: direction, for the best value of several runs.
    """

    title: str
    compute: MetricFunction
    kinds: tuple[SampleKind, ...]
    is_main: bool = False
    higher_is_better: bool = True


def compute_score(kind: SampleKind, prediction: str, reference: str) -> float:
    """Compute the score of an answer, 0 to 1, with the main metric of its kind.

    - `grounding`: `compute_boxes_match`, 0 or 1.
    - `ocr`: `compute_text_line_f1`, between 0 and 1.
    - all others: exact match, 0 or 1.

    Both texts are NFC-normalised and lose surrounding white space and a trailing `<|im_end|>`; upper and lower case
    differ. A prediction whose markup cannot be parsed scores 0. A reference without valid markup needs an exact match, for
    every kind.
    """
    metric = METRICS[get_main_metric(kind)]
    return metric.compute(normalize_answer(prediction), [normalize_answer(reference)])


def compute_text_scores(kind: SampleKind, prediction: str, references: Sequence[str]) -> dict[str, float]:
    """Compute the scores of an answer with all metrics of its kind beside the main metric: name -> score, 0 to 1."""
    prediction, references = normalize_answer(prediction), [normalize_answer(reference) for reference in references]
    return {name: METRICS[name].compute(prediction, references) for name in list_text_metrics(kind)}


def get_main_metric(kind: SampleKind) -> str:
    """Return the name of the metric that gives the score of a kind."""
    return next(name for name, metric in METRICS.items() if metric.is_main and kind in metric.kinds)


def list_text_metrics(kind: SampleKind) -> list[str]:
    """List the names of the metrics that score a kind beside its main metric."""
    return [name for name, metric in METRICS.items() if not metric.is_main and kind in metric.kinds]


def list_score_names(languages: Sequence[str] = ("ko", "en")) -> list[str]:
    """List the names under which scores are logged: `score/word_ko`, `score/anls/word_ko`, ..."""
    prefixes = [(kind, "") for kind in SampleKind]
    prefixes += [(kind, f"{name}/") for kind in SampleKind for name in list_text_metrics(kind)]
    return [f"score/{prefix}{kind.value}_{language}" for kind, prefix in prefixes for language in languages]


# ---- text


def compute_exact_match(answer: str, reference: str) -> float:
    """Compute an exact match, 0 or 1."""
    return float(answer == reference)


def compute_anls(answer: str, reference: str) -> float:
    """Compute the normalised Levenshtein similarity of ANLS (arXiv 1905.13648), on characters in lower case.

    It is 1 - distance / length of the longer text, and 0 if that distance is half of the length or more. Several spaces
    count as one.
    """
    answer, reference = (" ".join(text.lower().split()) for text in (answer, reference))
    length = max(len(answer), len(reference))
    distance = Levenshtein.distance(answer, reference)
    if not length:
        return 1.0
    return 1 - distance / length if 2 * distance < length else 0.0


# ---- boxes


def compute_boxes_match(prediction: str, reference: str) -> float:
    """Compute an exact match of phrases and boxes: 1 if both texts have the same phrases with boxes that are equal after
    rounding to tenths, else 0.

    The words around the mentions, the order of the mentions and the order of one phrase's boxes do not matter. A missing
    or an additional mention is wrong. A reference without mentions needs an exact match of the text.
    """
    expected = _extract_rounded_mentions(reference)
    return float(_extract_rounded_mentions(prediction) == expected if expected else prediction == reference)


def compute_text_line_f1(prediction: str, reference: str) -> float:
    """Compute F1 over text lines (`<char>` mentions): lines match one to one, with equal text and IoU >= 0.5.

    A reference without text lines needs an exact match of the text.
    """
    predicted, expected = _find_text_lines(prediction), _find_text_lines(reference)
    if not expected:
        return float(prediction == reference)
    overlaps = [
        (compute_iou(box, true_box), i, j)
        for i, (phrase, box) in enumerate(predicted)
        for j, (true_phrase, true_box) in enumerate(expected)
        if phrase == true_phrase
    ]
    # Best overlaps first, so that two equal words match their own boxes.
    matched_predicted: set[int] = set()
    matched_expected: set[int] = set()
    for overlap, i, j in sorted(overlaps, key=lambda pair: -pair[0]):
        if overlap >= MIN_IOU and i not in matched_predicted and j not in matched_expected:
            matched_predicted.add(i)
            matched_expected.add(j)
    return 2 * len(matched_predicted) / (len(predicted) + len(expected))


def compute_iou(a: Box, b: Box) -> float:
    """Compute intersection over union; 1 for equal boxes, also for boxes without area."""
    return compute_box_iou((a.x1, a.y1, a.x2, a.y2), (b.x1, b.y1, b.x2, b.y2))


def _find_text_lines(text: str) -> list[tuple[str, Box]]:
    return [(phrase, box) for tag, phrase, boxes in parse_mentions(text) if tag == "char" for box in boxes]


def _extract_rounded_mentions(text: str) -> list[tuple[str, str, list[tuple[int, ...]]]]:
    return sorted(
        (tag, phrase, sorted(_convert_to_tenths(box) for box in boxes)) for tag, phrase, boxes in parse_mentions(text)
    )


def _convert_to_tenths(box: Box) -> tuple[int, ...]:
    # Halves round up; Python's own round() rounds them to the even neighbour.
    return tuple(math.floor(10 * value + 0.5) for value in (box.x1, box.y1, box.x2, box.y2))


# ---- the registry

_BOX_KINDS = (SampleKind.grounding, SampleKind.ocr)
# Numbers have none of the metrics below: 470 instead of 47 is wrong, and not nearly right.
_FREE_TEXT = (
    SampleKind.caption,
    SampleKind.image_only,
    SampleKind.instruction,
    SampleKind.multi_image,
    SampleKind.text,
    SampleKind.preference,
    SampleKind.other,
)
# Instructions are long answers or the short ones of VQA, so both groups have them.
_SHORT_ANSWERS = (
    SampleKind.word,
    SampleKind.document,
    SampleKind.table,
    SampleKind.chart,
    SampleKind.referring,
    SampleKind.instruction,
    SampleKind.multi_image,
)
METRICS: dict[str, AnswerMetric] = {
    "exact": AnswerMetric(
        title="exact match",
        compute=take_best(compute_exact_match),
        kinds=tuple(kind for kind in SampleKind if kind not in _BOX_KINDS),
        is_main=True,
    ),
    "boxes": AnswerMetric("boxes", take_best(compute_boxes_match), (SampleKind.grounding,), is_main=True),
    "text_lines": AnswerMetric("text lines", take_best(compute_text_line_f1), (SampleKind.ocr,), is_main=True),
    "chrf": AnswerMetric("chrF", compute_chrf, _FREE_TEXT),
    "rouge_l": AnswerMetric("ROUGE-L", take_best(compute_rouge_l), _FREE_TEXT),
    "anls": AnswerMetric("ANLS", take_best(compute_anls), _SHORT_ANSWERS),
}
