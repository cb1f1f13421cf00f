"""PopEval: character-level score of text recognition with boxes (arXiv 1908.11060; naver/popeval).

Each true text takes its characters away from the texts of the predictions that touch its polygon. The characters taken are
correct. Precision is their share of all predicted characters, recall their share of all true characters, both over the
whole set; H is the harmonic mean. So one prediction may cover several words, or a word several predictions.

Unlike the published script, this is a loop (no recursion limit), a true text without area is no error, and one bad file
never disappears from the sums. Corners are whole pixels, and contact is computed in whole numbers, so that polygons
that only touch are found exactly. A hull may be a line or a point: boxes without area occur in answers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

DO_NOT_CARE = "###"  # transcription of unreadable text in ICDAR 2015
MAX_DO_NOT_CARE_SHARE = 0.5  # a prediction with more of its area on such text is left out

Corner = tuple[int, int]
Polygon = tuple[Corner, ...]  # convex hull in one direction, without corners on a straight line


@dataclass(frozen=True)
class TextRegion:
    """A text and the convex hull of its corners, in pixels."""

    text: str
    polygon: Polygon


@dataclass(frozen=True)
class CharacterCounts:
    """Numbers of characters of one or several images: taken from predictions, predicted, and true."""

    taken: int
    predicted: int
    expected: int


def make_region(text: str, corners: Iterable[tuple[float, float]]) -> TextRegion:
    """Make a region from a text and its corners in pixels, which are rounded to whole pixels."""
    return TextRegion(text, make_hull((round(x), round(y)) for x, y in corners))


def count_characters(predicted: Sequence[TextRegion], expected: Sequence[TextRegion]) -> CharacterCounts:
    """Count the characters of one image. True regions without text are left out."""
    predicted, expected = _leave_out_unreadable(predicted, [region for region in expected if region.text])
    num_expected = sum(len(region.text) for region in expected)
    rest = [region.text for region in expected]
    return CharacterCounts(
        num_expected - _take_characters(predicted, expected, rest), sum(len(p.text) for p in predicted), num_expected
    )


def _leave_out_unreadable(
    predicted: Sequence[TextRegion], expected: Sequence[TextRegion]
) -> tuple[list[TextRegion], list[TextRegion]]:
    """Leave out true regions marked as unreadable, and the predictions that lie mostly on one of them."""
    unreadable = [region.polygon for region in expected if region.text == DO_NOT_CARE]

    def is_on_unreadable(prediction: TextRegion) -> bool:
        area = compute_area(prediction.polygon)
        return area > 0 and any(
            compute_shared_area(polygon, prediction.polygon) / area > MAX_DO_NOT_CARE_SHARE for polygon in unreadable
        )

    return (
        [prediction for prediction in predicted if not is_on_unreadable(prediction)],
        [region for region in expected if region.text != DO_NOT_CARE],
    )


def _take_characters(predicted: Sequence[TextRegion], expected: Sequence[TextRegion], rest: list[str]) -> int:
    """Take characters until no true text finds one, and return the number of true characters that are left.

    A true text that can take from only one prediction is served first, the nearest to the upper left corner before the
    others. If there is none, the nearest of the others takes from the prediction that covers the largest share of it (from
    all, if several cover it equally).
    """
    left = [prediction.text for prediction in predicted]
    touching = [
        [j for j, prediction in enumerate(predicted) if is_touching(region.polygon, prediction.polygon)]
        for region in expected
    ]
    distances = [math.hypot(*find_inner_point(region.polygon)) for region in expected]
    while True:
        candidates = {i: [j for j in near if set(rest[i]) & set(left[j])] for i, near in enumerate(touching) if rest[i]}
        served = [i for i, found in candidates.items() if len(found) == 1] or [
            i for i, found in candidates.items() if found
        ]
        if not served:
            return sum(map(len, rest))
        i = min(served, key=lambda k: distances[k])
        for j in _choose_best(expected[i], [(j, predicted[j]) for j in candidates[i]]):
            rest[i], left[j] = _remove_shared(rest[i], left[j])


def _choose_best(region: TextRegion, candidates: list[tuple[int, TextRegion]]) -> list[int]:
    """Choose the candidates that cover the largest share of a region; several if they cover equal shares."""
    if len(candidates) == 1:
        return [candidates[0][0]]
    shares = {j: compute_shared_area(candidate.polygon, region.polygon) for j, candidate in candidates}
    best = max(shares.values())
    # Equal shares in whole numbers may differ in the last bits after clipping.
    return [j for j, share in shares.items() if math.isclose(share, best, rel_tol=1e-12)]


def _remove_shared(expected: str, predicted: str) -> tuple[str, str]:
    """Remove the characters that two texts share, one by one from the left: what is left of both."""
    kept = []
    for character in expected:
        if character in predicted:
            predicted = predicted.replace(character, "", 1)
        else:
            kept.append(character)
    return "".join(kept), predicted


def compute_popeval(counts: Iterable[CharacterCounts]) -> dict[str, float]:
    """Compute precision, recall and their harmonic mean over all images, 0 to 1."""
    counts = list(counts)
    taken = sum(count.taken for count in counts)
    precision = _divide(taken, sum(count.predicted for count in counts))
    recall = _divide(taken, sum(count.expected for count in counts))
    return {"precision": precision, "recall": recall, "h": _divide(2 * precision * recall, precision + recall)}


def _divide(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else 0.0


# ---- convex polygons


def make_hull(corners: Iterable[Corner]) -> Polygon:
    """Make the convex hull of corners (Andrew's monotone chain): 3 or more corners, 2 for a line, 1 for a point."""
    points = sorted(set(corners))
    if len(points) <= 2:
        return tuple(points)
    lower, upper = _make_chain(points), _make_chain(reversed(points))
    return tuple(lower[:-1] + upper[:-1])


def _make_chain(points: Iterable[Corner]) -> list[Corner]:
    chain: list[Corner] = []
    for point in points:
        while len(chain) >= 2 and _compute_turn(chain[-2], chain[-1], point) <= 0:
            chain.pop()
        chain.append(point)
    return chain


def _compute_turn(a: Corner, b: Corner, c: Corner) -> int:
    """Compute the cross product of ab and ac: positive for a turn to the left, 0 for a straight line."""
    return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])


