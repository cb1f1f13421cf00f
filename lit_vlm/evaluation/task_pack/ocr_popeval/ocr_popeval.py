"""Text recognition with boxes, scored by PopEval: CORD v2, ICDAR 2013 (focused scene text) and ICDAR 2015 (incidental).

The prompt is `<ocr>`, and an answer is in VARCO-VISION markup: `<char>text</char><bbox>x1, y1, x2, y2</bbox>`, one a line.
VARCO-VISION published PopEval's H of these three sets; how it prepared CORD is not published. Here the words of CORD are
compared, and all predictions that lie mostly on text marked as unreadable are left out.
"""

from __future__ import annotations

import json
import re
import sys
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

from box_scores import read_mentions
from popeval import DO_NOT_CARE, CharacterCounts, TextRegion, compute_popeval, count_characters, make_region
from task_rows import aggregate_percent as aggregate_percent
from task_rows import load_picture
from task_rows import load_pictures as load_pictures

_ICDAR_2015 = re.compile(r"\s*((?:-?\d+\s*,\s*){8})(.*)")
_ICDAR_2013 = re.compile(r"\s*(-?\d+)[,\s]\s*(-?\d+)[,\s]\s*(-?\d+)[,\s]\s*(-?\d+)[,\s]\s*\"(.*)\"\s*$")


def make_prompt(doc: dict[str, Any]) -> str:
    """Make the prompt of VARCO-VISION's text recognition."""
    return "<ocr>"


def get_target(doc: dict[str, Any]) -> str:
    """Get the true texts, one a line, for the log of samples."""
    return "\n".join(region.text for region in parse_ground_truth(doc["ground_truth"]))


def score_answer(doc: dict[str, Any], results: list[str]) -> dict[str, Any]:
    """Count the characters of one answer for PopEval; `popeval_unread` is 1 for an answer without a readable line."""
    width, height = load_picture(doc["image"]).size
    predicted = read_regions(results[0], width, height)
    counts = count_characters(predicted, parse_ground_truth(doc["ground_truth"]))
    shared = [counts.taken, counts.predicted, counts.expected]
    return {
        "popeval_h": shared,
        "popeval_precision": shared,
        "popeval_recall": shared,
        "popeval_unread": float(not predicted),
    }


def aggregate_h(counts: Iterable[list[int]]) -> float:
    """Compute the harmonic mean of precision and recall over the whole set, in percent."""
    return 100 * compute_popeval(CharacterCounts(*count) for count in counts)["h"]


def aggregate_precision(counts: Iterable[list[int]]) -> float:
    """Compute the precision over the whole set, in percent."""
    return 100 * compute_popeval(CharacterCounts(*count) for count in counts)["precision"]


def aggregate_recall(counts: Iterable[list[int]]) -> float:
    """Compute the recall over the whole set, in percent."""
    return 100 * compute_popeval(CharacterCounts(*count) for count in counts)["recall"]


def read_regions(answer: str, width: int, height: int) -> list[TextRegion]:
    """Read the text lines of an answer; their boxes become pixels. Unreadable lines are left out.

    A line with several boxes counts once for each box. Boxes outside of the picture stay where they are.
    """
    return [
        _make_rectangle(unicodedata.normalize("NFC", phrase), (x1 * width, y1 * height, x2 * width, y2 * height))
        for tag, phrase, boxes in read_mentions(answer)
        if tag == "char"
        for x1, y1, x2, y2 in boxes
    ]


def parse_ground_truth(text: str) -> list[TextRegion]:
    """Parse the true texts of a picture: JSON of CORD, or the lines of an ICDAR 2013 or 2015 file.

    Raises:
        ValueError: a line has none of these forms.
    """
    text = text.lstrip("\ufeff")
    if text.lstrip().startswith("{"):
        return _parse_cord(json.loads(text))
    regions = []
    for number, line in enumerate(text.splitlines(), start=1):
        line = line.lstrip("\ufeff")
        if not line.strip():
            continue
        if match := _ICDAR_2015.fullmatch(line):
            values = [int(value) for value in match[1].split(",") if value.strip()]
            corners = list(zip(values[::2], values[1::2], strict=True))
            regions.append(make_region(unicodedata.normalize("NFC", match[2]), corners))
        elif match := _ICDAR_2013.fullmatch(line):
            word = re.sub(r'\\(["\\])', r"\1", match[5])  # ICDAR 2013 escapes quotation marks and backslashes
            regions.append(_make_rectangle(unicodedata.normalize("NFC", word), [float(match[i]) for i in range(1, 5)]))
        else:
            raise ValueError(
                f"line {number} of the ground truth is neither 'x1,y1,...,x4,y4,text' nor 'x1, y1, x2, y2, \"text\"': {line!r}"
            )
    return regions


def _parse_cord(content: dict[str, Any]) -> list[TextRegion]:
    words = [word for line in content["valid_line"] for word in line["words"]]
    regions = [
        make_region(unicodedata.normalize("NFC", str(word["text"])), _list_corners(word["quad"])) for word in words
    ]
    return regions + [make_region(DO_NOT_CARE, _list_corners(quad)) for quad in _iter_quads(content.get("dontcare"))]


def _list_corners(quad: dict[str, float]) -> list[tuple[float, float]]:
    return [(quad[f"x{i}"], quad[f"y{i}"]) for i in range(1, 5)]


def _iter_quads(value: Any) -> Iterable[dict[str, float]]:
    """Iterate over the quadrilaterals in nested lists and dictionaries."""
    if isinstance(value, dict) and "x1" in value:
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _iter_quads(item)


def _make_rectangle(text: str, box: Iterable[float]) -> TextRegion:
    x1, y1, x2, y2 = box
    return make_region(text, [(x1, y1), (x2, y1), (x2, y2), (x1, y2)])
