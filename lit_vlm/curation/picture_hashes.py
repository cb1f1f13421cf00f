"""Hashes of pictures, to find the same pixels, and the same view after re-encoding, resizing or a crop of about 5 %.

All come from one reduction to 64 x 64 pixels. Equal pixels have equal reductions, so only pictures with an equal one need their
pixels compared. A perceptual hash sees shape and no colour, and it takes two pages of text, or two drawings on white, for one. So it only finds
candidates. Thumbnails in colour confirm a candidate, after the best alignment by a small crop.

Shapes: N pictures or pairs, S side of a thumbnail in pixels, V views of a picture.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import xxhash
from PIL import Image
from scipy.fft import dct

HASH_VERSION = (
    2  # increase it when a picture gets another hash or thumbnail; stored ones of another version are not read
)
HASH_SIDE = 8  # low frequencies of each axis
HASH_BITS = HASH_SIDE * HASH_SIDE
THUMBNAIL_SIDE = 32
MAX_BITS = 10  # differing bits of a candidate, in one of its views
_SIDE, _VIEW_SIDE = 64, 61  # a view is 95 % of the side
_MIN_GAP = 1.5  # pixels are averaged by whole factors down to at least so many times the side, then interpolated
_HASHED_PICTURES = 64  # at a time: about 6 MB
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
# Before the alignment, of the block means: cropped pictures of the benchmark reach 8.6 levels, 4.3 levels, 0.49 and 0.68
_BEFORE_CROP_COLOUR_LEVELS, _BEFORE_CROP_CHROMA_LEVELS = 10.0, 5.0
_BEFORE_CROP_MIN_CORRELATION, _BEFORE_CROP_MAX_RATIO = 0.4, 0.9
_MAX_BLOCK_ERROR = 0.25  # of the aligned blocks, as a share of their deviation; 239 of 240 cropped pictures of the benchmark stay below
_FLAT_ERROR_LEVELS = 2.0  # or in levels, for pictures of one colour
_BLOCK = 4  # side of the blocks whose differences are compared, in thumbnail pixels
_COMPARED_PAIRS = 512  # aligned at a time: about 20 MB


def reduce_picture(picture: Image.Image) -> np.ndarray:
    """Reduce a decoded RGB picture to what its hashes are made of: [_SIDE, _SIDE, 3] uint8."""
    factor = max(1, int(min(picture.size) / (_SIDE * _MIN_GAP)))
    box = (0, 0, picture.width / factor, picture.height / factor)
    small = picture.reduce(factor) if factor > 1 else picture  # five times as fast as an interpolation of all pixels
    small = small.resize((_SIDE, _SIDE), Image.Resampling.BILINEAR, box, reducing_gap=_MIN_GAP)
    return np.frombuffer(small.tobytes(), np.uint8).reshape(_SIDE, _SIDE, 3)


def digest_reduction(reduced: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Digest a reduced picture and its (width, height), [2] uint64; equal pixels have equal ones."""
    return np.frombuffer(xxhash.xxh3_128(reduced.tobytes() + f"{size}".encode()).digest(), np.uint64)


