"""Grounding in VARCO-VISION markup: `<obj>phrase</obj><bbox>x1, y1, x2, y2</bbox>`, scored by Acc@0.5 and mean IoU.

True and predicted boxes of a picture are matched one to one (`match_boxes`), whatever their phrases, since a model may call
one thing by another word. Both scores are divided by the larger number of boxes: a missing box costs as much as an
additional one. With one true and one predicted box they are the usual Acc@0.5 and IoU of RefCOCO. Boxes are not clipped:
the part outside of the picture counts as wrong area. A mention with an unreadable or reversed box is no box.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

from box_scores import MIN_IOU, BoxCorners, match_boxes, read_mentions
from task_rows import aggregate_percent as aggregate_percent
from task_rows import load_picture
from task_rows import load_pictures as load_pictures

REFCOCO_PROMPT = "<gro>\nFind this in the picture: {expression}"


def make_prompt(doc: dict[str, Any]) -> str:
    """Make the prompt: the question of the row behind `<gro>`, which asks for boxes."""
    question = str(doc["question"])
    return question if question.lstrip().startswith("<gro>") else f"<gro>\n{question}"


def score_answer(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Score one answer against the markup of the column `answer`."""
    return score_boxes(list_boxes(results[0]), list_boxes(str(doc["answer"])))


def split_expressions(dataset: Any) -> Any:
    """Make one row of each expression of RefCOCO (lmms-lab-encoder/RefCOCO): its column `answer` lists those of one object."""

    def split(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        rows = [(i, expression) for i, answers in enumerate(batch["answer"]) for expression in answers]
        columns = {name: [values[i] for i, _ in rows] for name, values in batch.items()}
        return columns | {"answer": [expression for _, expression in rows]}

    return dataset.map(split, batched=True, batch_size=16)


def make_refcoco_prompt(doc: dict[str, Any]) -> str:
    """Make the prompt of one expression."""
    return REFCOCO_PROMPT.format(expression=doc["answer"])


def score_refcoco_answer(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Score one answer against the column `bbox`: x, y, width and height in pixels."""
    width, height = load_picture(doc["image"]).size
    x, y, w, h = doc["bbox"]
    return score_boxes(list_boxes(results[0]), [(x / width, y / height, (x + w) / width, (y + h) / height)])


def list_boxes(text: str) -> list[BoxCorners]:
    """List the boxes of all readable mentions of objects in a text."""
    return [box for tag, _, boxes in read_mentions(text) if tag == "obj" for box in boxes]


def score_boxes(predicted: list[BoxCorners], expected: list[BoxCorners]) -> dict[str, float]:
    """Compute Acc@0.5 and mean IoU of one picture, 0 to 1. Without true boxes, an answer without boxes is right."""
    overlaps = match_boxes(predicted, expected)
    num_boxes = max(len(predicted), len(expected))
    return {
        "grounding_acc_50": sum(overlap >= MIN_IOU for overlap in overlaps) / num_boxes if num_boxes else 1.0,
        "grounding_iou": sum(overlaps) / num_boxes if num_boxes else 1.0,
        "grounding_unread": float(bool(expected) and not predicted),
        "grounding_outside": float(any(not _is_inside(box) for box in predicted)),
    }


def _is_inside(box: Iterable[float]) -> bool:
    return all(0 <= value <= 1 for value in box)
