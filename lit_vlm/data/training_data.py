"""Training data of a stage before it trains: index, mixture and plan of the steps, and the samples held out.

This is all that planning needs. `DataModule` adds the loaders and what Lightning asks of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lit_vlm.config.choices import OnOverlong
from lit_vlm.cost import Flops
from lit_vlm.data.index.build import build_index
from lit_vlm.data.index.lengths import apply_length_policy
from lit_vlm.data.index.sample_index import SampleIndex, require_samples, split_held_out
from lit_vlm.data.packing.mixture import Mixture, MixtureSettings
from lit_vlm.data.packing.plan import Plan
from lit_vlm.data.processor import Processor
from lit_vlm.data.quarantine import Ledger
from lit_vlm.types import Source

DEFAULT_FLOPS = Flops(per_token=1.0, per_square=1e-4, per_tile=256.0, per_supervised=0.25)


class TrainingData:
    """Sources of a stage with their indexes, mixture and plan.

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

    `index` and `held_out` are set by `build_indexes()`, `mixture` and `plan` by `make_plan()`.
    """

    splits_steps = True  # a step can be split into smaller micro-batches

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
        seed: int = 0,
        flops: Flops = DEFAULT_FLOPS,
        overfit: bool = False,
        store: Path | None = None,
        index_workers: int = 1,
        ledger: Path | None = None,
    ) -> None:
        self.processor, self.sources, self.validation = processor, list(sources), validation
        self.global_batch_size, self.global_batch_tokens = global_batch_size, global_batch_tokens
        self.max_tokens, self.max_tiles = tokens_per_micro_batch, tiles_per_micro_batch
        self.max_length = max_length
        self.on_overlong, self.mixture_settings, self.seed = on_overlong, mixture or MixtureSettings(), seed
        self.max_steps, self.max_epochs = max_steps, max_epochs
        self.flops, self.overfit = flops, overfit
        self.store, self.index_workers = store, index_workers
        self.ledger = Ledger.read(ledger) if ledger else None
        self.index: SampleIndex | None = None
        self.held_out: SampleIndex | None = None
        self.mixture: Mixture | None = None
        self.plan: Plan | None = None
        self.micro_batch_limits = (self.max_tokens, self.max_tiles)

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