def hash_reduced(reduced: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Hash reduced pictures, [N, _SIDE, _SIDE, 3] uint8; many at once, because one alone costs ten times as much.

    The perceptual hash is pHash with 64 bits: low DCT frequencies of the grey picture against their median.

    Returns:
        Hashes of the whole picture, then of crops to 95 %: centre and corners, [N, V] uint64; and thumbnails, [N, S, S, 3] uint8.
    """
    views = np.zeros((len(reduced), NUM_VIEWS), np.uint64)
    thumbnails = np.zeros((len(reduced), THUMBNAIL_SIDE, THUMBNAIL_SIDE, 3), np.uint8)
    for start in range(0, len(reduced), _HASHED_PICTURES):
        part = slice(start, start + _HASHED_PICTURES)
        colours = reduced[part].astype(np.float32)
        views[part] = _hash_views((colours.reshape(-1, 3) @ _LUMA).reshape(-1, _SIDE, _SIDE))
        rows = (_HALVES @ colours.reshape(-1, _SIDE, _SIDE * 3)).reshape(-1, THUMBNAIL_SIDE, _SIDE, 3)
        thumbnails[part] = np.rint(_HALVES @ rows)
    return views, thumbnails


def _make_basis(side: int, start: int = 0) -> np.ndarray:
    """Make the low frequencies of the DCT of a side that begins at a pixel: [HASH_SIDE, _SIDE]."""
    basis = np.zeros((HASH_SIDE, _SIDE), np.float32)
    basis[:, start : start + side] = dct(np.eye(side), axis=0, norm="ortho")[:HASH_SIDE]
    return basis


# Averages of _SIDE / THUMBNAIL_SIDE pixels; exact, for levels are whole numbers
_HALVES = np.kron(np.eye(THUMBNAIL_SIDE), np.full(_SIDE // THUMBNAIL_SIDE, THUMBNAIL_SIDE / _SIDE)).astype(np.float32)
# Bases of the whole side and of the sides of the views, and of each view those of its rows and columns
_STARTS = sorted({start for corner in _VIEW_CORNERS for start in corner})
_BASES = np.concatenate([_make_basis(_SIDE), *(_make_basis(_VIEW_SIDE, start) for start in _STARTS)])
_VIEW_BASES = [(0, 0), *((1 + _STARTS.index(top), 1 + _STARTS.index(left)) for top, left in _VIEW_CORNERS)]


def _hash_views(grey: np.ndarray) -> np.ndarray:
    """Hash all views of grey pictures, [N, _SIDE, _SIDE]: [N, V] uint64."""
    count = 1 + len(_STARTS)
    products = (_BASES @ grey @ _BASES.T).reshape(-1, count, HASH_SIDE, count, HASH_SIDE)
    chosen = [products[:, row, :, column] for row, column in _VIEW_BASES]
    frequencies = np.stack(chosen, 1).reshape(-1, NUM_VIEWS, HASH_BITS)
    # Noise of an unstructured picture must not decide a bit, so a frequency has to exceed the median by a little
    middle = np.partition(frequencies, HASH_BITS // 2, axis=2)[..., HASH_BITS // 2, None]
    return np.packbits(frequencies > middle + 1e-2, axis=2).view(np.uint64)[..., 0]


def find_same_views(thumbnails: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Find which pairs of pictures show the same view: [N] bool of thumbnails [M, S, S, 3] uint8 and two [N] of their numbers.

    A pair is the same view if correlation, contrast and colours agree, as they are or with one of the two cropped by at most
    5 % of each side. Most candidates differ in their colours or blocks already, so these are compared before any pixel is.
    """
    blocks = _average_blocks(thumbnails)
    may_equal, may_be_crop = _compare_blocks(blocks[first], blocks[second])
    same = np.zeros(len(first), bool)
    for pairs in _split_numbers(np.flatnonzero(may_equal)):
        one, other = thumbnails[first[pairs]].astype(np.float32), thumbnails[second[pairs]].astype(np.float32)
        same[pairs] = _is_same(one, other, _MIN_CORRELATION, _MAX_BLOCK_LEVELS, np.inf)
    limits = (_CROP_MIN_CORRELATION, _CROP_MAX_BLOCK_LEVELS, _CROP_MAX_RATIO)
    for whole, crop in ((first, second), (second, first)):
        for pairs in _split_numbers(np.flatnonzero(may_be_crop & ~same)):
            one, other = thumbnails[whole[pairs]].astype(np.float32), thumbnails[crop[pairs]].astype(np.float32)
            rows, columns, fits = _find_windows(one @ _LUMA, other @ _LUMA)
            one, other, rows, columns = one[fits], other[fits], rows[fits], columns[fits]
            if not len(one):
                continue
            same[pairs[fits]] |= _is_same(_crop(one, rows, columns), other, *limits)
    return same


def _split_numbers(numbers: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(numbers), _COMPARED_PAIRS):
        yield numbers[start : start + _COMPARED_PAIRS]


def _compare_blocks(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compare the block means of pairs, [N, S / 4, S / 4, 3]: which pairs may be equal, and which may be a crop, [N] bool.

    Means of pixels are means of blocks, so what `_is_same` would refuse for its colours is refused here alike.
    """
    difference = first - second
    chroma = difference - (difference @ _LUMA)[..., None]
    colours, chromas = (np.abs(_average_colours(values)).max(1) for values in (difference, chroma))
    largest = _find_largest(difference)
    equal = (colours <= _MAX_COLOUR_LEVELS) & (chromas <= _MAX_CHROMA_LEVELS) & (largest <= _MAX_BLOCK_LEVELS)
    equal &= _find_largest(chroma) <= _MAX_CHROMA_BLOCK_LEVELS
    correlation, energies = _correlate(first, second)
    ratio = _average(np.abs(difference)) / np.sqrt(np.minimum(*energies) + 1e-6)
    crop = (correlation >= _BEFORE_CROP_MIN_CORRELATION) & (ratio <= _BEFORE_CROP_MAX_RATIO) | (largest <= _FLAT_LEVELS)
    return equal, crop & (colours <= _BEFORE_CROP_COLOUR_LEVELS) & (chromas <= _BEFORE_CROP_CHROMA_LEVELS)


def _is_same(
    first: np.ndarray, second: np.ndarray, min_correlation: float, max_block: float, max_ratio: float
) -> np.ndarray:
    difference = first - second
    block = _find_largest(_average_blocks(np.abs(difference)))
    correlation, energies = _correlate(first, second)
    ratio = _average(np.abs(difference)) / np.sqrt(energies[1] + 1e-6)
    chroma = difference - (difference @ _LUMA)[..., None]
    same_colours = np.abs(_average_colours(difference)).max(1) <= _MAX_COLOUR_LEVELS
    same_colours &= np.abs(_average_colours(chroma)).max(1) <= _MAX_CHROMA_LEVELS
    same_colours &= _find_largest(_average_blocks(chroma)) <= _MAX_CHROMA_BLOCK_LEVELS
    fits = (correlation >= min_correlation) & (block <= max_block) & (ratio <= max_ratio)
    return ((block <= _FLAT_LEVELS) | fits) & same_colours


# Sums as products with a constant: numpy reduces an axis of three colours, or several axes at once, ten times as slowly


def _average(values: np.ndarray) -> np.ndarray:
    """Average all values of each picture: [N]."""
    flat = values.reshape(len(values), -1)
    return flat @ np.full(flat.shape[1], 1 / flat.shape[1], np.float32)


def _average_colours(values: np.ndarray) -> np.ndarray:
    """Average the colours of each picture: [N, 3] of [N, rows, columns, 3]."""
    flat = values.reshape(len(values), -1, 3)
    return np.full(flat.shape[1], 1 / flat.shape[1], np.float32) @ flat


def _find_largest(values: np.ndarray) -> np.ndarray:
    """Find the largest absolute value of each picture: [N]."""
    return np.abs(values).reshape(len(values), -1).max(1)


def _correlate(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Compute the correlation of pairs around their mean colours, [N], and the variances of both."""
    one, other = (values - _average_colours(values)[:, None, None] for values in (first, second))
    energies = _average(one**2), _average(other**2)
    return _average(one * other) / np.sqrt(energies[0] * energies[1] + 1e-6), energies


def _average_blocks(values: np.ndarray) -> np.ndarray:
    """Average thumbnails over blocks: [N, S / 4, S / 4, 3]."""
    side = THUMBNAIL_SIDE // _BLOCK
    rows = _AVERAGE @ values.astype(np.float32, copy=False).reshape(-1, THUMBNAIL_SIDE, THUMBNAIL_SIDE * 3)
    return _AVERAGE @ rows.reshape(-1, side, THUMBNAIL_SIDE, 3)


_AVERAGE = np.kron(np.eye(THUMBNAIL_SIDE // _BLOCK), np.full(_BLOCK, 1 / _BLOCK)).astype(np.float32)


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


_BLOCK_WINDOWS = _WINDOWS.reshape(len(_WINDOWS), THUMBNAIL_SIDE // _BLOCK, _BLOCK, THUMBNAIL_SIDE).mean(2)


def _find_windows(whole: np.ndarray, crop: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Find the windows of grey pictures, [N, S, S], in which their blocks are nearest to those of another.

    Returns:
        Numbers of the windows of the rows and of the columns, and whether the blocks are near at all, each [N].
    """
    count, side = len(_WINDOWS), THUMBNAIL_SIDE // _BLOCK
    flat = _BLOCK_WINDOWS.reshape(count * side, THUMBNAIL_SIDE)
    blocks = (flat @ whole @ flat.T).reshape(-1, count, side, count, side)
    blocks = blocks.transpose(0, 1, 3, 2, 4).reshape(-1, count * count, side * side)
    wanted = crop.reshape(-1, side, _BLOCK, side, _BLOCK).mean((2, 4)).reshape(-1, side * side)
    errors = (blocks**2).sum(2) - 2 * (blocks @ wanted[..., None])[..., 0] + (wanted**2).sum(1)[:, None]
    best = errors.argmin(1)
    least = np.maximum(errors[np.arange(len(best)), best], 0)
    energy = ((wanted - wanted.mean(1, keepdims=True)) ** 2).sum(1)
    fits = (least <= _MAX_BLOCK_ERROR**2 * energy) | (least <= side * side * _FLAT_ERROR_LEVELS**2)
    return best // count, best % count, fits


def _crop(whole: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Crop pictures, [N, S, S, 3], to windows and stretch them again."""
    stretched = (_WINDOWS[rows] @ whole.reshape(-1, THUMBNAIL_SIDE, THUMBNAIL_SIDE * 3)).reshape(whole.shape)
    return (_WINDOWS[columns][:, None] @ stretched).reshape(whole.shape)
