"""Pixels: one image becomes a base view and its tiles, uint8, exactly as transformers' OneVision image processor cuts them."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

from lit_vlm.anyres import ImageSettings, Tiling, best_resolution

# Shapes: N tiles, H = W = tile_size pixels.


def tiles_of(image: Image.Image, settings: ImageSettings, *, alone: bool = True) -> np.ndarray:
    """The base view first, then the tiles row by row.

    Args:
        image: RGB.
        alone: False when the sample holds several images; each is then one square view, padded with the mean colour.

    Returns:
        [N, 3, H, W] uint8, not normalised.
    """
    side = settings.tile_size
    if not alone:
        return _stack([_resized(_padded_to_square(image, settings), side, side, settings)])
    base = _resized(image, side, side, settings)
    if settings.tiling is Tiling.base:
        return _stack([base])
    height, width = best_resolution(image.height, image.width, settings.grid_pinpoints)
    scale_width, scale_height = width / image.width, height / image.height
    if scale_width < scale_height:
        fitted = (min(math.ceil(image.height * scale_width), height), width)
    else:
        fitted = (height, min(math.ceil(image.width * scale_height), width))
    canvas = Image.new("RGB", (width, height))  # black, as transformers pads
    canvas.paste(_resized(image, *fitted, settings), ((width - fitted[1]) // 2, (height - fitted[0]) // 2))
    cuts = [
        canvas.crop((left, top, left + side, top + side))
        for top in range(0, height, side)
        for left in range(0, width, side)
    ]
    return _stack([base, *cuts])


def _resized(image: Image.Image, height: int, width: int, settings: ImageSettings) -> Image.Image:
    if image.size == (width, height):
        return image
    return image.resize((width, height), resample=settings.resample)


def _padded_to_square(image: Image.Image, settings: ImageSettings) -> Image.Image:
    if image.width == image.height:
        return image
    side = max(image.size)
    canvas = Image.new("RGB", (side, side), tuple(int(value * 255) for value in settings.mean))
    canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return canvas


def _stack(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images]).transpose(0, 3, 1, 2)
