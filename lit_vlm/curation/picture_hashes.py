"""Hashes of pictures: the same pixels, and the same view after re-encoding, resizing or a crop of about 5 %.

A perceptual hash sees shape and no colour, and it takes two pages of text, or two drawings on white, for one. So it only finds
candidates. Thumbnails in colour confirm a candidate, after the best alignment by a small crop.

Shapes: N pictures or pairs, S side of a thumbnail in pixels, V views of a picture.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import xxhash
from PIL import Image
from scipy.fft import dct

HASH_VERSION = (
    1  # increase it when a picture gets another hash or thumbnail; stored ones of another version are not read
)
HASH_SIDE = 8  # low frequencies of each axis
HASH_BITS = HASH_SIDE * HASH_SIDE
THUMBNAIL_SIDE = 32
MAX_BITS = 10  # differing bits of a candidate, in one of its views
_SIDE, _VIEW_SIDE = 64, 61  # a view is 95 % of the side
_VIEW_CORNERS = ((1, 1), (0, 0), (0, 3), (3, 0), (3, 3))  # (top, left)
NUM_VIEWS = 1 + len(_VIEW_CORNERS)
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601, as Pillow's mode L

# Thresholds on thumbnails with levels 0 to 255, chosen on changed built-in pictures and parts of photographs; benchmarks/curation.py
# measures what they find
_FLAT_LEVELS = 8.0  # largest block difference below which two pictures are the same without a look at their structure
_MAX_COLOUR_LEVELS, _MAX_CHROMA_LEVELS = 4.5, 3.0  # of the mean colours, with and without the brightness
_MAX_CHROMA_BLOCK_LEVELS = 20.0  # of the colours without brightness in a block; JPEG stores them at half the resolution
_MIN_CORRELATION, _MAX_BLOCK_LEVELS = 0.97, 30.0  # of a re-encoded or resized picture
_CROP_MIN_CORRELATION, _CROP_MAX_BLOCK_LEVELS, _CROP_MAX_RATIO = (
    0.85,
    45.0,
    0.3,
)  # of a cropped picture, after the alignment
_BLOCK = 4  # side of the blocks whose differences are compared, in thumbnail pixels
_COMPARED_PAIRS = 512  # aligned at a time: about 60 MB for each axis


@dataclass(frozen=True, slots=True)
class PictureHash:
    """Hashes of a decoded picture.

    Attributes:
        pixels: digest of size and pixels, [2] uint64.
        views: perceptual hash of the whole picture, then of crops to 95 %: centre and corners, [V] uint64.
        thumbnail: [S, S, 3] uint8.
    """

    pixels: np.ndarray
    views: np.ndarray
    thumbnail: np.ndarray


def hash_picture(picture: Image.Image) -> PictureHash:
    """Hash a decoded RGB picture.

    The perceptual hash is pHash with 64 bits: low DCT frequencies of the grey picture against their median.
    """
    pixels = xxhash.xxh3_128(picture.tobytes(), seed=picture.width).digest()
    small = picture.resize((_SIDE, _SIDE), Image.Resampling.BILINEAR, reducing_gap=2.0)
    colours = np.asarray(small, np.float32)
    grey = colours @ _LUMA
    crops = (grey[top : top + _VIEW_SIDE, left : left + _VIEW_SIDE] for top, left in _VIEW_CORNERS)
    views = np.array([_hash_grey(grey, _BASES[_SIDE]), *(_hash_grey(crop, _BASES[_VIEW_SIDE]) for crop in crops)])
    factor = _SIDE // THUMBNAIL_SIDE
    thumbnail = colours.reshape(THUMBNAIL_SIDE, factor, THUMBNAIL_SIDE, factor, 3).mean((1, 3))
    return PictureHash(np.frombuffer(pixels, np.uint64), views, np.rint(thumbnail).astype(np.uint8))


def _make_basis(side: int) -> np.ndarray:
    """Make the low frequencies of the DCT of a side: [HASH_SIDE, side]."""
    return dct(np.eye(side), axis=0, norm="ortho")[:HASH_SIDE].astype(np.float32)


_BASES = {side: _make_basis(side) for side in (_SIDE, _VIEW_SIDE)}


def _hash_grey(grey: np.ndarray, basis: np.ndarray) -> np.uint64:
    frequencies = (basis @ grey @ basis.T).ravel()
    # Noise of an unstructured picture must not decide a bit, so a frequency has to exceed the median by a little
    middle = np.partition(frequencies, HASH_BITS // 2)[HASH_BITS // 2]
    return np.packbits(frequencies > middle + 1e-2).view(np.uint64)[0]


def find_same_views(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Find which pairs of thumbnails show the same view: [N] bool of two [N, S, S, 3] uint8.

    A pair is the same view if correlation, contrast and colours agree, as they are or with one of the two cropped by at most
    5 % of each side.
    """
    parts = [np.zeros(0, bool)]
    for start in range(0, len(first), _COMPARED_PAIRS):
        one = first[start : start + _COMPARED_PAIRS].astype(np.float32)
        other = second[start : start + _COMPARED_PAIRS].astype(np.float32)
        same = _is_same(one, other, _MIN_CORRELATION, _MAX_BLOCK_LEVELS, np.inf)
        limits = (_CROP_MIN_CORRELATION, _CROP_MAX_BLOCK_LEVELS, _CROP_MAX_RATIO)
        for whole, crop in ((one, other), (other, one)):
            left = np.flatnonzero(~same)
            if len(left):
                same[left] = _is_same(_align(whole[left], crop[left]), crop[left], *limits)
        parts.append(same)
    return np.concatenate(parts)


