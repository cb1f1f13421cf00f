"""Pairs of an image and its caption, from the sources of all formats, for losses that compare pairs of a whole batch.

A step is a function of the seed and its number, as everywhere here: a resumed run reads the pairs that an uninterrupted
one would have read, and the pairs of a step do not depend on the number of ranks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from lit_vlm.data.datamodule import ResumeSampler
from lit_vlm.data.lazy_images import compute_image_hash
from lit_vlm.data.loader import setup_worker_signals
from lit_vlm.types import Record, RecordError, Sample, Source, UserError

Tokenize = Callable[[Sequence[str]], tuple[Tensor, Tensor]]  # texts to ids and mask, [B, T] each


class PairBatch(NamedTuple):
    """Batch of B pairs of an image and a text."""

    pixel_values: Tensor  # [B, 3, H, W] float32, normalised
    input_ids: Tensor  # [B, T] int64
    attention_mask: Tensor  # [B, T] int64
    pair_ids: Tensor  # [B, 2] int64: hashes of the image's content and of the text
    num_tokens: int = 0  # of all texts, without padding
    sample_ids: tuple[str, ...] = ()  # names of the records, if the reader knows them


class CaptionPair(NamedTuple):
    """Image [H, W, 3] uint8 and caption of a record, with hashes of both."""

    pixels: np.ndarray
    text: str
    image_id: int
    text_id: int


def read_caption(record: Any) -> str:
    """Return the caption of a record: its last answer.

    Raises:
        RecordError: the record has not exactly one image, or no text.
    """
    if not isinstance(record, Sample):
        raise RecordError(record.origin, "it is a preference pair, and a caption is needed", "Choose another source")
    if len(record.images) != 1:
        reason = f"it has {len(record.images)} images; a caption belongs to one"
        raise RecordError(record.origin, reason, "Choose another source")
    text = record.messages[-1].text.strip()
    if not text:
        raise RecordError(record.origin, "its caption is empty")
    return text


def load_pixels(image: Image.Image, size: int) -> np.ndarray:
    """Resize an image to a square, as BLIP's evaluation does, [size, size, 3] uint8."""
    return np.array(image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC))


def make_pair(
    record: Record, image_size: int, load: Callable[[Image.Image, int], np.ndarray] = load_pixels
) -> CaptionPair:
    """Make the pair of a record, with its image resized to a square.

    Args:
        load: makes the pixels of an image, see `load_pixels`.

    Raises:
        RecordError: the record cannot be used.
    """
    text = read_caption(record)
    text_id = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big", signed=True)
    image_id = compute_image_hash(record)
    pixels = load(record.images[0].load(), image_size)
    return CaptionPair(pixels, text, image_id - (1 << 64 if image_id >= 1 << 63 else 0), text_id)


class CaptionPairs(Dataset):
    """Pairs of all records of some sources, in their order.

    Args:
        sources: of records with one image each; the last answer of a record is its caption.
        image_size: height and width in pixels.
    """

    def __init__(self, sources: Sequence[Source], image_size: int) -> None:
        if not sources or not sum(map(len, sources)):
            raise UserError("No source has a record; captions and their images are needed.")
        self.sources, self.image_size = list(sources), image_size
        self.ends = np.cumsum([len(source) for source in sources])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, number: int) -> CaptionPair:
        """Read a pair.

        Raises:
            RecordError: the record cannot be used.
        """
        position = int(np.searchsorted(self.ends, number, side="right"))
        if not 0 <= number < len(self):
            raise IndexError(number)
        record = self.sources[position][number - int(self.ends[position] - len(self.sources[position]))]
        return make_pair(record, self.image_size)


class DistinctCaptions:
    """Source of the first records of another source whose captions all differ, to measure retrieval without ties.

    Args:
        num_captions: length of the source.

    Raises:
        UserError: the other source has fewer different captions.
    """

    def __init__(self, source: Source, num_captions: int) -> None:
        self.source, self.name = source, source.name
        first: dict[str, int] = {}
        for number in range(len(source)):
            first.setdefault(read_caption(source[number]), number)
            if len(first) == num_captions:
                break
        else:
            raise UserError(
                f"The source {source.name} has {len(first):,} different captions in {len(source):,} records, and {num_captions:,} are needed. "
                "Give it more records, or ask for fewer captions."
            )
        self.numbers = list(first.values())

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Record:
        return self.source[self.numbers[index]]

    @property
    def digest(self) -> str:
        """Digest of the other source and of the number of captions."""
        return hashlib.blake2b(f"{self.source.digest}|{len(self)}".encode(), digest_size=16).hexdigest()


