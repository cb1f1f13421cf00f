"""Font of the synthetic images: NanumGothic at any size.

Pillow's default font renders every Hangul syllable as the same empty box, so it is never used.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import NamedTuple, TypeVar

from PIL import Image, ImageDraw, ImageFont

from lit_vlm.data.synthetic import vocabulary
from lit_vlm.types import Box, ContentPart, Language, UserError

_PACKAGE = "koreanize_matplotlib"
_FILE = "fonts/NanumGothic.ttf"


@lru_cache(maxsize=1)
def find_font_file() -> Path:
    """Find NanumGothic.ttf inside its package, which is not imported because it would import matplotlib."""
    spec = importlib.util.find_spec(_PACKAGE)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder) / _FILE
        if path.is_file():
            return path
    raise UserError(
        f"builtin pictures: NanumGothic.ttf was not found; text in pictures, Hangul above all, needs it. "
        f"Run `pip install --no-deps {_PACKAGE.replace('_', '-')}==0.1.1` (`make setup` does it)."
    )


@lru_cache(maxsize=256)
def load_font(size: int) -> ImageFont.FreeTypeFont:
    """Load the font at a size in pixels."""
    # The basic layout suffices for precomposed syllables and takes a third of the time of raqm.
    return ImageFont.truetype(find_font_file(), size, layout_engine=ImageFont.Layout.BASIC)


@lru_cache(maxsize=65536)
def measure_ink(text: str, size: int) -> tuple[int, int, int, int]:
    """Measure the ink box of `text` rendered at the origin: (left, top, right, bottom) in pixels."""
    # Not getbbox(): it includes the advance width, which extends beyond the last letter.
    mask, (x, y) = load_font(size).getmask2(text)
    left, top, right, bottom = mask.getbbox()
    return x + left, y + top, x + right, y + bottom


GENERATOR_VERSION = 1  # increase it with every change of the samples; indexes and runs depend on it

T = TypeVar("T")
Rgb = tuple[int, int, int]
PixelBox = tuple[int, int, int, int]

EASY_SIZE = (56, 56)  # (height, width): one tile of the tiny model
HARD_SIZES = ((112, 112), (112, 168), (168, 112))  # 2x2, 2x3 and 3x2 of its tiles


def _compute_star() -> tuple[tuple[float, float], ...]:
    points = []
    for step in range(10):
        angle, radius = math.pi * step / 5, 1.0 if step % 2 == 0 else 0.42
        points.append((radius * math.sin(angle), -radius * math.cos(angle)))
    xs, ys = [x for x, _ in points], [y for _, y in points]
    return tuple(((x - min(xs)) / (max(xs) - min(xs)), (y - min(ys)) / (max(ys) - min(ys))) for x, y in points)


# Corners in the unit square; each outline touches all four sides, so its bounding box is exact.
_OUTLINES: dict[str, tuple[tuple[float, float], ...]] = {
    "square": ((0, 0), (1, 0), (1, 1), (0, 1)),
    "triangle": ((0.5, 0), (1, 1), (0, 1)),
    "star": _compute_star(),
    "cross": tuple(
        (x / 3, y / 3)
        for x, y in ((1, 0), (2, 0), (2, 1), (3, 1), (3, 2), (2, 2), (2, 3), (1, 3), (1, 2), (0, 2), (0, 1), (1, 1))
    ),
}


class Figure(NamedTuple):
    """Filled shape; `shape` is "circle" or a key of `_OUTLINES`."""

    shape: str
    box: PixelBox
    rgb: Rgb

    def draw(self, pen: ImageDraw.ImageDraw) -> None:
        left, top, right, bottom = self.box
        if self.shape == "circle":
            pen.ellipse((left, top, right - 1, bottom - 1), fill=self.rgb)
        elif self.shape == "square":
            pen.rectangle((left, top, right - 1, bottom - 1), fill=self.rgb)
        else:
            width, height = right - 1 - left, bottom - 1 - top
            pen.polygon([(left + x * width, top + y * height) for x, y in _OUTLINES[self.shape]], fill=self.rgb)


class Text(NamedTuple):
    """Line of text at x, y; lines with equal x and evenly spaced y are laid out as on a page."""

    text: str
    size: int
    x: int
    y: int
    rgb: Rgb

    @property
    def box(self) -> PixelBox:
        """Bounding box of its ink."""
        left, top, right, bottom = measure_ink(self.text, self.size)
        return self.x + left, self.y + top, self.x + right, self.y + bottom

    def draw(self, pen: ImageDraw.ImageDraw) -> None:
        pen.text((self.x, self.y), self.text, fill=self.rgb, font=load_font(self.size))


@dataclass(frozen=True, slots=True)
class Picture:
    """Synthetic image, a LazyImage that is rendered when it is loaded."""

    height: int
    width: int
    background: Rgb
    marks: tuple[Figure | Text, ...]

    @property
    def size(self) -> tuple[int, int]:
        return self.height, self.width

    def load(self) -> Image.Image:
        image = Image.new("RGB", (self.width, self.height), self.background)
        pen = ImageDraw.Draw(image)
        for mark in self.marks:
            mark.draw(pen)
        return image

    def content(self) -> bytes:
        """Hash the marks, which determine the pixels: 16 bytes."""
        return hashlib.blake2b(f"{GENERATOR_VERSION}{self}".encode(), digest_size=16).digest()

    def to_fractions(self, box: PixelBox) -> Box:
        """Convert a box from pixels to fractions of the image size."""
        left, top, right, bottom = box
        return Box(left / self.width, top / self.height, right / self.width, bottom / self.height)


class Thing(NamedTuple):
    """Coloured shape in an image; `box` is its box in the answer (fractions), `pixels` its rendered box."""

    colour: vocabulary.Colour
    shape: vocabulary.Shape
    box: Box
    pixels: PixelBox

    def describe(self, language: Language) -> str:
        """Describe it in words, such as "red circle"."""
        return vocabulary.format_phrase(self.colour, self.shape, language)


@dataclass(slots=True)
class Scene:
    """Scene of a task: images, and questions about them with their answers.

    `facts` are the facts behind the answer; preference pairs derive their wrong answers from them.
    """

    pictures: tuple[Picture, ...]
    turns: list[tuple[tuple[ContentPart, ...], tuple[ContentPart, ...]]]
    facts: Sequence = field(default_factory=tuple)


class SceneRng:
    """Random generator of one sample. The key is unique to the sample, so no two samples share a seed."""

    __slots__ = ("hard", "held_out", "language", "random")

    def __init__(self, key: int, language: Language, hard: bool, held_out: bool) -> None:
        # Random uses all bits of an int of any length as its seed.
        self.random = Random(key).random
        self.language, self.hard, self.held_out = language, hard, held_out

    def sample_int(self, low: int, high: int) -> int:
        """Sample an integer from low to high, both included."""
        return low + int(self.random() * (high - low + 1))

    def choose(self, choices: Sequence[T]) -> T:
        """Choose one element."""
        return choices[int(self.random() * len(choices))]

    def choose_distinct(self, choices: Sequence[T], num: int) -> list[T]:
        """Choose `num` distinct elements, in random order."""
        rest = list(choices)
        return [rest.pop(int(self.random() * len(rest))) for _ in range(num)]

    def select_language(self, ko: T, en: T) -> T:
        """Select the value for the language of the sample."""
        return ko if self.language == "ko" else en

    def choose_from_world(self, world: Sequence[T]) -> T:
        """Choose from a closed world of texts, of which every fifth is reserved for held-out samples."""
        num = len(world)
        if self.held_out:
            return world[5 * self.sample_int(0, (num - 1) // 5)]
        rank = self.sample_int(0, num - 2 - (num - 1) // 5)
        return world[rank + rank // 4 + 1]

    def choose_image_size(self) -> tuple[int, int]:
        """Choose the (height, width) of an image."""
        return self.choose(HARD_SIZES) if self.hard else EASY_SIZE

    def sample_background(self) -> Rgb:
        """Sample a light background colour."""
        level = self.sample_int(222, 246)
        return level + self.sample_int(-6, 6), level + self.sample_int(-6, 6), level + self.sample_int(-6, 6)

    def sample_text_colour(self) -> Rgb:
        """Sample a dark text colour that is readable on any background."""
        return self.sample_int(0, 90), self.sample_int(0, 70), self.sample_int(0, 110)

    def sample_shade(self, colour: vocabulary.Colour) -> Rgb:
        """Sample a slight variation of the colour."""
        red, green, blue = (max(0, min(255, channel + self.sample_int(-9, 9))) for channel in colour.rgb)
        return red, green, blue

    def make_text(self, text: str, size: int, area: PixelBox, rgb: Rgb | None = None, jitter: int = 1000) -> Text:
        """Make a text inside `area`, at most `jitter` pixels from its centre. The font size shrinks until the text fits."""
        left, top, right, bottom = area
        while True:
            ink_left, ink_top, ink_right, ink_bottom = measure_ink(text, size)
            width, height = ink_right - ink_left, ink_bottom - ink_top
            spare_x, spare_y = right - left - width, bottom - top - height
            if (spare_x >= 0 and spare_y >= 0) or size <= 6:
                break
            size -= 1
        x = left + self.sample_offset(spare_x, jitter) - ink_left
        y = top + self.sample_offset(spare_y, jitter) - ink_top
        return Text(text, size, x, y, rgb or self.sample_text_colour())

    def sample_offset(self, spare: int, jitter: int) -> int:
        """Sample an offset that leaves about half of `spare` on each side, plus or minus `jitter`."""
        return self.sample_int(max(0, spare // 2 - jitter), max(0, min(spare, spare // 2 + jitter)))
