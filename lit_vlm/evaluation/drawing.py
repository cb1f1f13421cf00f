"""Boxes drawn on a picture, with their phrases, so that a person sees what an answer points at."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont

from lit_vlm.data.builtin.fonts import font
from lit_vlm.data.markup import boxes_of
from lit_vlm.types import Box, UserError

REFERENCE, PREDICTED, ASKED = "#12a150", "#e5484d", "#2f6fed"  # green, red, blue
SMALLEST, LARGEST = 224, 768  # sides in pixels: below nothing can be read, above a page of pictures grows heavy
LABEL_PX = 12


@dataclass(frozen=True, slots=True)
class Mark:
    """One box to draw. `below` puts its label at the lower edge, so that two marks of one thing stay readable."""

    label: str
    box: Box
    colour: str
    below: bool = False


def marks_of(text: str, colour: str, *, below: bool = False, label_chars: bool = True) -> list[Mark]:
    """A mark for each box that an answer's markup names.

    Args:
        label_chars: write beside read text (`<char>`) what it says; False where the picture says it.
    """
    return [
        Mark(phrase if tag == "obj" or label_chars else "", box, colour, below)
        for tag, phrase, boxes in boxes_of(text)
        for box in boxes
    ]


def draw_boxes(picture: Image.Image, marks: Sequence[Mark], *, label: bool = True) -> Image.Image:
    """A copy of the picture at a readable size with the marks on it. Boxes are cut at the picture's edges."""
    drawn = readable(picture)
    pen = ImageDraw.Draw(drawn)
    for mark in marks:
        corners = _pixels(mark.box, drawn.size)
        pen.rectangle(corners, outline=mark.colour, width=2)
    if label:
        for mark in marks:  # after all the boxes, so that none crosses a label
            _write_label(pen, mark, _pixels(mark.box, drawn.size), drawn.size)
    return drawn


def readable(picture: Image.Image) -> Image.Image:
    """An RGB copy with a shorter side of at least `SMALLEST` and a longer one of about `LARGEST` at most."""
    picture = picture.convert("RGB")
    width, height = picture.size
    if max(width, height) > LARGEST:
        picture = picture.copy()
        picture.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
        return picture
    # Whole factors keep every pixel of a small picture square and sharp.
    factor = max(1, min(math.ceil(SMALLEST / min(width, height)), LARGEST // max(width, height)))
    return picture.resize((width * factor, height * factor), Image.Resampling.NEAREST)


def _pixels(box: Box, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Corners in pixels, inside the picture, upper left first."""
    width, height = size
    xs = sorted(min(max(value, 0.0), 1.0) * (width - 1) for value in (box.x1, box.x2))
    ys = sorted(min(max(value, 0.0), 1.0) * (height - 1) for value in (box.y1, box.y2))
    return round(xs[0]), round(ys[0]), round(xs[1]), round(ys[1])


def _write_label(
    pen: ImageDraw.ImageDraw, mark: Mark, corners: tuple[int, int, int, int], size: tuple[int, int]
) -> None:
    text = " ".join(mark.label.split())[:40]
    if not text:
        return
    left, top, right, bottom = pen.textbbox((0, 0), text, font=_font(LABEL_PX))
    width, height = right - left + 6, bottom - top + 5
    x = max(0, min(corners[0], size[0] - width))
    outside = corners[3] + 1 if mark.below else corners[1] - height
    y = max(0, min(outside, size[1] - height))
    pen.rectangle((x, y, x + width, y + height), fill=mark.colour)
    pen.text((x + 3 - left, y + 2 - top), text, fill="white", font=_font(LABEL_PX))


@lru_cache(maxsize=8)
def _font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    """One with Hangul; without the font package Pillow's own, which shows Hangul as empty boxes."""
    try:
        return font(size)
    except (UserError, OSError):
        return ImageFont.load_default(size)
