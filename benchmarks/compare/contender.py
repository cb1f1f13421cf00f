"""Contenders of the comparison: base class, and this library as a contender."""

from __future__ import annotations

import contextlib
import ctypes
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlavaOnevisionForConditionalGeneration

from benchmarks.compare.cases import NUM_EPOCHS, OURS, OURS_CACHED, Case
from benchmarks.compare.sizes import make_random_model
from lit_vlm.config.schema import LoraConfig
from lit_vlm.data.collate import collate
from lit_vlm.model.hub import disable_transformers_logging
from lit_vlm.model.packed_forward import use_flat_forward
from lit_vlm.stages import DPOStage
from lit_vlm.stages.caches import ReferenceLogProbCache
from lit_vlm.stages.preference_metrics import PreferenceMetrics
from lit_vlm.types import Batch, ModelPart, Record

LEARNING_RATE = 1e-4  # constant, equal for all contenders; large enough to move the weights in a few steps
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # malloc.h
ADAM_EPS = 1e-6  # epsilon of Adam: a smaller one lets rounding of zero gradients decide the direction


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Wall seconds and CPU seconds of this process, all threads included, and the part that prepared the data."""

    wall: float
    cpu: float
    data_wall: float
    data_cpu: float

    def __add__(self, other: StepTimes) -> StepTimes:
        return StepTimes(*(a + b for a, b in zip(self.to_tuple(), other.to_tuple(), strict=True)))

    def __mul__(self, factor: float) -> StepTimes:
        return StepTimes(*(factor * value for value in self.to_tuple()))

    def to_tuple(self) -> tuple[float, float, float, float]:
        return self.wall, self.cpu, self.data_wall, self.data_cpu


@dataclass(frozen=True, slots=True)
class Placement:
    """Placement of the models: source of the weights, device and dtype.

    Attributes:
        folder: all contenders load from it. None: each one initialises the same random weights on the device.
        mixed: compute in bfloat16 under autocast (`bf16-mixed`).
    """

    folder: Path | None = None
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    mixed: bool = False
    lora: LoraConfig | None = None
    seed: int = 0

    def load_model(self, case: Case) -> LlavaOnevisionForConditionalGeneration:
        """Load a new model with the initial weights that all contenders share."""
        if self.folder is None:
            return make_random_model(case.model_size, case.tiling, self.device, self.dtype, self.seed)
        with disable_transformers_logging():
            return LlavaOnevisionForConditionalGeneration.from_pretrained(self.folder, dtype=self.dtype)

    def use_autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device, torch.bfloat16) if self.mixed else contextlib.nullcontext()

    def wait(self) -> None:
        """Wait until the GPU has finished its work."""
        if self.device == "cuda":
            torch.cuda.synchronize()


class Contender:
    """Contender: runs optimizer steps on records. AdamW, gradient clipping to 1 and a constant learning rate for all.

    Attributes:
        models: the first one is trained; a second one is the reference model.
    """

    name: str
    models: list[nn.Module]
    optimizer: torch.optim.Optimizer

    def __init__(self, case: Case, placement: Placement) -> None:
        self.case, self.placement = case, placement

    def prepare(self, records: list[Record]) -> Any:
        """Convert records to model inputs on the device."""
        raise NotImplementedError

    def backward(self, inputs: Any) -> float:
        """Run the forward and backward pass, which fills the gradients. Return the loss of the step."""
        raise NotImplementedError

    def count_tokens(self, inputs: Any, records: list[Record]) -> tuple[int, int]:
        """Count the tokens of the rows of a step: (real tokens, all tokens with padding)."""
        raise NotImplementedError

    def compute_log_probs(self, record: Record) -> tuple[float, float]:
        """Compute the summed log-probabilities of the chosen and the rejected response of a pair, without gradients."""
        raise NotImplementedError

    def get_trained_parameters(self) -> dict[str, nn.Parameter]:
        """Return the trained parameters by their names in transformers."""
        named = ((name.replace("base_model.model.", ""), value) for name, value in self.models[0].named_parameters())
        return {name: value for name, value in named if id(value) in self._trained_ids}

    def make_optimizer(self) -> None:
        """Make the optimizer of the trained parameters."""
        parameters = [parameter for parameter in self.models[0].parameters() if parameter.requires_grad]
        self._trained_ids = {id(parameter) for parameter in parameters}
        self.optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, eps=ADAM_EPS, weight_decay=0.0, fused=True)

    def update(self) -> None:
        """Clip the gradients, update the weights and clear the gradients."""
        torch.nn.utils.clip_grad_norm_(self.optimizer.param_groups[0]["params"], 1.0)
        self.optimizer.step()
        self.clear()

    def clear(self) -> None:
        self.models[0].zero_grad(set_to_none=True)

    def step(self, records: list[Record]) -> StepTimes:
        """Run one optimizer step and return its times."""
        start = _read_clocks()
        inputs = self.prepare(records)
        data_end = _read_clocks()
        self.backward(inputs)
        self.update()
        self.placement.wait()
        end = _read_clocks()
        return StepTimes(end[0] - start[0], end[1] - start[1], data_end[0] - start[0], data_end[1] - start[1])

    def iter_passes(self) -> Iterator[float]:
        """Iterate over the passes over the batches; each item is the weight of a pass."""
        yield 1.0

    def repeat(self, batches: list[list[Record]]) -> StepTimes:
        """Run optimizer steps over the batches and return the weighted times."""
        total = StepTimes(0.0, 0.0, 0.0, 0.0)
        for weight in self.iter_passes():
            for records in batches:
                total = total + self.step(records) * weight
        return total


class Ours(Contender):
    """Stage of this library as a contender: its collate and its loss, without Lightning's loop.

    Args:
        name: name in tables.
        options: options of the stage, added to those of the case.
        change_stage: changes the stage before the optimizer is created (for ablations).
        change_batch: changes a micro-batch before it reaches the model.
    """

    def __init__(
        self,
        case: Case,
        placement: Placement,
        *,
        name: str = OURS,
        options: dict[str, Any] | None = None,
        change_stage: Callable[[Ours], None] = lambda contender: None,
        change_batch: Callable[[Batch], Batch] = lambda batch: batch,
    ) -> None:
        super().__init__(case, placement)
        self.name, self.change_batch, self.processor = name, change_batch, case.processor
        model = placement.load_model(case)
        use_flat_forward(model, case.model_size.make_image_settings(case.tiling))
        parts = {ModelPart.language_model.value: {"lora": asdict(placement.lora)}} if placement.lora else None
        self.stage = case.stage_class(
            model, parts=parts, tiling=case.tiling.value, **{**case.options, **(options or {})}
        )
        self.stage.configure_model()
        self.stage.to(placement.device)
        self.models = [self.stage.model, *([self.stage.reference] if getattr(self.stage, "reference", None) else [])]
        self.make_optimizer()
        change_stage(self)

    def prepare(self, records: list[Record]) -> Batch:
        pairs = len(records) if self.case.is_preference else 0
        batch = collate(self.processor, records, step_pairs=pairs, step_chosen_tokens=int(bool(pairs)))
        batch.step_supervised_tokens = batch.num_supervised_tokens
        batch.record_keys, batch.image_hashes = [crc32(record.id.encode()) for record in records], [0] * len(records)
        return self.change_batch(batch.to(self.placement.device))

    def backward(self, inputs: Batch) -> float:
        with self.placement.use_autocast():
            loss = self.compute_loss(inputs)
        loss.backward()
        return float(loss.detach())

    def compute_loss(self, batch: Batch) -> Tensor:
        """Compute the loss of a batch."""
        # its step_loss logs and checks the first loss, which needs a Trainer
        if isinstance(self.stage, DPOStage):
            loss, output = self.stage._compute_preference(batch, PreferenceMetrics(), training=True)
            self.metrics = output.metrics
            return loss
        return self.stage.compute_loss(batch)

    def count_tokens(self, inputs: Batch, records: list[Record]) -> tuple[int, int]:
        real = sum(self.case.tokens_by_id[record.id] for record in records)
        return min(real, inputs.num_tokens), inputs.num_tokens  # pairs with a shared prompt have fewer

    def compute_log_probs(self, record: Record) -> tuple[float, float]:
        with torch.no_grad(), self.placement.use_autocast():
            self.compute_loss(self.prepare([record]))
        return self.metrics["logps/chosen"], self.metrics["logps/rejected"]


class OursWithReferenceCache(Ours):
    """This library with a reference cache: log-probabilities are computed in the first epoch and reused in the others."""

    def __init__(self, case: Case, placement: Placement) -> None:
        super().__init__(case, placement, name=OURS_CACHED, options={"cache_reference": True})
        self.reset_cache()
        for records in case.batches:  # at this point the policy still equals the reference model
            self._fill_cache(self.prepare(records))

    def reset_cache(self) -> None:
        """Reset the reference cache."""
        self.stage.reference_cache = ReferenceLogProbCache(None)

    def compute_loss(self, batch: Batch) -> Tensor:
        self._fill_cache(batch)
        return super().compute_loss(batch)

    def _fill_cache(self, batch: Batch) -> None:
        if self.stage.reference_cache.find_missing(
            np.array(batch.record_keys, np.uint64), np.array(batch.image_hashes, np.uint64)
        ).any():
            with torch.no_grad(), self.placement.use_autocast():
                self.stage._store_reference_log_probs(batch)
            self.stage.reference_cache.read()

    def iter_passes(self) -> Iterator[float]:
        """Iterate over one epoch that computes the reference and one that reuses it, weighted as the mean of `NUM_EPOCHS`.

        The computed values are those of trained weights, which takes the same time.
        """
        self.reset_cache()
        yield 1 / NUM_EPOCHS
        yield 1 - 1 / NUM_EPOCHS


def make_ours(case: Case, placement: Placement) -> dict[str, Callable[[], Contender]]:
    """Make factories for the contenders of this library, by name."""
    return {OURS: partial(Ours, case, placement), OURS_CACHED: partial(OursWithReferenceCache, case, placement)}


def setup_process() -> None:
    """Set up this process for repeatable times: one thread, no denormal numbers, and no memory returned to the system.

    On a busy machine two threads are slower at this size, and their times cannot be separated. A GPU allocator keeps its
    memory too. Without that, glibc returns each large tensor and the kernel clears its pages again, so storing activations
    costs more than recomputing them.
    """
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    with contextlib.suppress(OSError, AttributeError):  # mallopt(3) exists only in glibc
        libc = ctypes.CDLL("libc.so.6")
        for parameter, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 2**28)):
            libc.mallopt(parameter, value)


def _read_clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()
