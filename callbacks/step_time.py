"""GPU memory by part: weights, gradients, optimizer state."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from statistics import median
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lit_vlm.compat.torch import queue_after_backward
from lit_vlm.distributed.gradients import get_local_gradients


def measure_memory_parts(trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, int]:
    """Measure the bytes of weights, gradients and optimizer state on this rank's device. Frozen weights count as weights.

    Call it while the gradients of a step exist. Offloaded parts lie in host memory and do not count.
    """
    device = trainer.strategy.root_device
    return {
        "weights": _count_bytes(_iter_weights(pl_module), device),
        "gradients": _count_bytes(get_local_gradients(trainer, trainer.optimizers[0]), device),
        "optimizer": _count_bytes(_iter_optimizer_states(trainer), device),
    }


def _iter_weights(module: torch.nn.Module) -> Iterator[Tensor]:
    for parameter in module.parameters():
        value: Any = parameter
        yield getattr(value, "ds_tensor", parameter)  # ZeRO-3: the local partition
    yield from module.buffers()


def _iter_optimizer_states(trainer: L.Trainer) -> Iterator[Tensor]:
    """Yield the optimizer moments and the float32 master weights of DeepSpeed."""
    engine: Any = getattr(trainer.strategy.model, "optimizer", None)
    for optimizer in (engine, getattr(engine, "optimizer", None), trainer.optimizers[0]):
        for state in getattr(optimizer, "state", {}).values():
            yield from (value for value in state.values() if isinstance(value, Tensor))
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups"):
        yield from getattr(engine, name, None) or ()


def _count_bytes(tensors: Iterable[Tensor], device: torch.device) -> int:
    """Return the bytes of the tensors on the device. Views of one storage count once."""
    sizes: dict[int, int] = {}
    for tensor in tensors:
        local: Any = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        if local.device.type == device.type and local.numel():
            storage = local.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


STEP_PARTS = ("data", "forward", "backward", "communication", "optimizer")
OWN_PARTS = ("data", "forward", "backward")  # parts in which no rank waits for another, under DDP
SLOW_EXCESS, SLOW_WINDOWS = 0.15, 3  # a rank this much above the median in so many consecutive windows is reported
DATA_WAIT_SHARE = 0.10  # a larger share of the time spent waiting for data is reported
WARMUP_SECONDS = 30.0  # seconds without reports at the start: the first steps are slow for other reasons

TimeMark = float | torch.cuda.Event


class StepTimer:
    """Timer of an optimizer step: seconds between marks, by part.

    On a GPU it records events on the GPU timeline, which block neither host nor device. On a CPU it uses the host clock.

    data: from the end of a micro-step to the start of the next. On a GPU only the exposed part, because the host runs ahead.
    backward: until the last gradient of this rank is computed, overlapped communication included.
    communication: from there until all gradients are reduced over the ranks, plus the exchange of flags before the update.
        Communication that DDP and FSDP2 overlap with computation is not included. All-gathers of ZeRO-3 and FSDP2 before a
        layer count to forward and backward.
    optimizer: gradient clipping, update, logging.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._last_mark: TimeMark | None = None
        self._spans: list[tuple[str, TimeMark, TimeMark]] = []

    def mark(self, part: str) -> None:
        """Assign the time since the last mark to a part."""
        now = self._make_mark()
        if self._last_mark is not None:
            self._spans.append((part, self._last_mark, now))
        self._last_mark = now

    def pause(self) -> None:
        """Ignore the time until the next mark."""
        self._last_mark = None

    def mark_after_backward(self, loss: Tensor, part: str) -> None:
        """Set a mark when this rank's own gradients are computed, before autograd waits for those of the other ranks.

        Autograd calls queued callbacks in the order of queueing, and the hook of the loss is the first to queue one.
        """

        def queue_mark(gradient: Tensor) -> None:
            queue_after_backward(lambda: self.mark(part))

        if loss.requires_grad:
            loss.register_hook(queue_mark)

    def collect(self) -> dict[str, float]:
        """Return the seconds of each part since the last call. GPU events that have not completed count in the next call."""
        done = [span for span in self._spans if not isinstance(span[2], torch.cuda.Event) or span[2].query()]
        self._spans = self._spans[len(done) :]
        seconds = dict.fromkeys(STEP_PARTS, 0.0)
        for part, begin, end in done:
            seconds[part] += _measure_seconds(begin, end)
        return seconds

    def _make_mark(self) -> TimeMark:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _measure_seconds(begin: TimeMark, end: TimeMark) -> float:
    if isinstance(begin, torch.cuda.Event):
        assert isinstance(end, torch.cuda.Event)
        return begin.elapsed_time(end) / 1000
    assert isinstance(end, float)
    return end - begin


class StragglerMonitor:
    """Reports a straggler rank and a slow data loader, once each. All ranks pass the same numbers."""

    def __init__(self, say: Callable[[str], None], get_host: Callable[[int], str]) -> None:
        self.say, self.get_host = say, get_host
        self._slow_ranks: list[int] = []  # slowest rank of each consecutive window above the limit
        self._reported: set[str] = set()
        self._seconds = {"data": 0.0, "all": 0.0}  # of the median rank, summed over all windows

    def update(self, rank_seconds: list[dict[str, float]]) -> dict[str, float]:
        """Add a window and report findings.

        Args:
            rank_seconds: for each rank, the seconds of each part in this window.

        Returns:
            `slowest_rank`, and `slowest_excess`: its excess over the median as a fraction. Empty for one rank.
        """
        seconds = [sum(rank[part] for part in OWN_PARTS) for rank in rank_seconds]
        slowest, middle = max(range(len(seconds)), key=seconds.__getitem__), max(median(seconds), 1e-9)
        excess = seconds[slowest] / middle - 1.0
        self._slow_ranks = (
            [*self._slow_ranks, slowest] if excess > SLOW_EXCESS and set(self._slow_ranks) <= {slowest} else []
        )
        self._seconds["all"] += median(sum(rank.values()) for rank in rank_seconds)
        self._seconds["data"] += median(rank["data"] for rank in rank_seconds)
        is_warm = self._seconds["all"] > WARMUP_SECONDS
        if is_warm and len(self._slow_ranks) >= SLOW_WINDOWS and "slow" not in self._reported:
            self._reported.add("slow")
            part = max(
                OWN_PARTS, key=lambda name: rank_seconds[slowest][name] - median(rank[name] for rank in rank_seconds)
            )
            self.say(
                f"Rank {slowest} on {self.get_host(slowest)} takes {excess:.0%} longer than the median rank, most of it in "
                f"{part}; all others wait for it."
            )
        share = self._seconds["data"] / max(self._seconds["all"], 1e-9)
        if is_warm and share > DATA_WAIT_SHARE and "data" not in self._reported:
            self._reported.add("data")
            self.say(f"{share:.0%} of the time is spent waiting for data: raise data.num_workers.")
        return {"slowest_rank": float(slowest), "slowest_excess": excess} if len(rank_seconds) > 1 else {}
