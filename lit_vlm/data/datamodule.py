"""Lightning data module: builds index, mixture and training plan, and creates the data loaders.

The loader reads micro-batches by number. So a resumed run reads a step without reading the steps before it, and needs no
sampler state. The number of gradient accumulation steps (`accumulate_grad_batches`) follows from the plan and is set on
the trainer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from torch.utils.data import DataLoader, Dataset, Sampler

from lit_vlm.compat.lightning import has_distributed_sampler, set_num_steps
from lit_vlm.config.choices import OnOverlong
from lit_vlm.cost import Flops
from lit_vlm.data.index.build import build_index
from lit_vlm.data.index.fingerprint import verify_unchanged
from lit_vlm.data.index.lengths import apply_length_policy
from lit_vlm.data.index.sample_index import SampleIndex, require_samples, split_held_out
from lit_vlm.data.loader import LookAheadVerifier, mask_run_signals, register_worker_cleanup, setup_worker_signals
from lit_vlm.data.micro_batches import (
    CorruptRecord,
    ImageHashes,
    Result,
    TrainMicroBatches,
    ValidationMicroBatches,
    run_with_retries,
)
from lit_vlm.data.packing.mixture import Mixture, MixtureSettings
from lit_vlm.data.packing.plan import Plan, pack_validation
from lit_vlm.data.processor import Processor
from lit_vlm.data.quarantine import Ledger
from lit_vlm.types import Source, UserError

DEFAULT_FLOPS = Flops(per_token=1.0, per_square=1e-4, per_tile=256.0, per_supervised=0.25)


class DataModule(L.LightningDataModule):
    """Lightning data module: mixes sources and packs them into flat micro-batches.

    Args:
        processor: tokenizer and image settings of the model.
        sources: training data.
        validation: separate validation sources, or the fraction to hold out of each training source.
        global_batch_size: samples of an optimizer step, over all devices.
        global_batch_tokens: alternatively: tokens of an optimizer step; the last sample may exceed it.
        max_length: maximum tokens of a sample, or of one answer of a pair with its prompt; None: the token limit of a
            micro-batch.
        mixture: weights, repeats and shares; None: each source by its size.
        flops: cost model of the model, by which packs are balanced. The coarse default suffices for small experiments.
        overfit: train on the samples of the first step only, repeatedly.
        store: cache folder of indexes and plans for the next start; None: in memory.
        index_workers: processes that build an index.
        ledger: quarantine ledger: file of the samples that became corrupt during training. They are excluded, and new
            ones are added.
        look_ahead: also add corrupt samples that idle workers find in later steps.

    `index`, `held_out`, `mixture` and `plan` are set by `setup()`.
    """

    def __init__(
        self,
        processor: Processor,
        sources: Sequence[Source],
        validation: Sequence[Source] | float = 0.01,
        *,
        global_batch_size: int = 128,
        global_batch_tokens: int | None = None,
        tokens_per_micro_batch: int = 16384,
        tiles_per_micro_batch: int = 64,
        max_length: int | None = None,
        on_overlong: OnOverlong = OnOverlong.quarantine,
        mixture: MixtureSettings | None = None,
        max_steps: int | None = None,
        max_epochs: float = 1.0,
        num_workers: int = 0,
        prefetch_factor: int = 4,
        seed: int = 0,
        flops: Flops = DEFAULT_FLOPS,
        pin_memory: bool = False,
        overfit: bool = False,
        store: Path | None = None,
        index_workers: int = 1,
        ledger: Path | None = None,
        look_ahead: bool = False,
    ) -> None:
        super().__init__()
        self.processor, self.sources, self.validation = processor, list(sources), validation
        self.global_batch_size, self.global_batch_tokens = global_batch_size, global_batch_tokens
        self.max_tokens, self.max_tiles = tokens_per_micro_batch, tiles_per_micro_batch
        self.max_length = max_length
        self.on_overlong, self.mixture_settings, self.seed = on_overlong, mixture or MixtureSettings(), seed
        self.max_steps, self.max_epochs = max_steps, max_epochs
        self.num_workers, self.prefetch_factor, self.pin_memory = num_workers, prefetch_factor, pin_memory
        self.flops, self.overfit = flops, overfit
        self.store, self.index_workers = store, index_workers
        self.ledger = Ledger.read(ledger) if ledger else None
        self.look_ahead = look_ahead
        self.index: SampleIndex | None = None
        self.held_out: SampleIndex | None = None
        self.mixture: Mixture | None = None
        self.plan: Plan | None = None
        self.start_step = 0  # optimizer steps that an earlier start of the run completed
        self.skipped_steps: frozenset[int] = frozenset()  # steps that the run skips; no data is read for them
        self.micro_batch_limits = (self.max_tokens, self.max_tiles)
        self.with_pixels = True  # False: training and validation use cached vision features
        self.with_image_hashes = False  # True: batches have content hashes of their images, as keys of caches

    def build_indexes(
        self, *, recheck: bool = False, on_progress: Callable[[str, int, int], None] | None = None
    ) -> None:
        """Build `index` and `held_out`: read every record once, or load the cached result of an earlier pass.

        Bad records are in their `errors`.

        Args:
            recheck: check whether image files have changed since then.
            on_progress: called with source, processed records, total records.
        """
        if self.index is not None and not recheck:
            return
        options: dict[str, Any] = {"recheck": recheck, "on_progress": on_progress}
        full_index = self._build_fitted_index(self.sources, **options)
        if isinstance(self.validation, float | int):
            self.index, self.held_out = split_held_out(full_index, float(self.validation))
        else:
            self.index, self.held_out = full_index, self._build_fitted_index(self.validation, **options)
        self.held_out = self._drop_ledger_samples(self.held_out)
        self.mixture = self.plan = None

    @property
    def has_own_validation(self) -> bool:
        """True if there are separate validation sources; their names may equal those of training sources."""
        return not isinstance(self.validation, float | int)

    def rebuild_indexes(self) -> None:
        """Rebuild the indexes from the cache: verification may have found unusable records."""
        self.index = self.held_out = None
        self.build_indexes()

    def _build_fitted_index(self, sources: Sequence[Source], **options: Any) -> SampleIndex:
        """Build an index and apply the length policy."""
        index = build_index(sources, self.processor, store=self.store, workers=self.index_workers, **options)
        limits = {"max_tokens": self.max_tokens, "max_tiles": self.max_tiles}
        return apply_length_policy(index, self.processor, policy=self.on_overlong, max_length=self.max_length, **limits)

    def _drop_ledger_samples(self, held_out: SampleIndex) -> SampleIndex:
        """Drop the ledger's samples from the held-out index; training samples are excluded by the plan instead."""
        if not self.ledger:
            return held_out
        corrupt = self.ledger.find_samples(held_out, held_out=self.has_own_validation)
        smaller = held_out.select(np.delete(np.arange(len(held_out)), corrupt))
        smaller.errors, smaller.length_policy_counts = held_out.errors, held_out.length_policy_counts
        return smaller

    def reduce_micro_batch_limits(self, max_tokens: int, max_tiles: int) -> None:
        """Reduce the micro-batch limits below the settings, because a device ran out of memory.

        The settings still define the samples, and each step keeps its samples. A limit is not reduced below the size of
        the largest sample.
        """
        smallest = self.get_min_micro_batch_limits()
        self.micro_batch_limits, self.plan = (max(max_tokens, smallest[0]), max(max_tiles, smallest[1])), None

    def get_min_micro_batch_limits(self) -> tuple[int, int]:
        """Return the tokens and tiles of the largest samples: a micro-batch must hold any single sample."""
        self.build_indexes()
        indexes = [index for index in (self.index, self.held_out) if index is not None and len(index)]
        return max(int(index.tokens.max()) for index in indexes), max(int(index.tiles.max()) for index in indexes)

    def make_plan(self, world_size: int = 1) -> Plan:
        """Make the training plan for this number of ranks, or return the existing one."""
        self.build_indexes()
        assert self.index is not None
        require_samples(self.index, "training")
        if self.plan is None or self.plan.world_size != world_size:
            self.mixture = self.mixture or Mixture(self.index, self.mixture_settings)
            self.plan = self._build_plan(world_size)
            if self.overfit:
                self.index = self.index.select(self.plan.get_samples(0))
                self.mixture = Mixture(self.index, MixtureSettings())
                self.plan = self._build_plan(world_size)
        return self.plan

    def _build_plan(self, world_size: int) -> Plan:
        assert self.index is not None and self.mixture is not None
        return Plan(
            self.index,
            self.mixture,
            global_batch_size=self.global_batch_size,
            global_batch_tokens=self.global_batch_tokens,
            max_tokens=self.micro_batch_limits[0],
            max_tiles=self.micro_batch_limits[1],
            flops=self.flops,
            seed=self.seed,
            max_steps=self.max_steps,
            max_epochs=self.max_epochs,
            world_size=world_size,
            ledger=self.ledger,
            store=self.store,
        )

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
