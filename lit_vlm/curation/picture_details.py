"""Details of two pictures: whether the fine structure of both agrees everywhere, as in copies, or differs, as in two pages of one layout.

Hashes and thumbnails of 32 pixels do not see letters. Here the pictures are compared at up to 192 pixels, each part for itself: the
contrast of their brightness is correlated in windows, and the least correlated windows decide.
"""

from __future__ import annotations

import numpy as np
from PIL import Image
from scipy.fft import irfft2, rfft2
from scipy.ndimage import gaussian_filter, uniform_filter

MIN_DETAIL = 0.75  # of copies; benchmarks/curation.py measures what it refuses
_SIDE, _MIN_SIDE = 192, 16  # pixels of the longer, and at least of the shorter side, at which two pictures are compared
_WINDOW = 16  # side of the windows whose contrast is correlated, in pixels
_COARSE, _FINE = (
    21,
    0.8,
)  # side of a box and standard deviation, in pixels: slower changes are no detail, faster ones are noise of JPEG
_MIN_LEVELS, _MIN_SHARE = (
    6.0,
    0.1,
)  # contrast of a window that is compared: in levels, and its variance beside the picture's clearest
_PERCENTILE = 2  # of the windows, the one that decides
# Sides of a crop beside those of the whole, (rows, columns)
_CROPS = ((0.95, 0.95), (0.965, 0.965), (0.98, 0.98), (1.0, 0.95), (0.95, 1.0))


def compare_details(first: Image.Image, second: Image.Image) -> float:
    """Compare the details of two pictures, of any sizes: 1 for the same, about 0.5 for two texts of one layout.

    One may be a crop of the other to 95 % of each side. Pictures without details are the same: 1.
    """
    width, height = min(first.width, second.width), min(first.height, second.height)
    factor = min(1.0, _SIDE / max(width, height))
    size = max(_MIN_SIDE, round(width * factor)), max(_MIN_SIDE, round(height * factor))
    one, other = _find_contrast(first, size), _find_contrast(second, size)
    best = _correlate_windows(one, other)
    for crop in _CROPS:
        for whole, part in ((one, second), (other, first)):
            if best < MIN_DETAIL:
                best = max(best, _compare_crop(whole, part, crop))
    return best


def _find_contrast(picture: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """Find the contrast of a picture's brightness at a size of (columns, rows): [rows, columns]."""
    grey = np.asarray(picture.convert("L").resize(size, Image.Resampling.BILINEAR, reducing_gap=3.0), np.float32)
    return gaussian_filter(grey, _FINE) - uniform_filter(grey, _COARSE)


def _compare_crop(whole: np.ndarray, picture: Image.Image, crop: tuple[float, float]) -> float:
    """Compare the contrast of a whole with a picture that may be a crop of it, at the place where they agree most."""
    rows, columns = (round(side * share) for side, share in zip(whole.shape, crop, strict=True))
    part = _find_contrast(picture, (columns, rows))
    # The part moves by a few pixels only, so the sums of all places come from one circular correlation
    products = irfft2(rfft2(whole) * rfft2(part, whole.shape).conj(), whole.shape)
    inside = products[: whole.shape[0] - rows + 1, : whole.shape[1] - columns + 1]
    row, column = np.unravel_index(inside.argmax(), inside.shape)
    return _correlate_windows(whole[row : row + rows, column : column + columns], part)


def _correlate_windows(first: np.ndarray, second: np.ndarray) -> float:
    """Correlate the contrast of two pictures in windows: the value that 98 % of the windows with details reach."""
    inside = slice(_WINDOW // 2, -(_WINDOW // 2) + 1, _WINDOW // 2)
    sums = (
        uniform_filter(values, _WINDOW)[inside, inside] for values in (first * first, second * second, first * second)
    )
    one, other, both = sums
    energy = np.maximum(one, other)
    if not energy.size:
        return 1.0
    chosen = energy > max(_MIN_LEVELS**2, _MIN_SHARE * float(np.percentile(energy, 95)))
    if not chosen.any():
        return 1.0
    return float(np.percentile(both[chosen] / np.sqrt(one[chosen] * other[chosen] + 1), _PERCENTILE, method="lower"))
