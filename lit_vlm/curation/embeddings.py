"""Features of pictures by a vision tower, kept on disk, and the search for pictures that are near in them.

Shapes: N pictures, E width of the features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

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


class NearPairs(NamedTuple):
    """Pairs of a picture and one of others, by their numbers [n] int64, with the cosines of their features [n] float32."""

    pictures: np.ndarray
    others: np.ndarray
    cosines: np.ndarray


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
    parts, counts, num_records = list[np.ndarray](), features.rows["num_images"], len(features.rows)
    with ThreadPoolExecutor(workers) as pool:
        store = EmbeddingStore(encoder, index_dir, batch_size, pool)
        for start in _list_block_starts(features):
            stop = min(
                start + BLOCK_RECORDS, int(np.searchsorted(features.source_ids, features.source_ids[start], "right"))
            )
            first = int(features.first_images[start])
            contents = features.images["content"][first : first + int(counts[start:stop].sum())]
            records = [record for record in range(start, stop) if counts[record]]
            parts.append(store.embed(contents, partial(list_images, sources, features, records)))
            if on_progress:
                on_progress("pictures", stop, num_records)
    return join_embeddings(parts)


def list_images(sources: Sequence[Source], features: Features, records: Sequence[int]) -> list[LazyImage]:
    """List the pictures of records, not decoded."""
    return [
        image
        for record in records
        for image in sources[features.source_ids[record]][int(features.positions[record])].images
    ]


def join_embeddings(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Join the features of blocks, [N, E] float16; blocks without a picture have no width."""
    width = max((part.shape[1] for part in parts), default=0)
    return np.concatenate([np.zeros((0, width), np.float16), *(part for part in parts if len(part))])


def _list_block_starts(features: Features) -> list[int]:
    """List the first records of blocks: each source begins one, so that a source that grows changes only its last block."""
    starts = np.flatnonzero(np.diff(features.source_ids, prepend=-1))
    ends = [*starts[1:].tolist(), len(features.rows)]
    return [one for start, end in zip(starts.tolist(), ends, strict=True) for one in range(start, end, BLOCK_RECORDS)]


@runtime_checkable
class TextEncoder(Protocol):
    """Model that makes features of texts as well."""

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Compute the features of texts, [n, E] of length 1."""
        ...


class EmbeddingStore:
    """Features of blocks of pictures, by the pictures' bytes and the model, and of blocks of texts.

    Args:
        index_dir: folder of the store.
        batch_size: pictures that the model sees at once.
        pool: threads that decode.
    """

    def __init__(self, encoder: PictureEncoder, index_dir: Path, batch_size: int, pool: ThreadPoolExecutor) -> None:
        self.encoder, self.batch_size, self.pool = encoder, batch_size, pool
        self.folder = index_dir / FEATURES_FOLDER

    @property
    def reads_texts(self) -> bool:
        """True if the model makes features of texts."""
        return isinstance(self.encoder, TextEncoder)

    def embed(self, contents: np.ndarray, list_images: Callable[[], Sequence[LazyImage]]) -> np.ndarray:
        """Compute the features of a block of pictures, or read them if they are there: [n, E] float16.

        Args:
            contents: digests of their bytes, [n, 2] uint64.
            list_images: lists the pictures; called if their features are not there.

        Raises:
            RecordError: a picture cannot be decoded.
        """
        key = hash_parts("embeddings", self.encoder.digest, contents.tobytes().hex())
        return self._read_or_make(key, len(contents), lambda: self._encode(list_images(), contents))

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Compute the features of a block of texts, or read them if they are there: [n, E] float16."""
        encoder = self.encoder
        assert isinstance(encoder, TextEncoder)
        key = hash_parts("text embeddings", encoder.digest, *texts)
        batches = iterate_batches(texts, self.batch_size)
        return self._read_or_make(
            key,
            len(texts),
            lambda: np.concatenate([encoder.embed_texts(batch).numpy() for batch in batches]).astype(np.float16),
        )

    def _read_or_make(self, key: str, count: int, make: Callable[[], np.ndarray]) -> np.ndarray:
        """Read the features of a block, or make and write them."""
        path = self.folder / f"{key}.embeddings.npy"
        known = _read_block(path, count)
        if known is None:
            known = make()
            with atomic_write(path) as draft, draft.open("wb") as stream:
                np.save(stream, known, allow_pickle=False)
        return known

    def _encode(self, images: Sequence[LazyImage], contents: np.ndarray) -> np.ndarray:
        """Encode pictures, equal ones once: [n, E] float16."""
        if not images:
            return np.zeros((0, 0), np.float16)
        _, first, inverse = np.unique(contents, axis=0, return_index=True, return_inverse=True)
        encoded = [
            self.encoder.embed_images(list(self.pool.map(lambda number: images[number].load(), numbers))).numpy()
            for numbers in iterate_batches(first.tolist(), self.batch_size)
        ]
        return np.concatenate(encoded).astype(np.float16)[inverse.ravel()]


