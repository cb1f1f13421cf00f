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

from benchmarks.compare.cases import CACHED, EPOCHS, OURS, Case
from benchmarks.compare.sizes import random_model
from lit_vlm.data.collate import collate
from lit_vlm.model.forward import use_flat_forward
from lit_vlm.model.hub import quiet_transformers
from lit_vlm.model.lora import Lora
from lit_vlm.stages import DPOStage
from lit_vlm.stages.reference import ReferenceLogProbs
from lit_vlm.stages.tally import Tally
from lit_vlm.types import Batch, Part, Record

RATE = 1e-4  # constant, equal for all contenders; large enough to move the weights in a few steps
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # malloc.h
EPS = 1e-6  # epsilon of Adam: a smaller one lets rounding of zero gradients decide the direction


@dataclass(frozen=True, slots=True)
class Times:
    """Wall seconds and CPU seconds of this process, all threads included, and the part that prepared the data."""

    wall: float
    cpu: float
    data_wall: float
    data_cpu: float

    def __add__(self, other: Times) -> Times:
        return Times(*(a + b for a, b in zip(self.values(), other.values(), strict=True)))

    def __mul__(self, factor: float) -> Times:
        return Times(*(factor * value for value in self.values()))

    def values(self) -> tuple[float, float, float, float]:
        return self.wall, self.cpu, self.data_wall, self.data_cpu


@dataclass(frozen=True, slots=True)
class Place:
    """Placement of the models: source of the weights, device and dtype.

    Attributes:
        folder: all contenders load from it. None: each one initialises the same random weights on the device.
        mixed: compute in bfloat16 under autocast (`bf16-mixed`).
    """

    folder: Path | None = None
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    mixed: bool = False
    lora: Lora | None = None
    seed: int = 0

    def model(self, case: Case) -> LlavaOnevisionForConditionalGeneration:
        """Load a new model with the initial weights that all contenders share."""
        if self.folder is None:
            return random_model(case.model_size, case.tiling, self.device, self.dtype, self.seed)
        with quiet_transformers():
            return LlavaOnevisionForConditionalGeneration.from_pretrained(self.folder, dtype=self.dtype)

    def autocast(self) -> contextlib.AbstractContextManager:
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

    def __init__(self, case: Case, place: Place) -> None:
        self.case, self.place = case, place

    def prepare(self, records: list[Record]) -> Any:
        """Convert records to model inputs on the device."""
        raise NotImplementedError

    def backward(self, inputs: Any) -> float:
        """Run the forward and backward pass, which fills the gradients. Return the loss of the step."""
        raise NotImplementedError

    def rows(self, inputs: Any, records: list[Record]) -> tuple[int, int]:
        """Count the tokens of the rows of a step: (real tokens, all tokens with padding)."""
        raise NotImplementedError

    def logps(self, record: Record) -> tuple[float, float]:
        """Compute the summed log-probabilities of the chosen and the rejected response of a pair, without gradients."""
        raise NotImplementedError

    def trained(self) -> dict[str, nn.Parameter]:
        """Return the trained parameters by their names in transformers."""
        named = ((name.replace("base_model.model.", ""), value) for name, value in self.models[0].named_parameters())
        return {name: value for name, value in named if id(value) in self._learning}

    def optimize(self) -> None:
        """Make the optimizer of the trained parameters."""
        parameters = [parameter for parameter in self.models[0].parameters() if parameter.requires_grad]
        self._learning = {id(parameter) for parameter in parameters}
        self.optimizer = torch.optim.AdamW(parameters, lr=RATE, eps=EPS, weight_decay=0.0, fused=True)

    def update(self) -> None:
        """Clip the gradients, update the weights and clear the gradients."""
        torch.nn.utils.clip_grad_norm_(self.optimizer.param_groups[0]["params"], 1.0)
        self.optimizer.step()
        self.clear()

    def clear(self) -> None:
        self.models[0].zero_grad(set_to_none=True)

    def step(self, records: list[Record]) -> Times:
        """Run one optimizer step and return its times."""
        start = _now()
        inputs = self.prepare(records)
        data_end = _now()
        self.backward(inputs)
        self.update()
        self.place.wait()
        end = _now()
        return Times(end[0] - start[0], end[1] - start[1], data_end[0] - start[0], data_end[1] - start[1])

    def passes(self) -> Iterator[float]:
        """Iterate over the passes over the batches; each item is the weight of a pass."""
        yield 1.0

    def repeat(self, batches: list[list[Record]]) -> Times:
        """Run optimizer steps over the batches and return the weighted times."""
        total = Times(0.0, 0.0, 0.0, 0.0)
        for weight in self.passes():
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
        place: Place,
        *,
        name: str = OURS,
        options: dict[str, Any] | None = None,
        alter: Callable[[Ours], None] = lambda contender: None,
        batch: Callable[[Batch], Batch] = lambda batch: batch,
    ) -> None:
        super().__init__(case, place)
        self.name, self.batch, self.processor = name, batch, case.processor
        model = place.model(case)
        use_flat_forward(model, case.model_size.images(case.tiling))
        parts = {Part.language_model.value: {"lora": asdict(place.lora)}} if place.lora else None
        self.stage = case.stage_class(
            model, parts=parts, tiling=case.tiling.value, **{**case.options, **(options or {})}
        )
        self.stage.configure_model()
        self.stage.to(place.device)
        self.models = [self.stage.model, *([self.stage.reference] if getattr(self.stage, "reference", None) else [])]
        self.optimize()
        alter(self)

    def prepare(self, records: list[Record]) -> Batch:
        pairs = len(records) if self.case.prefers else 0
        batch = collate(self.processor, records, step_pairs=pairs, step_chosen_tokens=int(bool(pairs)))
        batch.step_supervised_tokens = batch.num_supervised_tokens
        batch.keys, batch.contents = [crc32(record.id.encode()) for record in records], [0] * len(records)
        return self.batch(batch.to(self.place.device))

    def backward(self, inputs: Batch) -> float:
        with self.place.autocast():
            loss = self.loss(inputs)
        loss.backward()
        return float(loss.detach())

    def loss(self, batch: Batch) -> Tensor:
        """Compute the loss of a batch."""
        # its step_loss logs and checks the first loss, which needs a Trainer
        if isinstance(self.stage, DPOStage):
            loss, output = self.stage._preference(batch, Tally(), training=True)
            self.metrics = output.metrics
            return loss
        return self.stage.step_loss(batch)

    def rows(self, inputs: Batch, records: list[Record]) -> tuple[int, int]:
        real = sum(self.case.tokens_of[record.id] for record in records)
        return min(real, inputs.num_tokens), inputs.num_tokens  # pairs with a shared prompt have fewer

    def logps(self, record: Record) -> tuple[float, float]:
        with torch.no_grad(), self.place.autocast():
            self.loss(self.prepare([record]))
        return self.metrics["logps/chosen"], self.metrics["logps/rejected"]