def compute_area(polygon: Sequence[tuple[float, float]]) -> float:
    """Compute the area of a polygon in square pixels; 0 for a line or a point."""
    ring = zip(polygon, [*polygon[1:], *polygon[:1]], strict=True)
    return abs(sum(x1 * y2 - x2 * y1 for (x1, y1), (x2, y2) in ring)) / 2


def is_touching(a: Polygon, b: Polygon) -> bool:
    """Return True if two convex polygons share at least one point, be it on their edges (separating axis theorem)."""
    for axis_x, axis_y in [*_list_axes(a), *_list_axes(b), (1, 0), (0, 1)]:
        along_a = [x * axis_x + y * axis_y for x, y in a]
        along_b = [x * axis_x + y * axis_y for x, y in b]
        if max(along_a) < min(along_b) or max(along_b) < min(along_a):
            return False
    return True


def _list_axes(polygon: Polygon) -> list[Corner]:
    """List the normals of all edges, and for a line also its direction."""
    edges = [(x2 - x1, y2 - y1) for (x1, y1), (x2, y2) in zip(polygon, polygon[1:] + polygon[:1], strict=True)]
    normals = [(-dy, dx) for dx, dy in edges if (dx, dy) != (0, 0)]
    return normals + (edges if len(polygon) == 2 else [])


def compute_shared_area(a: Polygon, b: Polygon) -> float:
    """Compute the area that two convex polygons share, in square pixels (Sutherland and Hodgman's clipping)."""
    if len(a) < 3 or len(b) < 3:
        return 0.0
    shared: list[tuple[float, float]] = [(float(x), float(y)) for x, y in a]
    for start, end in zip(b, b[1:] + b[:1], strict=True):
        shared = _clip(shared, start, end)
    return compute_area(shared)


def _clip(polygon: list[tuple[float, float]], start: Corner, end: Corner) -> list[tuple[float, float]]:
    """Clip a polygon to the left side of the line from start to end."""
    kept: list[tuple[float, float]] = []
    sides = [
        (end[0] - start[0]) * (y - start[1]) - (end[1] - start[1]) * (x - start[0]) for x, y in polygon
    ]  # positive on the left
    for i, ((x, y), side) in enumerate(zip(polygon, sides, strict=True)):
        (x0, y0), side0 = polygon[i - 1], sides[i - 1]
        if (side < 0) != (side0 < 0):
            share = side0 / (side0 - side)
            kept.append((x0 + share * (x - x0), y0 + share * (y - y0)))
        if side >= 0:
            kept.append((x, y))
    return kept


def find_inner_point(polygon: Polygon) -> tuple[float, float]:
    """Find a point inside a polygon as GEOS does (`representative_point` of shapely).

    It lies in the middle of the polygon on a horizontal line. That line is halfway between the two corners whose heights
    enclose the middle of the bounding box. For a line or a point it is the first corner.
    """
    if len(polygon) < 3:
        return polygon[0]
    heights = [y for _, y in polygon]
    middle = (min(heights) + max(heights)) / 2
    below = max(y for y in heights if y <= middle)
    above = min(y for y in heights if y > middle)
    height = (below + above) / 2
    crossings = [
        x1 + (height - y1) * (x2 - x1) / (y2 - y1)
        for (x1, y1), (x2, y2) in zip(polygon, polygon[1:] + polygon[:1], strict=True)
        if min(y1, y2) <= height <= max(y1, y2) and y1 != y2
    ]
    return (min(crossings) + max(crossings)) / 2, height