def _read_block(path: Path, count: int) -> np.ndarray | None:
    try:
        known = np.load(path)
    except (OSError, ValueError, EOFError):
        return None
    return known if known.dtype == np.float16 and known.ndim == 2 and len(known) == count else None


class _Nearest:
    """The nearest pictures of each picture of a block, collected over blocks of others: at most `WINDOW` of each."""

    def __init__(self, block: Tensor) -> None:
        self.block, self.device = block, block.device
        self.cosines = torch.full((len(block), 0), -2.0, device=self.device)
        self.numbers = torch.zeros((len(block), 0), dtype=torch.long, device=self.device)
        self.num_found = torch.zeros(len(block), dtype=torch.long, device=self.device)

    def add(self, others: Tensor, start: int, min_cosine: float, *, earlier: bool = False) -> None:
        """Compare with other pictures, [n, E], which are numbered from `start`; earlier: each row with those before it only."""
        cosines = self.block @ others.T
        if earlier:
            cosines = cosines.tril(-1) - torch.ones_like(cosines).triu() * 2
        self.num_found += (cosines >= min_cosine).sum(1)
        numbers = torch.arange(start, start + len(others), device=self.device).expand_as(cosines)
        joined = torch.cat([self.cosines, cosines], 1)
        self.cosines, order = joined.topk(min(WINDOW, joined.shape[1]), 1)
        self.numbers = torch.cat([self.numbers, numbers], 1).gather(1, order)

    def list_pairs(self, min_cosine: float) -> tuple[Tensor, Tensor, Tensor]:
        """List the pairs that are near enough: rows of the block, numbers of others, and cosines."""
        rows, columns = torch.nonzero(self.cosines >= min_cosine, as_tuple=True)
        return rows.cpu(), self.numbers[rows, columns].cpu(), self.cosines[rows, columns].cpu()


def _normalize(embeddings: np.ndarray) -> Tensor:
    return F.normalize(torch.from_numpy(np.ascontiguousarray(embeddings, np.float32)), dim=-1)


def match_embeddings(embeddings: np.ndarray, min_cosine: float) -> Matches:
    """Find all pairs of pictures whose features have at least this cosine, exactly, in blocks.

    A picture is paired with at most `WINDOW` earlier ones, those of the highest cosine; pictures with more are counted as full.

    Args:
        embeddings: [N, E]; their length does not matter.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    values = _normalize(embeddings)
    firsts, seconds, num_full = [torch.zeros(0, dtype=torch.long)], [torch.zeros(0, dtype=torch.long)], 0
    for start in range(0, len(values), BLOCK_PICTURES):
        nearest = _Nearest(values[start : start + BLOCK_PICTURES].to(device))
        stop = start + len(nearest.block)
        for low in range(0, stop, BLOCK_PICTURES):
            others = values[low : min(low + BLOCK_PICTURES, stop)].to(device)
            nearest.add(others, low, min_cosine, earlier=low == start)
        rows, numbers, _ = nearest.list_pairs(min_cosine)
        firsts.append(numbers)
        seconds.append(rows + start)
        num_full += int((nearest.num_found > WINDOW).sum())
    return Matches(torch.cat(firsts).numpy(), torch.cat(seconds).numpy(), num_full)


def match_other_embeddings(embeddings: np.ndarray, others: np.ndarray, min_cosine: float) -> NearPairs:
    """Find the pairs of a picture and one of others whose features have at least this cosine, exactly, in blocks.

    A picture is paired with the `WINDOW` nearest of the others.

    Args:
        embeddings, others: [N, E] and [M, E]; their length does not matter.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    values, targets = _normalize(embeddings), _normalize(others)
    pairs = [(torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long), torch.zeros(0))]
    for start in range(0, len(values), BLOCK_PICTURES) if len(targets) else ():
        nearest = _Nearest(values[start : start + BLOCK_PICTURES].to(device))
        for low in range(0, len(targets), BLOCK_PICTURES):
            nearest.add(targets[low : low + BLOCK_PICTURES].to(device), low, min_cosine)
        rows, numbers, cosines = nearest.list_pairs(min_cosine)
        pairs.append((rows + start, numbers, cosines))
    return NearPairs(*(torch.cat(parts).numpy() for parts in zip(*pairs, strict=True)))
