"""Scores of an answer against its reference, by kind of sample, from 0 to 1. The metric is the mean over samples."""

from __future__ import annotations

import math
import re
import unicodedata

from lit_vlm.data.markup import parse_mentions
from lit_vlm.types import Box, SampleKind

MIN_IOU = 0.5  # minimum overlap with the true box for a text line to count as found

_END = re.compile(r"(?:\s|<\|im_end\|>)+$")


def compute_score(kind: SampleKind, prediction: str, reference: str) -> float:
    """Compute the score of an answer, 0 to 1, with the metric of its kind.

    - `grounding`: `compute_boxes_match`, 0 or 1.
    - `ocr`: `compute_text_line_f1`, between 0 and 1.
    - all others: exact match, 0 or 1.

    Both texts are NFC-normalised and lose surrounding white space and a trailing `<|im_end|>`; upper and lower case
    differ. A prediction whose markup cannot be parsed scores 0. A reference without valid markup needs an exact match, for
    every kind.
    """
    prediction, reference = normalize_answer(prediction), normalize_answer(reference)
    if kind is SampleKind.grounding and parse_mentions(reference):
        return compute_boxes_match(prediction, reference)
    if kind is SampleKind.ocr and _find_text_lines(reference):
        return compute_text_line_f1(prediction, reference)
    return float(prediction == reference)


def normalize_answer(text: str) -> str:
    """Normalise a text to NFC, without surrounding white space and trailing `<|im_end|>`."""
    return _END.sub("", unicodedata.normalize("NFC", text)).strip()


def compute_boxes_match(prediction: str, reference: str) -> float:
    """Compute an exact match of phrases and boxes: 1 if both texts have the same phrases with boxes that are equal after
    rounding to tenths, else 0.

    The words around the mentions, the order of the mentions and the order of one phrase's boxes do not matter. A missing
    or an additional mention is wrong.
    """
    return float(_extract_rounded_mentions(prediction) == _extract_rounded_mentions(reference))


def compute_text_line_f1(prediction: str, reference: str) -> float:
    """Compute F1 over text lines (`<char>` mentions): lines match one to one, with equal text and IoU >= 0.5."""
    predicted, expected = _find_text_lines(prediction), _find_text_lines(reference)
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
    return 2 * len(matched_predicted) / (len(predicted) + len(expected)) if predicted or expected else 0.0


def compute_iou(a: Box, b: Box) -> float:
    """Compute intersection over union; 1 for equal boxes, also for boxes without area."""
    if a == b:
        return 1.0
    width = min(a.x2, b.x2) - max(a.x1, b.x1)
    height = min(a.y2, b.y2) - max(a.y1, b.y1)
    shared = max(width, 0.0) * max(height, 0.0)
    union = _compute_area(a) + _compute_area(b) - shared
    return shared / union if union > 0 else 0.0


def _compute_area(box: Box) -> float:
    return max(box.x2 - box.x1, 0.0) * max(box.y2 - box.y1, 0.0)


def _find_text_lines(text: str) -> list[tuple[str, Box]]:
    return [(phrase, box) for tag, phrase, boxes in parse_mentions(text) if tag == "char" for box in boxes]


def _extract_rounded_mentions(text: str) -> list[tuple[str, str, list[tuple[int, ...]]]]:
    return sorted(
        (tag, phrase, sorted(_convert_to_tenths(box) for box in boxes)) for tag, phrase, boxes in parse_mentions(text)
    )


def _convert_to_tenths(box: Box) -> tuple[int, ...]:
    # Halves round up; Python's own round() rounds them to the even neighbour.
    return tuple(math.floor(10 * value + 0.5) for value in (box.x1, box.y1, box.x2, box.y2))
