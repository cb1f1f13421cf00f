"""Questions of the exam on which a stage changed its mind, with their pictures and the answers before and after."""

from __future__ import annotations

import base64
import io
from typing import Any

from PIL import Image

from lit_vlm.evaluation.box_drawing import PREDICTED, REFERENCE, draw_boxes, parse_box_marks, resize_to_readable
from lit_vlm.evaluation.exam import ExamAnswers, ExamItem, find_item

MIN_CHANGE = 0.5  # of the score of a question, from which on its answer is shown
MAX_CARDS = 4  # better and worse answers of a stage, each of another kind


def collect_changed_answers(exams: list[tuple[str, ExamAnswers]]) -> list[dict[str, Any]]:
    """Collect the questions whose score changed much from one stage to the next: title, better and worse ones.

    A question is left out if this version does not make the same item any more.
    """
    stages = []
    for (_, before), (title, after) in zip(exams, exams[1:], strict=False):
        earlier = {(row["id"], row["content"]): row for row in before.rows}
        pairs = [(earlier[key], row) for row in after.rows if (key := (row["id"], row["content"])) in earlier]
        changed = {
            "better": _choose_cards([pair for pair in pairs if pair[1]["score"] - pair[0]["score"] >= MIN_CHANGE]),
            "worse": _choose_cards([pair for pair in pairs if pair[0]["score"] - pair[1]["score"] >= MIN_CHANGE]),
        }
        stages.append({"title": title, **changed})
    return [stage for stage in stages if stage["better"] or stage["worse"]]


def _choose_cards(pairs: list[tuple[dict[str, Any], dict[str, Any]]]) -> list[dict[str, Any]]:
    """Choose the first question of each kind, in both languages by turns, and make its card."""
    cards: list[dict[str, Any]] = []
    for kind in dict.fromkeys(row["kind"] for row, _ in pairs):
        of_kind = [pair for pair in pairs if pair[0]["kind"] == kind]
        wanted = ("ko", "en")[len(cards) % 2]
        before, after = next((pair for pair in of_kind if pair[0]["language"] == wanted), of_kind[0])
        item = find_item(after)
        if item is not None:
            cards.append(_make_card(item, before, after))
        if len(cards) == MAX_CARDS:
            break
    return cards


def _make_card(item: ExamItem, before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    images = [image.load() for image in item.sample.images]
    marks = parse_box_marks(after["reference"], REFERENCE, label_chars=False)
    marks += parse_box_marks(after["answer"], PREDICTED, label_below=True, label_chars=False)
    shown = [draw_boxes(image, marks) if marks else resize_to_readable(image) for image in images]
    return {
        "kind": str(item.kind).replace("_", " "),
        "language": after["language"],
        "difficulty": "hard" if after["hard"] else "easy",
        "prompt": item.sample.messages[-2].text.strip(),
        "reference": after["reference"],
        "pictures": [_encode_picture(image) for image in shown],
        "answers": [{"phase": name, **row} for name, row in (("before", before), ("after", after))],
    }


def _encode_picture(image: Image.Image) -> str:
    """Encode an image as a data: URL."""
    buffer = io.BytesIO()
    image.convert("P", palette=Image.Palette.ADAPTIVE, colors=64).save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
