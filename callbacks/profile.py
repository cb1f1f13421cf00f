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

from lit_vlm.compat.lightning import get_num_steps
from lit_vlm.formatting import format_count
from lit_vlm.reports.profile.page import write_profile_page
from lit_vlm.reports.profile.summary import summarize_trace
from lit_vlm.reports.profile.trace import DATA, PART_PREFIX, PHASE_PREFIX, VALIDATION, read_trace
from lit_vlm.runs.run_folder import get_command_line
from lit_vlm.types import Batch

WARMUP_STEPS, PROFILED_STEPS = 3, 3
TRACE_FILE, PAGE_FILE = "profile_trace.json.gz", "profile.html"


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
        self._first_step = self._last_step = 0  # range of profiled steps, counted from the start of this fit
        self._step = 0
        self._tokens = self._tiles = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        steps_left = get_num_steps(trainer) - trainer.global_step
        if not trainer.is_global_zero or steps_left == 0:
            return
        num_profiled = min(PROFILED_STEPS, max(steps_left - 1, 1)) if steps_left > 0 else PROFILED_STEPS  # < 0: unknown
        self._first_step = min(WARMUP_STEPS, steps_left - num_profiled) if steps_left > 0 else WARMUP_STEPS
        self._last_step, self._step = self._first_step + num_profiled, 0
        self._register_part_hooks(pl_module)
        self._profiler = profile(
            activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if pl_module.device.type == "cuda" else [])],
            schedule=schedule(
                skip_first=max(self._first_step - 1, 0),
                wait=0,
                warmup=min(self._first_step, 1),
                active=num_profiled,
                repeat=1,
            ),
            record_shapes=True,
        )
        self._profiler.start()
        self._start_phase(DATA)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if isinstance(batch, Batch) and self._first_step <= self._step < self._last_step:
            self._tokens, self._tiles = self._tokens + batch.num_tokens, self._tiles + batch.num_tiles
        self._start_phase("forward")

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        self._start_phase("backward")

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start_phase("communication")

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self._start_phase("optimizer")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._profiler is None:
            return
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self._handle_step_end(trainer, pl_module)
        self._start_phase(DATA)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start_phase(VALIDATION)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start_phase(DATA)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stop_profiler()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._stop_profiler()

    def _handle_step_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert self._profiler is not None
        self._step += 1
        if self._step in (self._first_step, self._last_step) and pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)  # kernels count to the step that launched them
        self._stop_phase()
        profiler = self._profiler
        profiler.step()
        if self._step == self._last_step:
            profiler.export_chrome_trace(str(self.run_dir / TRACE_FILE))
            self._stop_profiler()
            self._write_page(trainer, pl_module)

    def _write_page(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        steps = self._last_step - self._first_step
        facts = summarize_trace(
            read_trace(self.run_dir / TRACE_FILE),
            steps,
            name=self.run_dir.name,
            device=_get_device_name(pl_module.device),
            precision=str(trainer.precision),
            tokens=self._tokens / steps,
            tiles=self._tiles / steps,
            command=get_command_line(),
        )
        write_profile_page(self.run_dir / PAGE_FILE, facts)

    def _start_phase(self, phase: str) -> None:
        if self._profiler is not None:
            self._stop_phase()
            self._phase = record_function(f"{PHASE_PREFIX}{phase}")
            self._phase.__enter__()

    def _stop_phase(self) -> None:
        if self._phase is not None:
            self._phase.__exit__(None, None, None)
            self._phase = None

    def _stop_profiler(self) -> None:
        self._stop_phase()
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None

    def _register_part_hooks(self, pl_module: L.LightningModule) -> None:
        for name, module in _get_model_parts(pl_module).items():
            open_ranges: list[record_function] = []
            before, after = partial(_start_part, name, open_ranges), partial(_stop_part, open_ranges)
            self._handles.append(module.register_forward_pre_hook(before))
            self._handles.append(module.register_forward_hook(after, always_call=True))


def _get_model_parts(pl_module: L.LightningModule) -> dict[str, nn.Module]:
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


def _start_part(name: str, open_ranges: list[record_function], module: nn.Module, inputs: Any) -> None:
    open_ranges.append(record_function(f"{PART_PREFIX}{name}"))
    open_ranges[-1].__enter__()


def _stop_part(open_ranges: list[record_function], module: nn.Module, inputs: Any, output: Any) -> None:
    if open_ranges:
        open_ranges.pop().__exit__(None, None, None)


def _get_device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}, {format_count(torch.get_num_threads(), 'thread')})"
