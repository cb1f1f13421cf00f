"""Data of the stages that learn from image-text pairs: index, mixture and plan as of the other stages, and batches of pairs.

`PairProcessor` counts a record for the index, so that unusable records are known before training. A step of the plan is read
whole: each rank takes an equal part of it, in the order of the mixture.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any

import lightning as L
import numpy as np
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase

from lit_vlm.compat.lightning import set_num_steps
from lit_vlm.data.augmentation import Augmentation
from lit_vlm.data.caption_pairs import (
    CaptionPair,
    PairBatch,
    PairCollator,
    Tokenize,
    load_pixels,
    make_pair,
    read_caption,
)
from lit_vlm.data.datamodule import ResumeSampler, SignalSafeDataLoader
from lit_vlm.data.index.fingerprint import verify_unchanged
from lit_vlm.data.index.sample_index import SampleIndex
from lit_vlm.data.loader import RETRY_DELAYS, register_worker_cleanup, setup_worker_signals
from lit_vlm.data.micro_batches import CorruptRecord
from lit_vlm.data.packing.plan import Plan
from lit_vlm.data.processor import RecordCost
from lit_vlm.data.training_data import TrainingData
from lit_vlm.types import Record, RecordError, Source, UserError

NO_LIMIT = 1 << 30  # tokens and tiles of a micro-batch: a step is never split


class PairProcessor:
    """Processor of image-text pairs: what the index counts of a record, and batches of pairs.

    Args:
        tokenizer: of the texts.
        tokenize: texts to ids and mask, of one length for all texts.
        image_size: height and width of all images in pixels.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tokenize: Tokenize, image_size: int) -> None:
        self.tokenizer, self.tokenize, self.image_size = tokenizer, tokenize, image_size
        self.collate = PairCollator(tokenize)

    @cached_property
    def digest(self) -> str:
        """Digest of all that determines a record's tokens."""
        backend: Any = self.tokenizer
        ids, _ = self.tokenize(["a 가"])  # its length is that of all texts, prompts and cut included
        state = ["pairs", backend.backend_tokenizer.to_str(), backend.special_tokens_map, ids.tolist(), self.image_size]
        return hashlib.sha256(json.dumps(state, sort_keys=True, default=str).encode()).hexdigest()

    def compute_cost(self, record: Record) -> RecordCost:
        """Compute the cost of a pair. Raises RecordError if it has no caption or not one image, or its header cannot be read."""
        text = read_caption(record)
        size = record.images[0].size
        num_tokens = int(self.tokenize([text])[1].sum())
        return RecordCost(
            lengths=(num_tokens,),
            num_supervised=num_tokens,
            squares=num_tokens * num_tokens,
            max_context_tokens=num_tokens,
            num_tiles=1,
            num_images=1,
            size=size,
        )


class PairBatches(Dataset):
    """Batches of pairs of an index, read by number. A corrupt record is returned as data, after retries.

    Args:
        rows: samples of each batch.
        separate_sources: the samples are from separate validation sources.
        augmentation: of the images; its draws depend on `seed`, the number of the batch and the sample alone.
    """

    def __init__(
        self,
        processor: PairProcessor,
        index: SampleIndex,
        rows: Any,
        *,
        separate_sources: bool = False,
        augmentation: Augmentation | None = None,
        seed: int = 0,
    ) -> None:
        self.processor, self.index, self.rows, self.separate_sources = processor, index, rows, separate_sources
        self.augmentation, self.seed = augmentation or Augmentation(), seed

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> PairBatch | CorruptRecord:
        if not 0 <= number < len(self):
            raise IndexError(number)
        pairs, ids = [], []
        for sample in self.rows[number]:
            pair = self._read(int(sample), number)
            if isinstance(pair, CorruptRecord):
                return pair
            pairs.append(pair[0])
            ids.append(pair[1])
        return self.processor.collate(pairs, ids)

    def _read(self, sample: int, batch: int) -> tuple[CaptionPair, str] | CorruptRecord:
        source = self.index.sources[self.index.source_ids[sample]].name
        for wait in (*RETRY_DELAYS, None):
            try:
                record = self.index.get_record(sample)
                load = load_pixels
                if not self.augmentation.is_off:
                    rng = np.random.default_rng((self.seed, batch, sample))  # a new one for each try
                    load = partial(self.augmentation.load_pixels, rng=rng)
                pair = make_pair(record, self.processor.image_size, load)
                verify_unchanged(self.index, [sample], [record])
                return pair, f"{source}/{record.id}"
            except RecordError as error:
                if wait is None:
                    return CorruptRecord(source, int(self.index.position[sample]), error, self.separate_sources)
                time.sleep(wait)
        raise AssertionError("the last try returns")


