"""Random crops, flips and RandAugment of images, as BLIP and BLIP-2 train on them, from a generator for each image.

Sizes and operations are those of BLIP's release (data/__init__.py, pretrain.py, transform/randaugment.py), computed by Pillow. A
flip makes captions with "left" or "right" false; BLIP and BLIP-2 flip all the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

CROP_RATIO = 3 / 4  # of the sides of a crop, at the least
CROP_TRIES = 10  # after which the whole image is taken, cut to the ratio
NUM_OPERATIONS, PROBABILITY = 2, 0.5  # operations that are drawn for an image, and the probability that one is done
# At BLIP's level, 5 of 10
DEGREES, SHEAR, PIXELS = 15.0, 0.15, 5.0
FILL = (128, 128, 128)  # where a shifted image has no pixels


@dataclass(frozen=True, slots=True)
class Augmentation:
    """Random changes of an image that is resized to a square.

    Args:
        min_crop_area: smallest share of the image's area that a crop keeps; 1: no crops.
        flips: mirror half of the images.
        rand_augment: apply BLIP's RandAugment(2, 5).
    """

    min_crop_area: float = 1.0
    flips: bool = False
    rand_augment: bool = False

    @property
    def is_off(self) -> bool:
        """True if no image is changed."""
        return self == Augmentation()

    def load_pixels(self, image: Image.Image, size: int, rng: np.random.Generator) -> np.ndarray:
        """Crop and resize an image to a square, mirror it and change it, [size, size, 3] uint8."""
        image = image.convert("RGB")
        if self.min_crop_area < 1:
            image = image.crop(draw_crop(image.size, self.min_crop_area, rng))
        image = image.resize((size, size), Image.Resampling.BICUBIC)
        if self.flips and rng.random() < 0.5:
            image = ImageOps.mirror(image)
        return np.array(apply_rand_augment(image, rng) if self.rand_augment else image)


def draw_crop(size: tuple[int, int], min_area: float, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Draw a crop of an image of (width, height) as torchvision's RandomResizedCrop does: left, top, right, bottom."""
    width, height = size
    for _ in range(CROP_TRIES):
        area = width * height * rng.uniform(min_area, 1.0)
        ratio = math.exp(rng.uniform(math.log(CROP_RATIO), -math.log(CROP_RATIO)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    w, h = min(width, round(height / CROP_RATIO)), min(height, round(width / CROP_RATIO))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def apply_rand_augment(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Apply two operations of BLIP's list to an image, each with probability one half; one may come twice."""
    for number in rng.integers(len(OPERATIONS), size=NUM_OPERATIONS):
        if rng.random() < PROBABILITY:
            image = OPERATIONS[number](image, 1.0 if rng.random() < 0.5 else -1.0)
    return image


def _keep(image: Image.Image, sign: float) -> Image.Image:
    return image


def _move(x_shear: float, x: float, y_shear: float, y: float) -> Callable[[Image.Image, float], Image.Image]:
    """Return an operation that shears or shifts an image to either side."""

    def move(image: Image.Image, sign: float) -> Image.Image:
        matrix = (1.0, sign * x_shear, sign * x, sign * y_shear, 1.0, sign * y)
        return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=FILL)

    return move


# By BLIP's names. Its factor of brightness and of sharpness at level 5 is 1, which changes nothing.
OPERATIONS: tuple[Callable[[Image.Image, float], Image.Image], ...] = (
    _keep,  # Identity
    lambda image, sign: ImageOps.autocontrast(image),  # AutoContrast
    _keep,  # Brightness
    _keep,  # Sharpness
    lambda image, sign: ImageOps.equalize(image),  # Equalize
    _move(SHEAR, 0, 0, 0),  # ShearX
    _move(0, 0, SHEAR, 0),  # ShearY
    _move(0, PIXELS, 0, 0),  # TranslateX
    _move(0, 0, 0, PIXELS),  # TranslateY
    lambda image, sign: image.rotate(sign * DEGREES, Image.Resampling.BILINEAR, fillcolor=FILL),  # Rotate
)
