"""Font of the synthetic images: NanumGothic at any size.

Pillow's default font renders every Hangul syllable as the same empty box, so it is never used.
"""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from pathlib import Path

from PIL import ImageFont

from lit_vlm.types import UserError

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