class StepRows:
    """Samples of each step that a rank reads: its equal part of the step, in the order of the plan.

    A sample that became corrupt in an earlier start is replaced by another one of its step, so that all ranks have equally
    many pairs and a queue of features is filled evenly.
    """

    def __init__(self, plan: Plan, rank: int, world_size: int) -> None:
        self.plan, self.rank, self.world_size = plan, rank, world_size

    def __len__(self) -> int:
        return int(self.plan.num_steps)

    def __getitem__(self, step: int) -> np.ndarray:
        ends = self.plan.step_ends
        samples = self.plan.get_sample_sequence()[int(ends[step - 1]) if step else 0 : int(ends[step])].astype(np.int64)
        excluded = np.isin(samples, self.plan.excluded_samples)
        if excluded.all():
            raise UserError(
                f"All pairs of step {step + 1:,} turned bad while training. Repair the records that ledger.jsonl lists."
            )
        samples[excluded] = np.resize(samples[~excluded], int(excluded.sum()))
        return np.split(samples, self.world_size)[self.rank]


class PairDataModule(TrainingData, L.LightningDataModule):
    """Lightning data module of image-text pairs: training data as of the other stages, with loaders of whole steps.

    Args:
        processor, sources, validation: as of `TrainingData`.
        num_workers, prefetch_factor, pin_memory: as of `DataModule`.
        augmentation: of the training images.
        planning: further arguments of `TrainingData`.
    """

    splits_steps = False
    processor: Any

    def __init__(
        self,
        processor: PairProcessor,
        sources: Sequence[Source],
        validation: Sequence[Source] | float = 0.01,
        *,
        num_workers: int = 0,
        prefetch_factor: int = 4,
        pin_memory: bool = False,
        augmentation: Augmentation | None = None,
        **planning: Any,
    ) -> None:
        L.LightningDataModule.__init__(self)
        limits = {"tokens_per_micro_batch": NO_LIMIT, "tiles_per_micro_batch": NO_LIMIT}
        TrainingData.__init__(self, processor, sources, validation, **limits, **planning)  # type: ignore[arg-type]
        self.num_workers, self.prefetch_factor, self.pin_memory = num_workers, prefetch_factor, pin_memory
        self.augmentation = augmentation
        self.start_step = 0  # optimizer steps that an earlier start of the run completed

    def setup(self, stage: str) -> None:
        """Build indexes and plan, and set the number of steps on the trainer."""
        self.build_indexes()
        if stage == "fit" and self.trainer is not None:
            plan = self.make_plan(self.trainer.world_size)
            set_num_steps(self.trainer, plan.num_steps)

    def train_dataloader(self) -> DataLoader:
        """Make the loader of this rank's part of each step, from `start_step` on."""
        rank, world_size = self._get_rank()
        plan = self.make_plan(world_size)
        rows = StepRows(plan, rank, world_size)
        batches = PairBatches(self.processor, plan.index, rows, augmentation=self.augmentation, seed=self.seed)
        return self._make_loader(batches, ResumeSampler(self.start_step, len(batches)))

    def val_dataloader(self) -> DataLoader | list[Any]:
        """Make the loader of this rank's held-out pairs, every `world_size`-th one; [] if nothing is held out."""
        self.build_indexes()
        assert self.held_out is not None
        if not len(self.held_out):
            return []
        rank, world_size = self._get_rank()
        return self._make_loader(self.make_held_out_batches(range(rank, len(self.held_out), world_size)))

    def make_held_out_batches(self, samples: Sequence[int]) -> PairBatches:
        """Make batches of these held-out samples, of as many pairs as a rank has in a step."""
        assert self.held_out is not None
        size = max(1, self.global_batch_size // self._get_rank()[1])
        rows = [samples[start : start + size] for start in range(0, len(samples), size)]
        return PairBatches(self.processor, self.held_out, rows, separate_sources=self.has_own_validation)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Raise the error of a corrupt record in the main process, where it is shown."""
        return self.require_readable(batch)

    def require_readable(self, batch: PairBatch | CorruptRecord) -> PairBatch:
        """Return a batch, or add its corrupt record to the ledger and raise the error that ends the run."""
        if isinstance(batch, CorruptRecord):
            raise batch.add_to_ledger(self.ledger)
        return batch

    def state_dict(self) -> dict[str, Any]:
        return {}  # a step is a function of the seed and its number: there is no state

    def _get_rank(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _make_loader(self, batches: PairBatches, sampler: Any = None) -> DataLoader:
        workers = min(self.num_workers, len(batches))
        if workers:
            register_worker_cleanup()
        return SignalSafeDataLoader(
            batches,
            batch_size=None,
            sampler=sampler,
            num_workers=workers,
            prefetch_factor=self.prefetch_factor if workers else None,
            pin_memory=self.pin_memory,
            worker_init_fn=setup_worker_signals,
        )
