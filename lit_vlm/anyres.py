"""Compute the tiling of the LLaVA family: the number of tiles and tokens that an image becomes.

`data` counts tokens with it and `model` arranges features with it, so the two cannot disagree. The rules are those of
transformers 5.23 (`models/llava*/{image_processing,modeling,processing}_*.py`), rounding included. A test compares both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache
from typing import NamedTuple


class Tiling(StrEnum):
    """Tiling mode. `base`: the whole image once, for alignment. `anyres`: the whole image and its tiles (transformers')."""

    base = "base"
    anyres = "anyres"


class ModelClass(StrEnum):
    """Class of transformers that the model trains and is exported as; its value is the class's `model_type`."""

    llava = "llava"  # LLaVA 1 and 1.5: one square view of each image, no row separator
    llava_next = "llava_next"  # LLaVA-NeXT (1.6): the whole image and its tiles, never downsampled, for each image
    llava_onevision = "llava_onevision"  # LLaVA-OneVision, VARCO-VISION: tiles, downsampled above max_tiles


class TileLayout(NamedTuple):
    """Arrangement of one image's tile features as tokens."""

    num_tiles: int  # inputs of the vision tower, the base view first
    num_tokens: int  # image placeholders in the prompt
    # below: in tokens of the stitched grid, which are patches unless the projector merges them
    rows: int = 0  # tiles down and across; 0: base view only
    columns: int = 0
    # top, bottom, left, right: the part of the stitched grid that the image covers
    crop: tuple[int, int, int, int] = (0, 0, 0, 0)
    pooled: tuple[int, int] | None = None  # bilinear target (height, width) when max_tiles is exceeded


@dataclass(frozen=True, slots=True)
class ImageSettings:
    """Tiling and normalisation settings, read from a model folder; the same for data, model and export."""

    tile_size: int  # pixels, square
    patch_size: int
    grid_pinpoints: tuple[tuple[int, int], ...]  # (height, width) of the resolutions to choose from; LLaVA 1.x: none
    max_tiles: int | None  # N of anyres_max_N: features are pooled above 1.1 times the tokens of N tiles; None: never
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resample: int = 3  # PIL's bicubic
    tiling: Tiling = Tiling.anyres
    select: str = "full"  # vision_feature_select_strategy: "full" (SigLIP) or "default" (CLIP, its class token dropped)
    do_rescale: float = field(default=1 / 255)
    model_class: ModelClass = ModelClass.llava_onevision
    token_side: int | None = None  # tokens along one side of a tile where the projector merges patches; None: patches
    pad_to_square: bool = True  # LLaVA 1.x: pad an image to a square in the mean colour; False: crop its centre

    @property
    def side(self) -> int:
        """Tokens along one side of a tile."""
        return self.token_side or self.tile_size // self.patch_size

    @property
    def token_px(self) -> int:
        """Pixels along one side of a token, from which transformers' processors count."""
        return self.tile_size // self.token_side if self.token_side else self.patch_size

    @property
    def has_newline(self) -> bool:
        """True if a learned separator ends each row of tiles, and the base view."""
        return self.model_class is not ModelClass.llava

    @property
    def vision_aspect_ratio(self) -> str:
        return f"anyres_max_{self.max_tiles}"

    def compute_layout(
        self, height: int, width: int, *, single_image: bool = True, max_tiles: int | None = None
    ) -> TileLayout:
        """Compute the tiles and tokens of an image of this size (pixels).

        Args:
            single_image: False when the sample holds several images; OneVision then encodes the base view of each only.
            max_tiles: maximum number of tiles in addition to the base view; a smaller grid of the model's is selected.
                0: the base view only.
        """
        if self.is_base_view_only(single_image=single_image, max_tiles=max_tiles):
            return TileLayout(num_tiles=1, num_tokens=self.side**2 + self.has_newline)
        pinpoints = self.select_pinpoints(max_tiles)
        return _compute_layout(self.side, self.tile_size, pinpoints, self.max_tiles, height, width)

    def is_base_view_only(self, *, single_image: bool = True, max_tiles: int | None = None) -> bool:
        """Return True if an image is encoded as its base view, without tiles. Arguments as in `compute_layout`."""
        is_one_of_several = not single_image and self.model_class is ModelClass.llava_onevision
        return self.tiling is Tiling.base or max_tiles == 0 or is_one_of_several

    def select_pinpoints(self, max_tiles: int | None = None) -> tuple[tuple[int, int], ...]:
        """Select the resolutions (height, width) that have at most `max_tiles` tiles."""
        if max_tiles is None:
            return self.grid_pinpoints
        return _filter_pinpoints(self.grid_pinpoints, self.tile_size, max_tiles)


def make_grid_pinpoints(tile_size: int, grid_size: int) -> tuple[tuple[int, int], ...]:
    """Make all (height, width) from 1x1 to grid_size x grid_size tiles, as in LLaVA-OneVision's `(1x1),...,(6x6)`."""
    sides = [tile_size * n for n in range(1, grid_size + 1)]
    return tuple((height, width) for height in sides for width in sides)


def select_best_resolution(height: int, width: int, pinpoints: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    """Select the pinpoint that keeps the most image pixels; of equals, the one that wastes the fewest."""
    best, most_kept, least_wasted = pinpoints[0], -1, math.inf
    for target_height, target_width in pinpoints:
        scale = min(target_width / width, target_height / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        wasted = target_width * target_height - kept
        if kept > most_kept or (kept == most_kept and wasted < least_wasted):
            best, most_kept, least_wasted = (target_height, target_width), kept, wasted
    return best


@lru_cache(maxsize=256)
def _filter_pinpoints(
    pinpoints: tuple[tuple[int, int], ...], tile_size: int, max_tiles: int
) -> tuple[tuple[int, int], ...]:
    allowed = tuple(point for point in pinpoints if point[0] * point[1] <= max_tiles * tile_size**2)
    return allowed or (min(pinpoints, key=lambda point: point[0] * point[1]),)


@lru_cache(maxsize=65536)
def _compute_layout(
    side: int, tile_size: int, pinpoints: tuple[tuple[int, int], ...], max_tiles: int | None, height: int, width: int
) -> TileLayout:
    target_height, target_width = select_best_resolution(height, width, pinpoints)
    rows, columns = target_height // tile_size, target_width // tile_size
    grid_height, grid_width = rows * side, columns * side
    top = left = 0
    if width / height > grid_width / grid_height:
        top = (grid_height - int(round(height * (grid_width / width), 7))) // 2
    else:
        left = (grid_width - int(round(width * (grid_height / height), 7))) // 2
    kept_height, kept_width = grid_height - 2 * top, grid_width - 2 * left
    ratio = math.sqrt(kept_height * kept_width / (max_tiles * side**2)) if max_tiles else 0.0
    pooled = (int(kept_height // ratio), int(kept_width // ratio)) if ratio > 1.1 else None
    token_height, token_width = pooled or (kept_height, kept_width)
    return TileLayout(
        num_tiles=1 + rows * columns,
        num_tokens=side * side + token_height * (token_width + 1),
        rows=rows,
        columns=columns,
        crop=(top, grid_height - top, left, grid_width - left),
        pooled=pooled,
    )
