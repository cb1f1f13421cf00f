"""Boxes in VARCO-VISION markup: read from an answer as text, and compared with the true boxes.

A model may write anything, so unreadable markup is an ordinary case here and never an error.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

BoxCorners = tuple[float, float, float, float]  # x1, y1, x2, y2 as fractions of the width and the height of the image

# The nine special tokens of VARCO-VISION, as in `lit_vlm.types.SPECIAL_TOKENS`
CONTROL_TOKENS = ("<gro>", "<ocr>", "<char>", "</char>", "<obj>", "</obj>", "<bbox>", "</bbox>", "<delim>")
_ANY_TOKEN = "|".join(re.escape(token) for token in CONTROL_TOKENS)
# A phrase ends at the first control token, so an unclosed <obj> cannot swallow the mention that follows it.
PHRASE_PATTERN = rf"<(?P<tag>obj|char)>(?P<phrase>(?:(?!{_ANY_TOKEN}).)+)</(?P=tag)>"
_MENTION = re.compile(rf"{PHRASE_PATTERN}\s*<bbox>(?P<boxes>[^<]*(?:<delim>[^<]*)*)</bbox>", re.DOTALL)

MIN_IOU = 0.5  # overlap from which a box counts as found: the Acc@0.5 of RefCOCO


def read_mentions(text: str) -> list[tuple[str, str, list[BoxCorners]]]:
    """Read the mentions in an answer, in order: ("obj" or "char", phrase, boxes).

    Spaces are optional and numbers may be outside of 0..1. A mention is left out if one of its boxes is not four finite
    numbers with the upper left corner first.
    """
    mentions = []
    for found in _MENTION.finditer(text):
        boxes = [parse_box(box) for box in found["boxes"].split("<delim>")]
        if None not in boxes:
            mentions.append((found["tag"], found["phrase"].strip(), [box for box in boxes if box]))
    return mentions


def parse_box(text: str) -> BoxCorners | None:
    """Parse `x1, y1, x2, y2`: four finite numbers, upper left corner first; None if it is no box."""
    try:
        values = tuple(float(value) for value in text.split(","))
    except ValueError:
        return None
    if len(values) != 4 or not all(map(math.isfinite, values)):
        return None
    x1, y1, x2, y2 = values
    return (x1, y1, x2, y2) if x1 <= x2 and y1 <= y2 else None


def compute_box_iou(a: BoxCorners, b: BoxCorners) -> float:
    """Compute intersection over union, 0 to 1; 1 for equal boxes, also for boxes without area."""
    if a == b:
        return 1.0
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0.0) * max(height, 0.0)
    union = _compute_area(a) + _compute_area(b) - shared
    return shared / union if union > 0 else 0.0


def _compute_area(box: BoxCorners) -> float:
    return max(box[2] - box[0], 0.0) * max(box[3] - box[1], 0.0)


def match_boxes(predicted: Sequence[BoxCorners], expected: Sequence[BoxCorners]) -> list[float]:
    """Match boxes one to one and return the overlaps (IoU) of the matched pairs.

    Of all assignments the one with the most pairs of IoU >= 0.5 is taken, and among these the one with the largest sum of
    IoU (Hungarian algorithm). Pairs without overlap are left out.
    """
    from scipy.optimize import linear_sum_assignment

    if not predicted or not expected:
        return []
    overlaps = [[compute_box_iou(box, true_box) for true_box in expected] for box in predicted]
    # One pair that counts weighs more than the IoU of all pairs together.
    bonus = 1 + min(len(predicted), len(expected))
    rows, columns = linear_sum_assignment(
        [[overlap + bonus * (overlap >= MIN_IOU) for overlap in row] for row in overlaps], maximize=True
    )
    matched = [overlaps[row][column] for row, column in zip(rows, columns, strict=True)]
    return [overlap for overlap in matched if overlap > 0]