class PairCollator:
    """Collator of pairs to a `PairBatch`; the mean and the standard deviation of the pixels are those of CLIP and BLIP-2."""

    def __init__(
        self, tokenize: Tokenize, mean: Sequence[float] = OPENAI_CLIP_MEAN, std: Sequence[float] = OPENAI_CLIP_STD
    ) -> None:
        self.tokenize = tokenize
        self.mean, self.std = (torch.tensor(values)[:, None, None] for values in (mean, std))

    def __call__(self, pairs: Sequence[CaptionPair], sample_ids: Sequence[str] = ()) -> PairBatch:
        ids, mask = self.tokenize([pair.text for pair in pairs])
        pixels = torch.from_numpy(np.stack([pair.pixels for pair in pairs])).permute(0, 3, 1, 2)
        return PairBatch(
            (pixels.float() / 255 - self.mean) / self.std,
            ids,
            mask,
            torch.tensor([(pair.image_id, pair.text_id) for pair in pairs]),
            num_tokens=int(mask.sum()),
            sample_ids=tuple(sample_ids),
        )


class StepBatches(Dataset):
    """Batches of one rank by step: the rank's part of the global batch.

    Each epoch is a permutation of all pairs, and a step may continue from one epoch into the next.

    Args:
        collate: see `PairCollator`.
        global_batch_size: pairs of a step over all ranks.
    """

    def __init__(
        self,
        pairs: CaptionPairs,
        collate: PairCollator,
        *,
        global_batch_size: int,
        num_steps: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if global_batch_size % world_size:
            raise UserError(
                f"global_batch_size={global_batch_size} cannot be divided among {world_size} ranks, which must have equally many "
                f"pairs. Choose a multiple of {world_size}."
            )
        self.pairs, self.collate, self.num_steps, self.seed = pairs, collate, num_steps, seed
        self.global_batch_size, self.rank, self.world_size = global_batch_size, rank, world_size
        self._epoch: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return self.num_steps

    def __getitem__(self, step: int) -> PairBatch:
        if not 0 <= step < self.num_steps:
            raise IndexError(step)
        size = self.global_batch_size // self.world_size
        first = step * self.global_batch_size + self.rank * size
        return self.collate([self.pairs[self._find_pair(place)] for place in range(first, first + size)])

    def _find_pair(self, place: int) -> int:
        """Find the pair at a place of the sequence of all epochs."""
        epoch, position = divmod(place, len(self.pairs))
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = epoch, np.random.default_rng((self.seed, epoch)).permutation(len(self.pairs))
        return int(self._epoch[1][position])


class CaptionDataModule(L.LightningDataModule):
    """Data module of image-text pairs; the trainer runs one epoch of `num_steps` steps.

    Args:
        training: training sources.
        held_out: sources for validation; empty: none.
        tokenize: of `tokenize_captions`, with the tokenizer.
        image_size: see `CaptionPairs`.
        global_batch_size: pairs of a step over all ranks, a multiple of their number; BLIP-2 has 2,320.
        num_steps: optimizer steps.
        num_workers: loader processes of each rank.
    """

    def __init__(
        self,
        training: Sequence[Source],
        held_out: Sequence[Source],
        tokenize: Tokenize,
        *,
        image_size: int,
        global_batch_size: int,
        num_steps: int,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.training = CaptionPairs(training, image_size)
        self.held_out = CaptionPairs(held_out, image_size) if held_out else None
        self.collate = PairCollator(tokenize)
        self.global_batch_size, self.num_steps, self.seed = global_batch_size, num_steps, seed
        self.num_workers = num_workers

    def train_dataloader(self) -> DataLoader:
        """Make the loader of this rank's batches, from the trainer's step on."""
        rank, world_size, start = (
            (self.trainer.global_rank, self.trainer.world_size, self.trainer.global_step) if self.trainer else (0, 1, 0)
        )
        batches = StepBatches(
            self.training,
            self.collate,
            global_batch_size=self.global_batch_size,
            num_steps=self.num_steps,
            seed=self.seed,
            rank=rank,
            world_size=world_size,
        )
        return self._make_loader(batches, batch_size=None, sampler=ResumeSampler(start, self.num_steps))

    def val_dataloader(self) -> DataLoader | list[Any]:
        """Make the loader of this rank's held-out pairs, every `world_size`-th one."""
        if self.held_out is None:
            return []
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        numbers = range(rank, len(self.held_out), world_size)
        size = max(1, self.global_batch_size // world_size)
        return self._make_loader(self.held_out, batch_size=size, sampler=list(numbers), collate_fn=self.collate)

    def _make_loader(self, pairs: Dataset, **options: Any) -> DataLoader:
        return StepLoader(pairs, num_workers=self.num_workers, worker_init_fn=setup_worker_signals, **options)


class StepLoader(DataLoader):
    """DataLoader that begins at the trainer's step, so it has no state to restore; Lightning would warn without one."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load nothing."""
