"""Features of pictures by a vision tower, kept on disk, and the search for pictures that are near in them.

Shapes: N pictures, E width of the features.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lit_vlm.curation.features import FEATURES_FOLDER, Features, OnProgress
from lit_vlm.curation.matching import WINDOW, Matches
from lit_vlm.curation.mixture import iterate_batches
from lit_vlm.data.index.shard_cache import hash_parts
from lit_vlm.files import atomic_write
from lit_vlm.types import LazyImage, Source

BLOCK_RECORDS = 512  # of one file of features: an interrupted pass goes on with the block at which it stopped
BLOCK_PICTURES = 2048  # compared with as many at a time


class PictureEncoder(Protocol):
    """Model that makes features of pictures; features of another digest are others."""

    digest: str

    def embed_images(self, images: Sequence) -> Tensor:
        """Compute the features of pictures, [n, E] of length 1."""
        ...


def embed_pictures(
    sources: Sequence[Source],
    features: Features,
    encoder: PictureEncoder,
    index_dir: Path,
    *,
    batch_size: int,
    workers: int,
    on_progress: OnProgress | None = None,
) -> np.ndarray:
    """Compute the features of all pictures of the records, or read those that are there: [N, E] float16.

    Args:
        features: of the records; pictures of equal bytes are encoded once in a block.
        batch_size: pictures that the model sees at once.
        workers: threads that decode.

    Raises:
        RecordError: a picture cannot be decoded any more.
    """
    folder, parts = index_dir / FEATURES_FOLDER, list[np.ndarray]()
    counts, num_records = features.rows["num_images"], len(features.rows)
    with ThreadPoolExecutor(workers) as pool:
        for start in _list_block_starts(features):
            stop = min(
                start + BLOCK_RECORDS, int(np.searchsorted(features.source_ids, features.source_ids[start], "right"))
            )
            first = int(features.first_images[start])
            contents = features.images["content"][first : first + int(counts[start:stop].sum())]
            path = folder / f"{hash_parts('embeddings', encoder.digest, contents.tobytes().hex())}.embeddings.npy"
            known = _read_block(path, len(contents))
            if known is None:
                images = [
                    image
                    for record in range(start, stop)
                    if counts[record]
                    for image in sources[features.source_ids[record]][int(features.positions[record])].images
                ]
                known = _embed_block(images, contents, encoder, batch_size, pool)
                with atomic_write(path) as draft, draft.open("wb") as stream:
                    np.save(stream, known, allow_pickle=False)
            parts.append(known)
            if on_progress:
                on_progress("pictures", stop, num_records)
    width = max((part.shape[1] for part in parts), default=0)
    return np.concatenate([np.zeros((0, width), np.float16), *(part for part in parts if len(part))])


def _list_block_starts(features: Features) -> list[int]:
    """List the first records of blocks: each source begins one, so that a source that grows changes only its last block."""
    starts = np.flatnonzero(np.diff(features.source_ids, prepend=-1))
    ends = [*starts[1:].tolist(), len(features.rows)]
    return [one for start, end in zip(starts.tolist(), ends, strict=True) for one in range(start, end, BLOCK_RECORDS)]


def _read_block(path: Path, num_pictures: int) -> np.ndarray | None:
    try:
        known = np.load(path)
    except (OSError, ValueError, EOFError):
        return None
    return known if known.dtype == np.float16 and known.ndim == 2 and len(known) == num_pictures else None


def _embed_block(
    images: Sequence[LazyImage],
    contents: np.ndarray,
    encoder: PictureEncoder,
    batch_size: int,
    pool: ThreadPoolExecutor,
) -> np.ndarray:
    """Encode the pictures of a block, equal ones once: [n, E] float16."""
    if not images:
        return np.zeros((0, 0), np.float16)
    _, first, inverse = np.unique(contents, axis=0, return_index=True, return_inverse=True)

    encoded = [
        encoder.embed_images(list(pool.map(lambda number: images[number].load(), numbers))).numpy()
        for numbers in iterate_batches(first.tolist(), batch_size)
    ]
    return np.concatenate(encoded).astype(np.float16)[inverse.ravel()]


def match_embeddings(embeddings: np.ndarray, min_cosine: float) -> Matches:
    """Find all pairs of pictures whose features have at least this cosine, exactly, in blocks.

    A picture is paired with at most `WINDOW` earlier ones, those of the highest cosine; pictures with more are counted as full.

    Args:
        embeddings: [N, E]; their length does not matter.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    values = F.normalize(torch.from_numpy(np.ascontiguousarray(embeddings, np.float32)), dim=-1)
    firsts, seconds, num_full = list[Tensor](), list[Tensor](), 0
    for start in range(0, len(values), BLOCK_PICTURES):
        block = values[start : start + BLOCK_PICTURES].to(device)
        best = torch.full((len(block), 0), -2.0, device=device)
        places = torch.zeros((len(block), 0), dtype=torch.long, device=device)
        found = torch.zeros(len(block), dtype=torch.long, device=device)
        for low in range(0, start + len(block), BLOCK_PICTURES):
            others = values[low : min(low + BLOCK_PICTURES, start + len(block))].to(device)
            cosines = block @ others.T
            if low == start:
                cosines = (
                    cosines.tril(-1) - torch.ones_like(cosines).triu() * 2
                )  # each pair once, and no picture with itself
            found += (cosines >= min_cosine).sum(1)
            numbers = torch.arange(low, low + len(others), device=device).expand_as(cosines)
            joined = torch.cat([best, cosines], 1)
            best, order = joined.topk(min(WINDOW, joined.shape[1]), 1)
            places = torch.cat([places, numbers], 1).gather(1, order)
        rows, columns = torch.nonzero(best >= min_cosine, as_tuple=True)
        firsts.append(places[rows, columns].cpu())
        seconds.append(rows.cpu() + start)
        num_full += int((found > WINDOW).sum())
    empty = torch.zeros(0, dtype=torch.long)
    return Matches(torch.cat([empty, *firsts]).numpy(), torch.cat([empty, *seconds]).numpy(), num_full)
