"""Throughput callback: tokens per second, time by part and GPU memory. Only batches that were trained on count."""

from __future__ import annotations

import math
import resource
import socket
import sys
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning as L
import torch
from torch import Tensor

from callbacks.step_time import STEP_PARTS, StepTimer, StragglerMonitor, measure_memory_parts
from lit_vlm.data.caption_pairs import PairBatch
from lit_vlm.distributed.collectives import gather_objects
from lit_vlm.types import Batch

COUNTS = ("tokens", "supervised_tokens", "samples", "images")
PRINT_INTERVAL_SECONDS = 30.0
# the last loss is the mean over this share of the steps, but at least so many
LAST_LOSS_SHARE, MIN_LAST_LOSS_STEPS = 0.05, 10


class Throughput(L.Callback):
    """Logs `throughput/*` at each logging step, over all ranks.

    Time counts from the first step on, without validation. `data_wait` is the fraction of time between the end of a batch
    and the start of the next one. Near 0 the loader keeps up; otherwise raise data.num_workers. `time_*` are seconds of an
    optimizer step by part, averaged over ranks (see `StepTimer`). `slowest_rank` is the straggler, and `slowest_excess` is
    its excess over the median as a fraction. `memory_*` are GiB of this rank's GPU. One all-gather per logging step.

    This callback must come after the guard, because the guard's exchange between ranks counts as communication.
    """

    def __init__(self) -> None:
        names = (*COUNTS, "busy", "wait")  # the last two in seconds
        self._window: dict[str, float] = dict.fromkeys(names, 0.0)  # since the last logging step, on this rank
        # up to the last logging step, over all ranks
        self._totals: dict[str, float] = dict.fromkeys(names, 0.0)
        self._steps = 0
        self._first_loss: Tensor | None = None
        self._last_losses: deque[Tensor] = deque()
        self._peak_memory = 0
        self._straggler_metrics: dict[str, float] = {}
        self._batch_start: float | None = None
        self._batch_end: float | None = None
        self._step_timer: StepTimer | None = None
        self._straggler_monitor: StragglerMonitor | None = None
        self._memory_parts: dict[str, float] = {}  # GiB
        self._last_print_time = 0.0  # host time of the last printed line
        self._trainer: L.Trainer | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._trainer = trainer
        num_losses = max(MIN_LAST_LOSS_STEPS, math.ceil(LAST_LOSS_SHARE * max(trainer.max_steps, 0)))
        self._last_losses = deque(self._last_losses, maxlen=num_losses)
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)
        self._batch_end = time.perf_counter()  # waiting for the first batch counts as well
        self._last_print_time = self._batch_end
        self._step_timer = StepTimer(pl_module.device)
        self._straggler_monitor = StragglerMonitor(_make_rank_zero_printer(trainer), partial(_gather_host, trainer))

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._batch_start = time.perf_counter()
        if self._batch_end is not None:
            self._window["wait"] += self._batch_start - self._batch_end
        self._mark("data")

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        self._mark("forward")
        if self._step_timer is not None:
            self._step_timer.mark_after_backward(loss, "backward")

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._mark("communication")

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self._mark("communication")
        # moments exist after step 1
        if pl_module.device.type == "cuda" and not self._memory_parts and self._steps:
            parts = measure_memory_parts(trainer, pl_module)
            self._memory_parts = {name: size / 2**30 for name, size in parts.items()}

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._mark("optimizer" if (batch_idx + 1) % trainer.accumulate_grad_batches == 0 else "backward")
        self._batch_end = time.perf_counter()
        if self._batch_start is not None:
            self._window["busy"] += self._batch_end - self._batch_start
        for name, count in zip(COUNTS, _count_batch(batch), strict=True):
            self._window[name] += count
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self._handle_step_end(trainer, pl_module)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.pause()

    def pause(self) -> None:
        """Leave out the time until the next batch, in which something else than training runs."""
        if self._step_timer is not None:
            self._step_timer.pause()
        self._batch_end = None  # the time until the next batch is neither training nor waiting for data

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._close_window(trainer)
        self._peak_memory = int(trainer.strategy.reduce(_measure_peak_memory(pl_module.device), reduce_op="max"))

    def figures(self) -> dict[str, float]:
        """Return figures for the manifest after training: totals over all ranks, seconds, losses in nats, maximum bytes of a rank."""
        if not self._steps:
            return {}
        counts = {name: int(self._totals[name]) for name in COUNTS}
        seconds = self._totals["busy"] + self._totals["wait"]
        losses = (
            torch.stack([loss.float().cpu() for loss in self._last_losses])
            if self._last_losses
            else torch.tensor([math.nan])
        )
        return {
            "steps": self._steps,
            **counts,
            "seconds": seconds,
            "tokens_per_second": counts["tokens"] / seconds,
            "samples_per_second": counts["samples"] / seconds,
            "data_wait": self._totals["wait"] / seconds,
            "loss_first": float(self._first_loss) if self._first_loss is not None else math.nan,
            "loss_last": float(losses.mean()),
            "peak_memory_bytes": self._peak_memory,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the totals over all ranks for a checkpoint. All ranks must call it at the same point."""
        if self._trainer is None:
            return {}
        self._close_window(self._trainer)
        first = None if self._first_loss is None else float(self._first_loss)
        return {
            "steps": self._steps,
            "sums": dict(self._totals),
            "first": first,
            "last": [float(x) for x in self._last_losses],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._steps, self._totals = state_dict["steps"], dict(state_dict["sums"])
        self._first_loss = None if state_dict["first"] is None else torch.tensor(state_dict["first"])
        self._last_losses.extend(map(torch.tensor, state_dict["last"]))

    def _handle_step_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._steps += 1
        loss = trainer.callback_metrics.get("train/loss")
        if loss is not None:
            # kept on the device: reading it would make the host wait at each step
            loss = loss.detach().clone()
            self._last_losses.append(loss)
            self._first_loss = loss if self._first_loss is None else self._first_loss
        every = trainer.log_every_n_steps
        if every and trainer.global_step % every == 0:
            window, steps = self._close_window(trainer), min(every, self._steps)
            rates = _compute_rates(window, steps) | self._straggler_metrics | self._measure_memory(pl_module.device)
            pl_module.log_dict({f"throughput/{name}": value for name, value in rates.items()}, batch_size=1)
            self._print_line(trainer, rates)

    def _close_window(self, trainer: L.Trainer) -> dict[str, float]:
        """Return the counts and seconds since the last call: counts summed, times averaged over all ranks."""
        window = self._window | (
            self._step_timer.collect() if self._step_timer is not None else dict.fromkeys(STEP_PARTS, 0.0)
        )
        ranks = [window]
        if trainer.world_size > 1:
            values = torch.tensor(list(window.values()), dtype=torch.float64, device=trainer.strategy.root_device)
            ranks = [dict(zip(window, row, strict=True)) for row in trainer.strategy.all_gather(values).tolist()]
        parts = [{part: rank[part] for part in STEP_PARTS} for rank in ranks]
        self._straggler_metrics = self._straggler_monitor.update(parts) if self._straggler_monitor is not None else {}
        averaged = {"busy", "wait", *STEP_PARTS}
        window = {name: sum(own[name] for own in ranks) / (len(ranks) if name in averaged else 1) for name in window}
        for name in self._window:
            self._totals[name] += window[name]
            self._window[name] = 0.0
        return window

    def _measure_memory(self, device: torch.device) -> dict[str, float]:
        """Measure the memory of a GPU in GiB; {} on other devices.

        `memory_activations` is the peak minus the parts: activations, and weights that the strategy gathers temporarily.
        """
        if device.type != "cuda":
            return {}
        peak, reserved = (
            measure(device) / 2**30 for measure in (torch.cuda.max_memory_allocated, torch.cuda.max_memory_reserved)
        )
        memory = {f"memory_{name}": size for name, size in self._memory_parts.items()}
        if memory:
            memory["memory_activations"] = max(0.0, peak - sum(self._memory_parts.values()))
        return memory | {"memory_peak": peak, "memory_reserved": reserved}

    def _print_line(self, trainer: L.Trainer, rates: dict[str, float]) -> None:
        """Print a progress line every `PRINT_INTERVAL_SECONDS`, if there is no progress bar."""
        now = time.perf_counter()
        if (
            trainer.progress_bar_callback is not None
            or not trainer.is_global_zero
            or now - self._last_print_time < PRINT_INTERVAL_SECONDS
        ):
            return
        self._last_print_time = now
        step = sum(rates[f"time_{part}"] for part in STEP_PARTS)
        shares = ", ".join(f"{part} {rates[f'time_{part}'] / max(step, 1e-9):.0%}" for part in STEP_PARTS)
        loss = trainer.callback_metrics.get("train/loss")
        total = f"/{trainer.max_steps:,}" if trainer.max_steps > 0 else ""
        print(
            f"step {trainer.global_step:,}{total}  loss {float(loss) if loss is not None else math.nan:.4f}  "
            f"{rates['tokens_per_second']:,.0f} tokens/s  {step:.2f} s: {shares}",
            flush=True,
        )

    def _mark(self, part: str) -> None:
        if self._step_timer is not None:
            self._step_timer.mark(part)


def _count_batch(batch: Any) -> tuple[int, int, int, int]:
    """Count tokens, supervised tokens, samples and images of a batch; 0 for a batch of another kind."""
    if isinstance(batch, Batch) and not batch.dummy:
        return batch.num_tokens, batch.num_supervised_tokens, len(batch.sample_ids), len(batch.layouts)
    if isinstance(batch, PairBatch):
        return batch.num_tokens, batch.num_tokens, len(batch.pair_ids), len(batch.pair_ids)
    return 0, 0, 0, 0


def _compute_rates(window: dict[str, float], steps: int) -> dict[str, float]:
    seconds = max(window["busy"] + window["wait"], 1e-9)
    rates = {f"{name}_per_second": window[name] / seconds for name in COUNTS}
    parts = {f"time_{part}": window[part] / max(steps, 1) for part in STEP_PARTS}
    return rates | parts | {"data_wait": window["wait"] / seconds}


def _make_rank_zero_printer(trainer: L.Trainer) -> Callable[[str], None]:
    return (lambda text: print(text, flush=True)) if trainer.is_global_zero else (lambda text: None)


def _gather_host(trainer: L.Trainer, rank: int) -> str:
    """Gather the host names and return that of one rank. All ranks must call it at the same point."""
    return gather_objects(socket.gethostname(), trainer.world_size)[rank]


def _measure_peak_memory(device: torch.device) -> Tensor:
    """Measure the peak bytes: of the GPU allocator, or on a CPU of this process plus its largest finished child process."""
    if device.type == "cuda":
        return torch.tensor(float(torch.cuda.max_memory_allocated(device)), device=device)
    used = sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    # macOS counts bytes, Linux KiB
    return torch.tensor(float(used) * (1 if sys.platform == "darwin" else 1024))