def _is_same(
    first: np.ndarray, second: np.ndarray, min_correlation: float, max_block: float, max_ratio: float
) -> np.ndarray:
    difference = first - second
    block = _average_blocks(np.abs(difference)).max((1, 2, 3))
    means = first.mean((1, 2)), second.mean((1, 2))
    one, other = first - means[0][:, None, None], second - means[1][:, None, None]
    energies = (one**2).mean((1, 2, 3)), (other**2).mean((1, 2, 3))
    correlation = (one * other).mean((1, 2, 3)) / np.sqrt(energies[0] * energies[1] + 1e-6)
    ratio = np.abs(difference).mean((1, 2, 3)) / np.sqrt(energies[1] + 1e-6)
    chroma = difference - (difference @ _LUMA)[..., None]
    same_colours = np.abs(difference.mean((1, 2))).max(1) <= _MAX_COLOUR_LEVELS
    same_colours &= np.abs(chroma.mean((1, 2))).max(1) <= _MAX_CHROMA_LEVELS
    same_colours &= np.abs(_average_blocks(chroma)).max((1, 2, 3)) <= _MAX_CHROMA_BLOCK_LEVELS
    fits = (correlation >= min_correlation) & (block <= max_block) & (ratio <= max_ratio)
    return ((block <= _FLAT_LEVELS) | fits) & same_colours


def _average_blocks(values: np.ndarray) -> np.ndarray:
    """Average thumbnails over blocks: [N, S / 4, S / 4, 3]."""
    side = THUMBNAIL_SIDE // _BLOCK
    return values.reshape(len(values), side, _BLOCK, side, _BLOCK, 3).mean((2, 4))


def _make_windows() -> np.ndarray:
    """Make the matrices that crop an axis by up to 5 % and stretch it again: [W, S, S]; the first changes nothing."""
    windows = [(0.4 * step, THUMBNAIL_SIDE - cut) for cut in (0.0, 0.8, 1.6) for step in range(round(cut / 0.4) + 1)]
    rows = np.arange(THUMBNAIL_SIDE)
    matrices = np.zeros((len(windows), THUMBNAIL_SIDE, THUMBNAIL_SIDE), np.float32)
    for matrix, (start, size) in zip(matrices, windows, strict=True):
        places = np.clip(start + (rows + 0.5) * size / THUMBNAIL_SIDE - 0.5, 0, THUMBNAIL_SIDE - 1)
        below = np.minimum(places.astype(int), THUMBNAIL_SIDE - 2)
        matrix[rows, below] = 1 - (places - below)
        matrix[rows, below + 1] = places - below
    return matrices


_WINDOWS = _make_windows()


def _align(whole: np.ndarray, crop: np.ndarray) -> np.ndarray:
    """Crop each of the whole pictures so that it fits the other best: one axis after the other, twice."""
    # [N, rows, columns, 3] -> vertical windows act on rows, horizontal ones on columns
    rows = columns = np.zeros(len(whole), int)
    for _ in range(2):
        stretched = np.einsum("nyxc,nzx->nyzc", whole, _WINDOWS[columns], optimize=True)
        errors = [np.abs(np.einsum("zy,nyxc->nzxc", window, stretched) - crop).mean((1, 2, 3)) for window in _WINDOWS]
        rows = np.argmin(errors, 0)
        stretched = np.einsum("nyxc,nzy->nzxc", whole, _WINDOWS[rows], optimize=True)
        errors = [np.abs(np.einsum("zx,nyxc->nyzc", window, stretched) - crop).mean((1, 2, 3)) for window in _WINDOWS]
        columns = np.argmin(errors, 0)
    stretched = np.einsum("nyxc,nzy->nzxc", whole, _WINDOWS[rows], optimize=True)
    return np.einsum("nyxc,nzx->nyzc", stretched, _WINDOWS[columns], optimize=True)
