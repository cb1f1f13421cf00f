"""Tiling: split an image into a base view and its tiles, uint8, exactly as transformers' image processors of the LLaVA family."""

from __future__ import annotations

import math
from enum import Enum

import numpy as np
from PIL import Image

from lit_vlm.anyres import ImageSettings, ModelClass, select_best_resolution
from lit_vlm.types import LazyImage

# Shapes: N tiles, H = W = tile_size pixels. Sizes are (height, width).

# transformers pads and crops images of any size; ours differ from its pixels beyond these
MAX_CROPPED_ASPECT = 16  # an image is cropped to this aspect ratio before its centre is resized
MAX_SQUARE_PX, SHRUNK_SQUARE_PX = 16384, 8192  # a longer side is shrunk before the image is padded to a square


def load_tiles(
    source: LazyImage,
    settings: ImageSettings,
    *,
    single_image: bool = True,
    max_tiles: int | None = None,
    scaled_decode: bool = False,
) -> np.ndarray:
    """Decode an image and split it into tiles, as `split_into_tiles`: [N, 3, H, W] uint8.

    Args:
        scaled_decode: decode a JPEG no larger than its tiles require. The tiling is that of the true size, the pixels
            differ slightly. Sources without `load_at_least` are decoded at full size.

    Raises:
        RecordError: the image cannot be decoded.
    """
    load = getattr(source, "load_at_least", None) if scaled_decode else None
    if load is None:
        return split_into_tiles(source.load(), settings, single_image=single_image, max_tiles=max_tiles)
    needed = compute_decode_size(*source.size, settings, single_image=single_image, max_tiles=max_tiles)
    return split_into_tiles(load(*needed), settings, single_image=single_image, max_tiles=max_tiles, size=source.size)


def split_into_tiles(
    image: Image.Image,
    settings: ImageSettings,
    *,
    single_image: bool = True,
    max_tiles: int | None = None,
    size: tuple[int, int] | None = None,
) -> np.ndarray:
    """Split an image into tiles: the base view first, then the tiles row by row.

    Args:
        image: RGB.
        single_image: False if the sample has several images; OneVision makes one square view of each, padded with the
            mean colour.
        max_tiles: maximum number of tiles in addition to the base view, as in `ImageSettings.compute_layout`.
        size: true (height, width) of an image that was decoded at a smaller scale; it determines the tiling.

    Returns:
        [N, 3, H, W] uint8, not normalised, contiguous.
    """
    side, resample = settings.tile_size, settings.resample
    views = [_make_base_view(image, settings, single_image)]
    height, width = size or (image.height, image.width)
    resolution = _select_resolution(height, width, settings, single_image, max_tiles)
    if resolution is not None:
        (height, width), fitted = resolution
        view = image.resize((fitted[1], fitted[0]), resample)
        left, top = (width - fitted[1]) // 2, (height - fitted[0]) // 2
        if fitted != (height, width):  # pixels outside of the image are black, as in transformers' padding
            view = view.crop((-left, -top, width - left, height - top))
        views.append(view)
    return _stack_tiles(views, side)


def compute_decode_size(
    height: int, width: int, settings: ImageSettings, *, single_image: bool = True, max_tiles: int | None = None
) -> tuple[int, int]:
    """Compute the minimum (height, width) at which to decode an image, so that scaled decoding does not enlarge any view."""
    side, form = settings.tile_size, _select_square_form(settings, single_image)
    if form is not SquareForm.stretch:
        edge = max(height, width) if form is SquareForm.pad else min(height, width)
        return math.ceil(height * side / edge), math.ceil(width * side / edge)
    resolution = _select_resolution(height, width, settings, single_image, max_tiles)
    fitted = resolution[1] if resolution else (side, side)
    return max(fitted[0], side), max(fitted[1], side)


