"""VARCO-VISION markup: a grounded answer contains `<obj>phrase</obj><bbox>x1, y1, x2, y2</bbox>`.

Markup is written as structure: from `ControlToken` tokens, or parsed from a string that the data's owner declared to be
markup. The output of a model is parsed as text, since a model may write anything. Format: model card of
NCSOFT/VARCO-VISION-14B-HF.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from lit_vlm.evaluation.task_pack.box_scores import PHRASE_PATTERN, parse_box, read_mentions
from lit_vlm.types import SPECIAL_TOKENS, Box, ContentPart, ControlToken

BOX_DECIMALS = 3  # as in the release

_CONTROL = {token: ControlToken(token) for token in SPECIAL_TOKENS}
_FRACTION = r"(?:0(?:\.[0-9]+)?|1(?:\.0+)?)"
_STRICT_BOX = rf"{_FRACTION}(?:,\s*{_FRACTION}){{3}}"
_STRICT = re.compile(rf"{PHRASE_PATTERN}<bbox>(?P<boxes>{_STRICT_BOX}(?:<delim>{_STRICT_BOX})*)</bbox>")
_TASK = re.compile(r"(?P<space>\s*)(?P<task><gro>|<ocr>)")


def format_box(box: Box, decimals: int = BOX_DECIMALS) -> str:
    """Format a box as `x1, y1, x2, y2`, each as `str(round(v, decimals))`: `0.51`, not `0.510`.

    The release has no example of a box at the very edge; here 0 and 1 follow the same rule and become `0.0` and `1.0`.
    """
    assert 0 < decimals <= 4  # with more than four, str() of a small number gives 1e-05
    # Adding zero turns -0.0 into 0.0.
    return ", ".join([str(round(float(value), decimals) + 0.0) for value in (box.x1, box.y1, box.x2, box.y2)])


def build_object_mention(phrase: str, boxes: Box | Iterable[Box]) -> tuple[ContentPart, ...]:
    """Build the mention of an object; several boxes of one phrase share one `<bbox>`."""
    return _build_mention("obj", phrase, [format_box(box) for box in ((boxes,) if isinstance(boxes, Box) else boxes)])


def build_text_mention(text: str, box: Box) -> tuple[ContentPart, ...]:
    """Build the mention of a piece of written text."""
    return _build_mention("char", text, [format_box(box)])


def parse_markup(text: str) -> tuple[ContentPart, ...]:
    """Parse well-formed markup into `ControlToken` tokens; the rest stays text. The joined pieces equal the input text.

    Well-formed are `<gro>` or `<ocr>` at the start (whitespace may precede it), and a non-empty phrase with boxes of
    four numbers between 0 and 1, upper left corner first. Call it only if the owner of the data declared markup.
    """
    pieces: list[ContentPart] = []
    position = 0
    if task := _TASK.match(text):
        pieces += [task["space"], _CONTROL[task["task"]]]
        position = task.end()
    for found in _STRICT.finditer(text, position):
        boxes = found["boxes"].split("<delim>")
        if all(parse_box(box) for box in boxes):
            pieces.append(text[position : found.start()])
            pieces += _build_mention(found["tag"], found["phrase"], boxes)
            position = found.end()
    pieces.append(text[position:])
    return tuple(piece for piece in pieces if piece != "")


def parse_mentions(text: str) -> list[tuple[str, str, list[Box]]]:
    """Parse the mentions in a model's output, in order: ("obj" or "char", phrase, boxes).

    The output must be decoded with `skip_special_tokens=False`. `read_mentions` says what is readable.
    """
    return [(tag, phrase, [Box(*corners) for corners in boxes]) for tag, phrase, boxes in read_mentions(text)]


def _build_mention(tag: str, phrase: str, boxes: list[str]) -> tuple[ContentPart, ...]:
    """Build `<tag>phrase</tag><bbox>boxes</bbox>` from control tokens and text."""
    pieces: list[ContentPart] = [_CONTROL[f"<{tag}>"], phrase, _CONTROL[f"</{tag}>"], _CONTROL["<bbox>"]]
    for position, box in enumerate(boxes):
        pieces += [_CONTROL["<delim>"], box] if position else [box]
    pieces.append(_CONTROL["</bbox>"])
    return tuple(pieces)
