"""Drawing of boxes and their phrases on an image, to show what an answer points at."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont

from lit_vlm.data.markup import parse_mentions
from lit_vlm.data.synthetic.scenes import load_font
from lit_vlm.types import Box, UserError

REFERENCE, PREDICTED, ASKED = "#12a150", "#e5484d", "#2f6fed"  # green, red, blue
MIN_SIDE_PX, MAX_SIDE_PX = 224, 768  # sides in pixels: a smaller image cannot be read, a larger one makes pages heavy
LABEL_PX = 12


@dataclass(frozen=True, slots=True)
class BoxMark:
    """Box to draw, with its label. `label_below` puts the label at the lower edge, so that two boxes of one object stay readable."""

    label: str
    box: Box
    colour: str
    label_below: bool = False


def parse_box_marks(text: str, colour: str, *, label_below: bool = False, label_chars: bool = True) -> list[BoxMark]:
    """Parse the markup of an answer. Returns one mark for each of its boxes.

    Args:
        text: the answer, with control tokens spelled out.
        label_below: see `BoxMark`.
        label_chars: label text lines (`<char>`) with their text; False where the image shows it anyway.
    """
    return [
        BoxMark(phrase if tag == "obj" or label_chars else "", box, colour, label_below)
        for tag, phrase, boxes in parse_mentions(text)
        for box in boxes
    ]


def draw_boxes(image: Image.Image, marks: Sequence[BoxMark], *, label: bool = True) -> Image.Image:
    """Draw boxes on a copy of the image at a readable size. Boxes are clipped at the image's edges."""
    canvas = resize_to_readable(image)
    pen = ImageDraw.Draw(canvas)
    for mark in marks:
        corners = _convert_to_pixels(mark.box, canvas.size)
        pen.rectangle(corners, outline=mark.colour, width=2)
    if label:
        for mark in marks:  # after all boxes, so that no box crosses a label
            _write_label(pen, mark, _convert_to_pixels(mark.box, canvas.size), canvas.size)
    return canvas


def resize_to_readable(image: Image.Image) -> Image.Image:
    """Resize an image to an RGB copy: shorter side at least `MIN_SIDE_PX`, longer side at most about `MAX_SIDE_PX`."""
    image = image.convert("RGB")
    width, height = image.size
    if max(width, height) > MAX_SIDE_PX:
        image = image.copy()
        image.thumbnail((MAX_SIDE_PX, MAX_SIDE_PX), Image.Resampling.LANCZOS)
        return image
    # Integer factors keep each pixel of a small image square and sharp.
    factor = max(1, min(math.ceil(MIN_SIDE_PX / min(width, height)), MAX_SIDE_PX // max(width, height)))
    return image.resize((width * factor, height * factor), Image.Resampling.NEAREST)


def _convert_to_pixels(box: Box, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Convert a box to pixel corners (x1, y1, x2, y2) inside the image, upper left first."""
    width, height = size
    xs = sorted(min(max(value, 0.0), 1.0) * (width - 1) for value in (box.x1, box.x2))
    ys = sorted(min(max(value, 0.0), 1.0) * (height - 1) for value in (box.y1, box.y2))
    return round(xs[0]), round(ys[0]), round(xs[1]), round(ys[1])


def _write_label(
    pen: ImageDraw.ImageDraw, mark: BoxMark, corners: tuple[int, int, int, int], size: tuple[int, int]
) -> None:
    text = " ".join(mark.label.split())[:40]
    if not text:
        return
    left, top, right, bottom = pen.textbbox((0, 0), text, font=_load_font(LABEL_PX))
    width, height = right - left + 6, bottom - top + 5
    x = max(0, min(corners[0], size[0] - width))
    outside = corners[3] + 1 if mark.label_below else corners[1] - height
    y = max(0, min(outside, size[1] - height))
    pen.rectangle((x, y, x + width, y + height), fill=mark.colour)
    pen.text((x + 3 - left, y + 2 - top), text, fill="white", font=_load_font(LABEL_PX))


@lru_cache(maxsize=8)
def _load_font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    """Load a font with Hangul; without the font package use Pillow's own, which shows Hangul as empty boxes."""
    try:
        return load_font(size)
    except (UserError, OSError):
        return ImageFont.load_default(size)
