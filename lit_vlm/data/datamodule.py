"""Lightning's side of the data: index, plan and loaders.

The loader is a list of micro-batches by number, so that step k is read without reading the steps before it, and its
order needs no sampler state. `accumulate_grad_batches` follows from the plan and is set on the trainer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L
import numpy as np
from torch.utils.data import DataLoader, Dataset

from lit_vlm.cost import Flops
from lit_vlm.data.collate import collate
from lit_vlm.data.index import Index, build_index, require_samples, split
from lit_vlm.data.plan import Pack, Plan, validation_packs
from lit_vlm.data.processor import Processor
from lit_vlm.types import Batch, Record, RecordError, Source, UserError

DEFAULT_FLOPS = Flops(per_token=1.0, per_square=1e-4, per_tile=256.0, per_supervised=0.25)


class DataModule(L.LightningDataModule):
    """Sources, mixed and dealt into flat micro-batches.

    Args:
        processor: tokenizer and image settings of the model.
        sources: training data.
        validation: held-out sources, or the fraction to hold out of each training source.
        weights: shares of the sources, see `Plan`.
        flops: cost model of the model; deals equal packs. A coarse default serves small experiments.
        overfit: train on the samples of the first step again and again.

    `index`, `held_out` and `plan` are there after `setup()`.
    """

    def __init__(
        self,
        processor: Processor,
        sources: Sequence[Source],
        validation: Sequence[Source] | float = 0.01,
        *,
        global_batch_size: int = 128,
        tokens_per_micro_batch: int = 16384,
        tiles_per_micro_batch: int = 64,
        weights: list[float] | None = None,
        max_steps: int | None = None,
        max_epochs: float = 1.0,
        num_workers: int = 0,
        seed: int = 0,
        flops: Flops = DEFAULT_FLOPS,
        pin_memory: bool = False,
        overfit: bool = False,
    ) -> None:
        super().__init__()
        self.processor, self.sources, self.validation = processor, list(sources), validation
        self.global_batch_size, self.weights, self.seed = global_batch_size, weights, seed
        self.most_tokens, self.most_tiles = tokens_per_micro_batch, tiles_per_micro_batch
        self.max_steps, self.max_epochs = max_steps, max_epochs
        self.num_workers, self.flops, self.pin_memory = num_workers, flops, pin_memory
        self.overfit = overfit
        self.index: Index | None = None
        self.held_out: Index | None = None
        self.plan: Plan | None = None

    def build(self) -> None:
        """Read every record once: `index` and `held_out`. Bad records are in their `errors`."""
        if self.index is not None:
            return
        caps: dict[str, Any] = {"most_tokens": self.most_tokens, "most_tiles": self.most_tiles}
        whole = build_index(self.sources, self.processor, self.flops, **caps)
        if isinstance(self.validation, float | int):
            self.index, self.held_out = split(whole, float(self.validation))
            self.index.errors = whole.errors
        else:
            self.index, self.held_out = whole, build_index(self.validation, self.processor, self.flops, **caps)

    def make_plan(self, world_size: int = 1) -> Plan:
        self.build()
        assert self.index is not None
        require_samples(self.index, "training")
        if self.plan is None or self.plan.world_size != world_size:
            self.plan = self._plan(world_size)
            if self.overfit:
                self.index, self.weights = self.index.subset(self.plan.samples(0)), None
                self.plan = self._plan(world_size)
        return self.plan

    def _plan(self, world_size: int) -> Plan:
        assert self.index is not None
        return Plan(
            self.index,
            global_batch_size=self.global_batch_size,
            most_tokens=self.most_tokens,
            most_tiles=self.most_tiles,
            weights=self.weights,
            seed=self.seed,
            max_steps=self.max_steps,
            max_epochs=self.max_epochs,
            world_size=world_size,
        )

    def setup(self, stage: str) -> None:
        self.build()
        if stage == "fit" and self.trainer is not None:
            self._refuse_foreign_sampler()
            if self.max_steps is None and self.trainer.max_steps > 0:
                self.max_steps = self.trainer.max_steps
            plan = self.make_plan(self.trainer.world_size)
            self.trainer.accumulate_grad_batches = plan.k
            self.trainer.fit_loop.epoch_loop.max_steps = plan.num_steps

    def _refuse_foreign_sampler(self) -> None:
        """Lightning's default would deal the plan's micro-batches to the ranks once more, and train on half of them."""
        if self.trainer.world_size > 1 and self.trainer._accelerator_connector.use_distributed_sampler:
            raise UserError(
                "On several devices give the Trainer use_distributed_sampler=False: the plan deals to the ranks."
            )

    def train_dataloader(self) -> DataLoader:
        plan = self.make_plan(self.trainer.world_size if self.trainer else 1)
        return self._loader(TrainMicroBatches(self.processor, plan, self.trainer.global_rank if self.trainer else 0))

    def val_dataloader(self) -> DataLoader:
        return self._loader(self._validation_batches())

    def predict_dataloader(self) -> DataLoader:
        return self._loader(self._validation_batches())

    def test_dataloader(self) -> DataLoader:
        return self._loader(self._validation_batches())

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if isinstance(batch, RecordError):  # a worker's error, raised where its message is shown
            raise batch
        return batch

    def state_dict(self) -> dict[str, Any]:
        return {}  # step k is a function of (seed, k): nothing to remember

    def _validation_batches(self) -> ValidationMicroBatches:
        self.build()
        assert self.held_out is not None
        world, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        packs = validation_packs(
            self.held_out, most_tokens=self.most_tokens, most_tiles=self.most_tiles, world_size=world
        )
        return ValidationMicroBatches(self.processor, self.held_out, packs[rank::world])

    def _loader(self, batches: Dataset) -> DataLoader:
        workers = min(self.num_workers, len(batches))  # type: ignore[arg-type]
        return DataLoader(
            batches,
            batch_size=None,
            shuffle=False,
            num_workers=workers,
            prefetch_factor=4 if workers else None,
            persistent_workers=False,
            pin_memory=self.pin_memory,
        )


class TrainMicroBatches(Dataset):
    """Micro-batch m of this rank: `plan.step(m // k)`, pack `m % k`."""

    def __init__(self, processor: Processor, plan: Plan, rank: int) -> None:
        self.processor, self.plan, self.rank = processor, plan, rank

    def __len__(self) -> int:
        return self.plan.num_steps * self.plan.k

    def __getitem__(self, number: int) -> Batch | RecordError:
        if number >= len(self):
            raise IndexError(number)
        index, micro = divmod(number, self.plan.k)
        step = self.plan.step(index)
        pack = step.packs[micro * self.plan.world_size + self.rank]
        pairs = step.num_samples if step.num_chosen else 0
        return _read(
            self.processor,
            self.plan.index,
            pack,
            step=index,
            step_supervised_tokens=step.num_supervised,
            step_tiles=step.num_tiles,
            step_pairs=pairs,
            step_chosen_tokens=step.num_chosen,
        )


class ValidationMicroBatches(Dataset):
    def __init__(self, processor: Processor, index: Index, packs: list[Pack]) -> None:
        self.processor, self.index, self.packs = processor, index, packs

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, number: int) -> Batch | RecordError:
        pack = list(self.packs[number])
        return _read(
            self.processor,
            self.index,
            self.packs[number],
            step_supervised_tokens=int(self.index.supervised[pack].sum()) if pack else 0,
            step_pairs=int(np.count_nonzero(self.index.chosen[pack])) if pack else 0,
            step_chosen_tokens=int(self.index.chosen[pack].sum()) if pack else 0,
        )


def _read(processor: Processor, index: Index, pack: Pack, **step: int) -> Batch | RecordError:
    try:
        records: list[Record] = [index.record(sample) for sample in pack]
        return collate(processor, records, **step)
    except RecordError as error:
        return error
