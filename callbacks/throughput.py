"""How fast a run goes and where its time goes; the counts are those of the batches that were trained on."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections import deque
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lit_vlm.types import Batch

COUNTS = ("tokens", "supervised_tokens", "samples", "images")
LAST_SHARE, LAST_STEPS = 0.05, 10  # steps whose mean is the last loss


class Throughput(L.Callback):
    """Logs `throughput/*` at every logging step, over all ranks.

    Time counts from the first step on, without validation. `data_wait` is the share of it between the end of a batch
    and the start of the next one: near 0 the loader keeps up, else raise data.num_workers.
    """

    def __init__(self) -> None:
        names = (*COUNTS, "busy", "wait")  # the last two in seconds
        self._now: dict[str, float] = dict.fromkeys(names, 0.0)  # since the last logging step, this rank
        self._sums: dict[str, float] = dict.fromkeys(names, 0.0)  # up to it, all ranks
        self._steps = 0
        self._first: Tensor | None = None
        self._last: deque[Tensor] = deque(maxlen=LAST_STEPS)
        self._peak_memory = 0
        self._started: float | None = None
        self._ended: float | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        most = max(LAST_STEPS, math.ceil(LAST_SHARE * max(trainer.max_steps, 0)))
        self._last = deque(self._last, maxlen=most)
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)
        self._ended = time.perf_counter()  # the first batch is waited for as well

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._started = time.perf_counter()
        if self._ended is not None:
            self._now["wait"] += self._started - self._ended

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._ended = time.perf_counter()
        if self._started is not None:
            self._now["busy"] += self._ended - self._started
        if isinstance(batch, Batch) and not batch.blank:
            counts = (batch.num_tokens, batch.num_supervised_tokens, len(batch.sample_ids), len(batch.layouts))
            for name, count in zip(COUNTS, counts, strict=True):
                self._now[name] += count
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self._end_step(trainer, pl_module)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._ended = None  # what passes until the next batch is neither training nor waiting for data

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._close_window(trainer)
        self._peak_memory = int(trainer.strategy.reduce(_peak_memory(pl_module.device), reduce_op="max"))

    def figures(self) -> dict[str, float]:
        """For the manifest, after training: totals over all ranks, seconds, nats, bytes of the fullest rank."""
        if not self._steps:
            return {}
        counts = {name: int(self._sums[name]) for name in COUNTS}
        seconds = self._sums["busy"] + self._sums["wait"]
        losses = torch.stack([loss.float().cpu() for loss in self._last]) if self._last else torch.tensor([math.nan])
        return {
            "steps": self._steps,
            **counts,
            "seconds": seconds,
            "tokens_per_second": counts["tokens"] / seconds,
            "samples_per_second": counts["samples"] / seconds,
            "data_wait": self._sums["wait"] / seconds,
            "loss_first": float(self._first) if self._first is not None else math.nan,
            "loss_last": float(losses.mean()),
            "peak_memory_bytes": self._peak_memory,
        }

    def _end_step(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._steps += 1
        loss = trainer.callback_metrics.get("train/loss")
        if loss is not None:
            loss = loss.detach().clone()  # stays on the device: reading it would make the host wait at every step
            self._last.append(loss)
            self._first = loss if self._first is None else self._first
        every = trainer.log_every_n_steps
        if every and trainer.global_step % every == 0:
            window = self._close_window(trainer)
            pl_module.log_dict({f"throughput/{name}": value for name, value in _rates(window).items()}, batch_size=1)

    def _close_window(self, trainer: L.Trainer) -> dict[str, float]:
        """What happened since the last call, over all ranks: counts add up, times are averaged."""
        window = dict(self._now)
        if trainer.world_size > 1:
            values = torch.tensor(list(window.values()), dtype=torch.float64, device=trainer.strategy.root_device)
            window = dict(zip(window, trainer.strategy.reduce(values, reduce_op="sum").tolist(), strict=True))
            window |= {name: window[name] / trainer.world_size for name in ("busy", "wait")}
        for name, value in window.items():
            self._sums[name] += value
            self._now[name] = 0.0
        return window


def _rates(window: dict[str, float]) -> dict[str, float]:
    seconds = max(window["busy"] + window["wait"], 1e-9)
    rates = {f"{name}_per_second": window[name] / seconds for name in COUNTS}
    return rates | {"data_wait": window["wait"] / seconds}


def _peak_memory(device: torch.device) -> Tensor:
    """Bytes: the GPU's allocator, or on a CPU this process and its largest child that has ended."""
    if device.type == "cuda":
        return torch.tensor(float(torch.cuda.max_memory_allocated(device)), device=device)
    used = sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return torch.tensor(float(used) * (1 if sys.platform == "darwin" else 1024))  # macOS counts bytes, Linux KiB