class OursWithKeptReference(Ours):
    """This library with a reference cache: log-probabilities are computed in the first epoch and reused in the others."""

    def __init__(self, case: Case, place: Place) -> None:
        super().__init__(case, place, name=CACHED, options={"cache_reference": True})
        self.forget()
        for records in case.batches:  # at this point the policy still equals the reference model
            self._keep(self.prepare(records))

    def forget(self) -> None:
        """Reset the reference cache."""
        self.stage.kept = ReferenceLogProbs(None)

    def loss(self, batch: Batch) -> Tensor:
        self._keep(batch)
        return super().loss(batch)

    def _keep(self, batch: Batch) -> None:
        if self.stage.kept.missing(np.array(batch.keys, np.uint64), np.array(batch.contents, np.uint64)).any():
            with torch.no_grad(), self.place.autocast():
                self.stage._keep(batch)
            self.stage.kept.read()

    def passes(self) -> Iterator[float]:
        """Iterate over one epoch that computes the reference and one that reuses it, weighted as the mean of `NUM_EPOCHS`.

        The computed values are those of trained weights, which takes the same time.
        """
        self.forget()
        yield 1 / EPOCHS
        yield 1 - 1 / EPOCHS


def make_ours(case: Case, place: Place) -> dict[str, Callable[[], Contender]]:
    """Make factories for the contenders of this library, by name."""
    return {OURS: partial(Ours, case, place), CACHED: partial(OursWithKeptReference, case, place)}


def steady() -> None:
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


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()
