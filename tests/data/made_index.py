"""Indexes built from arrays without data, and three shapes of data for plans."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lit_vlm.cost import Flops
from lit_vlm.data.index.sample_index import COLUMNS, KINDS, LANGUAGES, LENGTH_POLICY_COLUMNS, SampleIndex
from lit_vlm.types import Language, SampleKind

FLOPS = Flops(per_token=8e10, per_square=6e5, per_tile=7e11, per_supervised=3e9)  # about those of a 7B model


@dataclass
class NamedSource:
    """Source with a name and nothing to read."""

    name: str
    digest: str = ""


def make_index(sizes: dict[str, int], seed: int = 0, **columns) -> SampleIndex:
    """Make an index of sources of these sizes.

    Defaults of the columns: 10 to 100 tokens, half of them supervised, one tile, Korean captions with one image.
    """
    count, generator = sum(sizes.values()), np.random.default_rng(seed)
    tokens = np.asarray(columns.get("tokens", generator.integers(10, 101, count)))
    values = {
        "position": np.concatenate([np.arange(size) for size in sizes.values()]),
        "tokens": tokens,
        "supervised": tokens // 2,
        "squares": tokens.astype(np.int64) ** 2,
        "tiles": 1,
        "images": 1,
        "kind": KINDS.index(SampleKind.caption),
        "language": LANGUAGES.index(Language.ko),
        "digest": generator.integers(0, 1 << 63, count),
        "most_tiles": -1,
        "turns": -1,
        **columns,
    }
    dtypes = {**COLUMNS, **LENGTH_POLICY_COLUMNS}
    arrays = {name: np.full(count, values.get(name, 0)).astype(dtype) for name, dtype in dtypes.items()}
    source_ids = np.repeat(np.arange(len(sizes), dtype=np.int16), list(sizes.values()))
    return SampleIndex([NamedSource(name) for name in sizes], source_ids, arrays)


def make_shaped_index(shape: str, count: int, seed: int = 0) -> SampleIndex:
    """Make an index of one shape of data.

    `lcs`: one tile and a short caption. `mix665k`: one tile and a dialogue, or text. `anyres`: up to ten tiles.
    """
    generator = np.random.default_rng(seed)

    def sample_lognormal(median: float, sigma: float, low: int, high: int) -> np.ndarray:
        return np.clip(np.round(median * np.exp(sigma * generator.standard_normal(count))), low, high).astype(int)

    if shape == "lcs":
        answer, tiles = sample_lognormal(13, 0.4, 5, 77), np.ones(count, int)
        return make_index({shape: count}, seed, tokens=735 + answer, supervised=answer, tiles=tiles)
    dialogue, text = (
        sample_lognormal(150, 0.8, 20, 1300),
        generator.random(count) < (0.06 if shape == "mix665k" else 0.15),
    )
    grid = np.array([1, 1, 2, 2, 2, 2, 2, 3, 3, 3, 4, 4, 4, 4, 4, 4, 5, 6, 6, 6, 6, 7, 8, 8, 9, 9, 9, 9])
    grid = (
        np.zeros(count, int)
        if shape == "mix665k"
        else np.where(generator.random(count) < 0.2, 0, generator.choice(grid, count))
    )
    tiles = np.where(text, 0, 1 + grid)
    tokens = np.where(text, sample_lognormal(700, 0.8, 40, 2048), 729 * (1 + grid) + 27 * grid + dialogue)
    return make_index({shape: count}, seed, tokens=tokens, tiles=tiles, images=(tiles > 0).astype(int))
