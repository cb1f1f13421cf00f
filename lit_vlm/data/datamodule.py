"""Lightning data module: the training data of a stage with its data loaders.

The loader reads micro-batches by number. So a resumed run reads a step without reading the steps before it, and needs no
sampler state. The number of gradient accumulation steps (`accumulate_grad_batches`) follows from the plan and is set on
the trainer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import lightning as L
import numpy as np
from torch.utils.data import DataLoader, Dataset, Sampler

from lit_vlm.compat.lightning import has_distributed_sampler, set_num_steps
from lit_vlm.data.index.fingerprint import verify_unchanged
from lit_vlm.data.index.sample_index import SampleIndex
from lit_vlm.data.loader import LookAheadVerifier, mask_run_signals, register_worker_cleanup, setup_worker_signals
from lit_vlm.data.micro_batches import (
    CorruptRecord,
    ImageHashes,
    Result,
    TrainMicroBatches,
    ValidationMicroBatches,
    run_with_retries,
)
from lit_vlm.data.packing.plan import pack_validation
from lit_vlm.data.processor import Processor
from lit_vlm.data.training_data import TrainingData
from lit_vlm.types import Source, UserError


class DataModule(TrainingData, L.LightningDataModule):
    """Lightning data module: training data with the loaders of its flat micro-batches.

    Args:
        processor, sources, validation: as of `TrainingData`.
        num_workers: processes that read micro-batches.
        prefetch_factor: micro-batches that each of them reads in advance.
        pin_memory: batches are in pinned memory.
        look_ahead: also add corrupt samples that idle workers find in later steps to the ledger.
        planning: further arguments of `TrainingData`.

    `index`, `held_out`, `mixture` and `plan` are set by `setup()`.
    """

    def __init__(
        self,
        processor: Processor,
        sources: Sequence[Source],
        validation: Sequence[Source] | float = 0.01,
        *,
        num_workers: int = 0,
        prefetch_factor: int = 4,
        pin_memory: bool = False,
        look_ahead: bool = False,
        **planning: Any,
    ) -> None:
        L.LightningDataModule.__init__(self)
        TrainingData.__init__(self, processor, sources, validation, **planning)
        self.num_workers, self.prefetch_factor, self.pin_memory = num_workers, prefetch_factor, pin_memory
        self.look_ahead = look_ahead
        self.start_step = 0  # optimizer steps that an earlier start of the run completed
        self.skipped_steps: frozenset[int] = frozenset()  # steps that the run skips; no data is read for them
        self.with_pixels = True  # False: training and validation use cached vision features
        self.with_image_hashes = False  # True: batches have content hashes of their images, as keys of caches

    def setup(self, stage: str) -> None:
        """Build indexes and plan, and set gradient accumulation and the number of steps on the trainer."""
        self.build_indexes()
        if stage == "fit" and self.trainer is not None:
            self._validate_sampler()
            if self.max_steps is None and self.trainer.max_steps > 0:
                self.max_steps = self.trainer.max_steps
            plan = self.make_plan(self.trainer.world_size)
            self.trainer.accumulate_grad_batches = plan.accumulate_grad_batches
            set_num_steps(self.trainer, plan.num_steps)

    def _validate_sampler(self) -> None:
        """Refuse Lightning's distributed sampler: it would split the plan's micro-batches over the ranks a second time."""
        if self.trainer.world_size > 1 and has_distributed_sampler(self.trainer):
            raise UserError(
                "On several devices give the Trainer use_distributed_sampler=False: the plan distributes the samples over the ranks."
            )

    def train_dataloader(self) -> DataLoader:
        """Make the loader of this rank's training micro-batches, from `start_step` on."""
        plan = self.make_plan(self.trainer.world_size if self.trainer else 1)
        rank = self.trainer.global_rank if self.trainer else 0
        options: dict[str, Any] = {"with_pixels": self.with_pixels, "with_image_hashes": self.with_image_hashes}
        if self.look_ahead and self.ledger is not None and self.with_pixels:
            options["look_ahead"] = LookAheadVerifier(plan, self.ledger, rank)
        batches = TrainMicroBatches(self.processor, plan, rank, self.skipped_steps, **options)
        return self._make_dataloader(
            batches, ResumeSampler(self.start_step * plan.accumulate_grad_batches, len(batches))
        )

    def make_subset_dataloader(self, index: SampleIndex, samples: np.ndarray) -> DataLoader:
        """Make a loader over this rank's share of these samples, each once; all ranks have the same number of micro-batches."""
        return self._make_dataloader(
            self._make_single_pass_batches(
                index.select(samples), separate_sources=index is self.held_out and self.has_own_validation
            )
        )

    def compute_image_hashes(self, index: SampleIndex, samples: np.ndarray) -> np.ndarray:
        """Compute content hashes [samples] uint64, see `compute_image_hash`; also 0 if images cannot be read now."""
        hashes = np.zeros(len(samples), np.uint64)
        with_images = np.flatnonzero(index.images[samples])
        parts = self._make_dataloader(ImageHashes(index, samples[with_images].tolist()))
        hashes[with_images] = np.fromiter(
            (content_hash for part in parts for content_hash in part), np.uint64, len(with_images)
        )
        return hashes

    def val_dataloader(self) -> DataLoader:
        return self._make_dataloader(self._make_validation_batches(with_pixels=self.with_pixels))

    def predict_dataloader(self) -> DataLoader:
        return self._make_dataloader(self._make_validation_batches())

    def test_dataloader(self) -> DataLoader:
        return self._make_dataloader(self._make_validation_batches())

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if isinstance(batch, CorruptRecord):  # of a worker; raised in the main process, where it is shown
            raise batch.add_to_ledger(self.ledger)
        return batch

    def read_held_out(self, samples: Sequence[int], function: Callable[[], Result]) -> Result:
        """Run `function` over these held-out samples; a corrupt one ends the run with the same error as in a loader."""
        held_out = self.held_out
        assert held_out is not None

        def run_and_verify() -> Result:
            result = function()
            verify_unchanged(held_out, samples)
            return result

        result = run_with_retries(run_and_verify, self.processor, held_out, samples)
        if isinstance(result, CorruptRecord):
            raise replace(result, held_out=self.has_own_validation).add_to_ledger(self.ledger)
        return result

    def state_dict(self) -> dict[str, Any]:
        return {}  # a step is a function of the seed and its number: there is no state

    def _make_validation_batches(self, *, with_pixels: bool = True) -> ValidationMicroBatches:
        self.build_indexes()
        assert self.held_out is not None
        return self._make_single_pass_batches(
            self.held_out, separate_sources=self.has_own_validation, with_pixels=with_pixels
        )

    def _make_single_pass_batches(
        self, index: SampleIndex, *, separate_sources: bool, with_pixels: bool = True
    ) -> ValidationMicroBatches:
        world_size, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        limits = dict(zip(("max_tokens", "max_tiles"), self.micro_batch_limits, strict=True))
        packs = pack_validation(index, flops=self.flops, world_size=world_size, **limits)
        options = {"with_pixels": with_pixels, "with_image_hashes": self.with_image_hashes}
        return ValidationMicroBatches(
            self.processor, index, packs[rank::world_size], separate_sources=separate_sources, **options
        )

    def _make_dataloader(self, batches: Dataset, sampler: Sampler[int] | None = None) -> DataLoader:
        workers = min(self.num_workers, len(batches))  # type: ignore[arg-type]
        if workers:
            register_worker_cleanup()
        return SignalSafeDataLoader(
            batches,
            batch_size=None,
            sampler=sampler,
            shuffle=False,
            num_workers=workers,
            prefetch_factor=self.prefetch_factor if workers else None,
            persistent_workers=False,
            pin_memory=self.pin_memory,
            worker_init_fn=setup_worker_signals,
        )


class SignalSafeDataLoader(DataLoader):
    """DataLoader whose workers are not killed by a signal that arrives while they start."""

    def __iter__(self) -> Any:
        with mask_run_signals():
            return super().__iter__()


class ResumeSampler(Sampler[int]):
    """Sampler to resume a run: yields the numbers from `start` on.

    Its length is the total number, because Lightning counts those before `start` as read.
    """

    def __init__(self, start: int, end: int) -> None:
        self.start, self.end = start, end

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.end))

    def __len__(self) -> int:
        return self.end
