"""One answer against its reference, by kind. Scores lie in 0..1; a mean over samples is the metric."""

from __future__ import annotations

import math
import re
import unicodedata

from lit_vlm.data.markup import boxes_of
from lit_vlm.types import Box, Kind

MIN_IOU = 0.5  # a text line is found when its box overlaps the true one at least so much

_END = re.compile(r"(?:\s|<\|im_end\|>)+$")


def score(kind: Kind, prediction: str, reference: str) -> float:
    """How right an answer is, by the measure of its kind.

    - `grounding`: `boxes_match`, 0 or 1.
    - `ocr`: `text_line_f1`, between 0 and 1.
    - all others: exact match, 0 or 1.

    Both texts are NFC-normalised and lose surrounding white space and a trailing `<|im_end|>`; upper and lower case
    differ. A prediction whose markup cannot be read scores 0. A reference without readable markup, whatever its kind,
    asks for an exact match.
    """
    prediction, reference = normalise(prediction), normalise(reference)
    if kind is Kind.grounding and boxes_of(reference):
        return boxes_match(prediction, reference)
    if kind is Kind.ocr and _text_lines(reference):
        return text_line_f1(prediction, reference)
    return float(prediction == reference)


def normalise(text: str) -> str:
    """NFC, without surrounding white space and trailing `<|im_end|>`."""
    return _END.sub("", unicodedata.normalize("NFC", text)).strip()


def boxes_match(prediction: str, reference: str) -> float:
    """Boxes to a tenth: 1 if the same phrases are mentioned, each with boxes equal after rounding to tenths, else 0.

    The words around the mentions, the order of the mentions and of one phrase's boxes are free. A missing or a further
    mention is wrong.
    """
    return float(_mentions_in_tenths(prediction) == _mentions_in_tenths(reference))


def text_line_f1(prediction: str, reference: str) -> float:
    """F1 over the text lines (`<char>` mentions): found, one to one, when texts are equal and IoU is >= 0.5."""
    found, wanted = _text_lines(prediction), _text_lines(reference)
    overlaps = [
        (iou(box, true_box), i, j)
        for i, (phrase, box) in enumerate(found)
        for j, (true_phrase, true_box) in enumerate(wanted)
        if phrase == true_phrase
    ]
    # Best overlaps first: of two equal words, each takes its own place.
    used_found: set[int] = set()
    used_wanted: set[int] = set()
    for overlap, i, j in sorted(overlaps, key=lambda pair: -pair[0]):
        if overlap >= MIN_IOU and i not in used_found and j not in used_wanted:
            used_found.add(i)
            used_wanted.add(j)
    return 2 * len(used_found) / (len(found) + len(wanted)) if found or wanted else 0.0


def iou(a: Box, b: Box) -> float:
    """Intersection over union; 1 for equal boxes, also those without an area."""
    if a == b:
        return 1.0
    width = min(a.x2, b.x2) - max(a.x1, b.x1)
    height = min(a.y2, b.y2) - max(a.y1, b.y1)
    shared = max(width, 0.0) * max(height, 0.0)
    union = _area(a) + _area(b) - shared
    return shared / union if union > 0 else 0.0


def _area(box: Box) -> float:
    return max(box.x2 - box.x1, 0.0) * max(box.y2 - box.y1, 0.0)


def _text_lines(text: str) -> list[tuple[str, Box]]:
    return [(phrase, box) for tag, phrase, boxes in boxes_of(text) if tag == "char" for box in boxes]


def _mentions_in_tenths(text: str) -> list[tuple[str, str, list[tuple[int, ...]]]]:
    return sorted((tag, phrase, sorted(_tenths(box) for box in boxes)) for tag, phrase, boxes in boxes_of(text))


def _tenths(box: Box) -> tuple[int, ...]:
    # Halves go up; Python's own round() goes to the even neighbour.
    return tuple(math.floor(10 * value + 0.5) for value in (box.x1, box.y1, box.x2, box.y2))
