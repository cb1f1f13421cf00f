"""VARCO-VISION's markup: an answer that points writes `<obj>phrase</obj><bbox>x1, y1, x2, y2</bbox>`.

Writing is structural: pieces are built from `Control` tokens, or read from a string that its owner declared to be
markup. Reading a model's output is textual, since a model may write anything. Format: the card of
NCSOFT/VARCO-VISION-14B-HF.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

from lit_vlm.types import SPECIAL_TOKENS, Box, Content, Control

BOX_DECIMALS = 3  # what the release writes

_CONTROL = {token: Control(token) for token in SPECIAL_TOKENS}
_ANY_TOKEN = "|".join(re.escape(token) for token in SPECIAL_TOKENS)
# A phrase ends at the first control token, so an unclosed <obj> cannot swallow the mention that follows it.
_PHRASE = rf"<(?P<tag>obj|char)>(?P<phrase>(?:(?!{_ANY_TOKEN}).)+)</(?P=tag)>"
_FRACTION = r"(?:0(?:\.[0-9]+)?|1(?:\.0+)?)"
_STRICT_BOX = rf"{_FRACTION}(?:,\s*{_FRACTION}){{3}}"
_STRICT = re.compile(rf"{_PHRASE}<bbox>(?P<boxes>{_STRICT_BOX}(?:<delim>{_STRICT_BOX})*)</bbox>")
_LENIENT = re.compile(rf"{_PHRASE}\s*<bbox>(?P<boxes>[^<]*(?:<delim>[^<]*)*)</bbox>", re.DOTALL)
_TASK = re.compile(r"(?P<space>\s*)(?P<task><gro>|<ocr>)")


def format_box(box: Box, decimals: int = BOX_DECIMALS) -> str:
    """`x1, y1, x2, y2` as Python's `str(round(v, decimals))` writes them: `0.51`, not `0.510`.

    The release shows no box at the very edge; here 0 and 1 follow the same rule and become `0.0` and `1.0`.
    """
    assert 0 < decimals <= 4  # beyond four, str() of a small number turns to 1e-05
    # Adding zero turns -0.0 into 0.0.
    return ", ".join([str(round(float(value), decimals) + 0.0) for value in (box.x1, box.y1, box.x2, box.y2)])


def obj(phrase: str, boxes: Box | Iterable[Box]) -> tuple[Content, ...]:
    """The mention of an object; several boxes of one phrase share a `<bbox>`."""
    return _mention("obj", phrase, [format_box(box) for box in ((boxes,) if isinstance(boxes, Box) else boxes)])


def char(text: str, box: Box) -> tuple[Content, ...]:
    """The mention of a piece of written text."""
    return _mention("char", text, [format_box(box)])


def parse_markup(text: str) -> tuple[Content, ...]:
    """Well-formed markup becomes `Control` tokens, all else stays text; joined, the pieces are the text again.

    Well-formed is `<gro>` or `<ocr>` at the start (white space may precede it), and a non-empty phrase with boxes of
    four numbers between 0 and 1, upper left corner first. Call it only where the owner of the data asked for markup.
    """
    pieces: list[Content] = []
    at = 0
    if task := _TASK.match(text):
        pieces += [task["space"], _CONTROL[task["task"]]]
        at = task.end()
    for found in _STRICT.finditer(text, at):
        boxes = found["boxes"].split("<delim>")
        if all(_numbers(box) for box in boxes):
            pieces.append(text[at : found.start()])
            pieces += _mention(found["tag"], found["phrase"], boxes)
            at = found.end()
    pieces.append(text[at:])
    return tuple(piece for piece in pieces if piece != "")


def boxes_of(text: str) -> list[tuple[str, str, list[Box]]]:
    """The mentions in a model's output, in order: ("obj" or "char", phrase, boxes).

    Decode with `skip_special_tokens=False`. Spaces are free and numbers may leave 0..1, but a mention with any box that
    is not four finite numbers, upper left corner first, is not returned.
    """
    mentions = []
    for found in _LENIENT.finditer(text):
        numbers = [_numbers(box) for box in found["boxes"].split("<delim>")]
        if all(numbers):
            mentions.append((found["tag"], found["phrase"].strip(), [Box(*values) for values in numbers]))
    return mentions


def _mention(tag: str, phrase: str, boxes: list[str]) -> tuple[Content, ...]:
    pieces: list[Content] = [_CONTROL[f"<{tag}>"], phrase, _CONTROL[f"</{tag}>"], _CONTROL["<bbox>"]]
    for position, box in enumerate(boxes):
        pieces += [_CONTROL["<delim>"], box] if position else [box]
    pieces.append(_CONTROL["</bbox>"])
    return tuple(pieces)


def _numbers(box: str) -> tuple[float, ...]:
    """Four ordered finite numbers, or nothing."""
    try:
        values = tuple(float(value) for value in box.split(","))
    except ValueError:
        return ()
    if len(values) != 4 or not all(map(math.isfinite, values)):
        return ()
    x1, y1, x2, y2 = values
    return values if x1 <= x2 and y1 <= y2 else ()