def _select_resolution(
    height: int, width: int, settings: ImageSettings, single_image: bool, max_tiles: int | None
) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """Select the tile grid: its size in pixels, and the size of the image centred in it. None: base view only."""
    if settings.is_base_view_only(single_image=single_image, max_tiles=max_tiles):
        return None
    grid_height, grid_width = select_best_resolution(height, width, settings.select_pinpoints(max_tiles))
    scale_x, scale_y = grid_width / width, grid_height / height
    if scale_x < scale_y:
        return (grid_height, grid_width), (min(math.ceil(height * scale_x), grid_height), grid_width)
    return (grid_height, grid_width), (grid_height, min(math.ceil(width * scale_y), grid_width))


class SquareForm(Enum):
    """Form of the base view, a square, of an image that is no square."""

    stretch = "stretch"  # resized without its aspect ratio
    pad = "pad"  # padded with the mean colour
    crop = "crop"  # its centre


def _select_square_form(settings: ImageSettings, single_image: bool) -> SquareForm:
    if settings.model_class is ModelClass.llava:
        return SquareForm.pad if settings.pad_to_square else SquareForm.crop
    is_one_of_several = not single_image and settings.model_class is ModelClass.llava_onevision
    return SquareForm.pad if is_one_of_several else SquareForm.stretch


def _make_base_view(image: Image.Image, settings: ImageSettings, single_image: bool) -> Image.Image:
    side, form = settings.tile_size, _select_square_form(settings, single_image)
    if form is not SquareForm.crop:
        if form is SquareForm.pad and image.height < image.width <= MAX_SQUARE_PX:
            # Pillow resizes rows first: those above and below the image keep their colour, so they are added afterwards
            height, image = image.width, image.resize((side, image.height), settings.resample)
            canvas = Image.new("RGB", (side, height), _compute_mean_colour(settings))
            canvas.paste(image, (0, (height - image.height) // 2))
            return canvas.resize((side, side), settings.resample)
        square = _pad_to_square(image, settings) if form is SquareForm.pad else image
        return square.resize((side, side), settings.resample)
    shortest = min(image.size)
    if max(image.size) > MAX_CROPPED_ASPECT * shortest:  # a line of pixels would become an image of gigabytes
        edges = [min(edge, MAX_CROPPED_ASPECT * shortest) for edge in image.size]
        left, top = ((edge - kept) // 2 for edge, kept in zip(image.size, edges, strict=True))
        image = image.crop((left, top, left + edges[0], top + edges[1]))
    width, height = (int(side * edge / shortest) for edge in image.size)
    left, top = (width - side) // 2, (height - side) // 2
    return image.resize((width, height), settings.resample).crop((left, top, left + side, top + side))


def _pad_to_square(image: Image.Image, settings: ImageSettings) -> Image.Image:
    """Pad an image to a square with the mean colour."""
    if image.width == image.height:
        return image
    side = max(image.size)
    if side > MAX_SQUARE_PX:  # a line of pixels would become a canvas of gigabytes
        image = image.resize([max(1, edge * SHRUNK_SQUARE_PX // side) for edge in image.size], settings.resample)
        side = max(image.size)
    canvas = Image.new("RGB", (side, side), _compute_mean_colour(settings))
    canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return canvas


def _compute_mean_colour(settings: ImageSettings) -> tuple[int, ...]:
    return tuple(int(value * 255) for value in settings.mean)


def _stack_tiles(views: list[Image.Image], side: int) -> np.ndarray:
    """Stack the tiles of all views: [N, 3, H, W] uint8. It copies band by band, because Pillow's bands are planes already."""
    grids = [(view.height // side, view.width // side) for view in views]
    tiles = np.empty((sum(rows * columns for rows, columns in grids), 3, side, side), np.uint8)
    start = 0
    for view, (rows, columns) in zip(views, grids, strict=True):
        grid = tiles[start : start + rows * columns].reshape(rows, columns, 3, side, side)
        for channel, band in enumerate(view.split()):
            grid[:, :, channel] = np.asarray(band).reshape(rows, side, columns, side).transpose(0, 2, 1, 3)
        start += rows * columns
    return tiles
