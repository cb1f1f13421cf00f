"""Profile callback: records some steps with the PyTorch profiler and renders them as an HTML page."""

from __future__ import annotations

import platform
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function, schedule
from torch.utils.hooks import RemovableHandle

from lit_vlm.engine.profile.facts import facts_of
from lit_vlm.engine.profile.page import write_profile
from lit_vlm.engine.profile.rooms import DATA, VALIDATION
from lit_vlm.engine.profile.trace import PART, PHASE, read_trace
from lit_vlm.types import Batch, counted

WARMUP, STEPS = 3, 3
TRACE, PAGE = "profile_trace.json.gz", "profile.html"


class Profile(L.Callback):
    """Writes `profile.html` and `profile_trace.json.gz` for the first steps of a fit, on rank 0.

    `PROFILED_STEPS` optimizer steps are profiled after `WARMUP_STEPS` others; in a shorter fit, the last ones. The phases
    data, forward, backward, communication and optimizer are those of `StepTimer`. Forward is split by the model's parts.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = Path(run_dir)
        self._profiler: profile | None = None
        self._phase: record_function | None = None
        self._handles: list[RemovableHandle] = []
        self._first = self._last = 0  # range of profiled steps, counted from the start of this fit
        self._step = 0
        self._tokens = self._tiles = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        steps_left = trainer.fit_loop.epoch_loop.max_steps - trainer.global_step
        if not trainer.is_global_zero or steps_left == 0:
            return
        num_profiled = min(STEPS, max(steps_left - 1, 1)) if steps_left > 0 else STEPS  # < 0: unknown
        self._first = min(WARMUP, steps_left - num_profiled) if steps_left > 0 else WARMUP
        self._last, self._step = self._first + num_profiled, 0
        self._mark_parts(pl_module)
        self._profiler = profile(
            activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if pl_module.device.type == "cuda" else [])],
            schedule=schedule(
                skip_first=max(self._first - 1, 0), wait=0, warmup=min(self._first, 1), active=num_profiled, repeat=1
            ),
            record_shapes=True,
        )
        self._profiler.start()
        self._enter(DATA)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if isinstance(batch, Batch) and self._first <= self._step < self._last:
            self._tokens, self._tiles = self._tokens + batch.num_tokens, self._tiles + batch.num_tiles
        self._enter("forward")

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        self._enter("backward")

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._enter("communication")

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self._enter("optimizer")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._profiler is None:
            return
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self._end_step(trainer, pl_module)
        self._enter(DATA)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._enter(VALIDATION)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._enter(DATA)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stop()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._stop()

    def _end_step(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert self._profiler is not None
        self._step += 1
        if self._step in (self._first, self._last) and pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)  # kernels count to the step that launched them
        self._leave()
        profiler = self._profiler
        profiler.step()
        if self._step == self._last:
            profiler.export_chrome_trace(str(self.run_dir / TRACE))
            self._stop()
            self._write(trainer, pl_module)

    def _write(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        steps = self._last - self._first
        facts = facts_of(
            read_trace(self.run_dir / TRACE),
            steps,
            name=self.run_dir.name,
            device=_device_name(pl_module.device),
            precision=str(trainer.precision),
            tokens=self._tokens / steps,
            tiles=self._tiles / steps,
        )
        write_profile(self.run_dir / PAGE, facts)

    def _enter(self, phase: str) -> None:
        if self._profiler is not None:
            self._leave()
            self._phase = record_function(f"{PHASE}{phase}")
            self._phase.__enter__()

    def _leave(self) -> None:
        if self._phase is not None:
            self._phase.__exit__(None, None, None)
            self._phase = None

    def _stop(self) -> None:
        self._leave()
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None

    def _mark_parts(self, pl_module: L.LightningModule) -> None:
        for name, module in _parts_of(pl_module).items():
            open_ranges: list[record_function] = []
            before, after = partial(_begin, name, open_ranges), partial(_end, open_ranges)
            self._handles.append(module.register_forward_pre_hook(before))
            self._handles.append(module.register_forward_hook(after, always_call=True))


def _parts_of(pl_module: L.LightningModule) -> dict[str, nn.Module]:
    """Return the modules whose forward passes are measured separately. A reference model counts as one module."""
    model: Any = getattr(pl_module, "model", None)
    inner = getattr(model, "model", None)
    parts = {
        "vision tower": getattr(inner, "vision_tower", None),
        "projector": getattr(inner, "multi_modal_projector", None),
        "language model": getattr(inner, "language_model", None),
        "head": getattr(model, "lm_head", None),
        "reference": getattr(pl_module, "reference", None),
    }
    return {name: module for name, module in parts.items() if isinstance(module, nn.Module)}


def _begin(name: str, open_: list[record_function], module: nn.Module, inputs: Any) -> None:
    open_.append(record_function(f"{PART}{name}"))
    open_[-1].__enter__()


def _end(open_: list[record_function], module: nn.Module, inputs: Any, output: Any) -> None:
    if open_:
        open_.pop().__exit__(None, None, None)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}, {counted(torch.get_num_threads(), 'thread')})"
