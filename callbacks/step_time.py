"""Where an optimizer step's time goes on this rank, and which rank the others wait for."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor

PARTS = ("data", "forward", "backward", "communication", "optimizer")
OWN = ("data", "forward", "backward")  # in which no rank waits for another, under DDP
SLOW, WINDOWS = 0.15, 3  # over the median in so many windows in a row: it is told
WAITS = 0.10  # share of the time: it is told
SETTLED = 30.0  # seconds, before which nothing is told: the first steps are slow for reasons of their own

Mark = float | torch.cuda.Event


class StepTime:
    """Time between marks, by part: of the GPU's own timeline by events, which make nobody wait, or of the host's clock.

    data: from the end of a micro-step until the next begins; on a GPU what is exposed of it, for the host runs ahead.
    backward: until the last gradient of this rank is computed, with what is sent meanwhile.
    communication: from there until all gradients are summed over the ranks, and the ranks' exchange before the update.
        What DDP and FSDP2 send behind the computation is not in it; what ZeRO-3 and FSDP2 gather in front of a layer is
        in forward and backward.
    optimizer: clipping, update, logging.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._last: Mark | None = None
        self._spans: list[tuple[str, Mark, Mark]] = []

    def mark(self, part: str) -> None:
        """What went on since the last mark was this part."""
        now = self._now()
        if self._last is not None:
            self._spans.append((part, self._last, now))
        self._last = now

    def pause(self) -> None:
        """What goes on until the next mark is none of them."""
        self._last = None

    def mark_at_end_of(self, loss: Tensor, part: str) -> None:
        """A mark once this rank's own gradients are there, before the engine waits for those of the other ranks: autograd
        calls what is queued in the order in which it was, and the loss's hook is the first to queue."""

        def queue(gradient: Tensor) -> None:
            engine: Any = torch.autograd.Variable._execution_engine
            engine.queue_callback(lambda: self.mark(part))

        if loss.requires_grad:
            loss.register_hook(queue)

    def collect(self) -> dict[str, float]:
        """Seconds of each part since the last call. A GPU's marks that lie ahead of it are left for the next one."""
        done = [span for span in self._spans if not isinstance(span[2], torch.cuda.Event) or span[2].query()]
        self._spans = self._spans[len(done) :]
        seconds = dict.fromkeys(PARTS, 0.0)
        for part, begin, end in done:
            seconds[part] += _between(begin, end)
        return seconds

    def _now(self) -> Mark:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _between(begin: Mark, end: Mark) -> float:
    if isinstance(begin, torch.cuda.Event):
        assert isinstance(end, torch.cuda.Event)
        return begin.elapsed_time(end) / 1000
    assert isinstance(end, float)
    return end - begin


class Watchman:
    """Tells once which rank holds the others up, and that the loader does. All ranks give it the same numbers."""

    def __init__(self, say: Callable[[str], None], host_of: Callable[[int], str]) -> None:
        self.say, self.host_of = say, host_of
        self._slow: list[int] = []  # the slowest rank of each window, while it is too slow
        self._told: set[str] = set()
        self._seconds = {"data": 0.0, "all": 0.0}  # of the median rank so far

    def look(self, parts: list[dict[str, float]]) -> dict[str, float]:
        """`parts` of each rank in this window. The slowest rank, and its excess over the median as a share."""
        own = [sum(rank[part] for part in OWN) for rank in parts]
        slowest, middle = max(range(len(own)), key=own.__getitem__), max(median(own), 1e-9)
        excess = own[slowest] / middle - 1.0
        self._slow = [*self._slow, slowest] if excess > SLOW and set(self._slow) <= {slowest} else []
        self._seconds["all"] += median(sum(rank.values()) for rank in parts)
        self._seconds["data"] += median(rank["data"] for rank in parts)
        settled = self._seconds["all"] > SETTLED
        if settled and len(self._slow) >= WINDOWS and "slow" not in self._told:
            self._told.add("slow")
            part = max(OWN, key=lambda name: parts[slowest][name] - median(rank[name] for rank in parts))
            self.say(
                f"Rank {slowest} on {self.host_of(slowest)} takes {excess:.0%} longer than the median rank, most of it in "
                f"{part}; all others wait for it."
            )
        share = self._seconds["data"] / max(self._seconds["all"], 1e-9)
        if settled and share > WAITS and "data" not in self._told:
            self._told.add("data")
            self.say(f"{share:.0%} of the time is spent waiting for data: raise data.num_workers.")
        return {"slowest_rank": float(slowest), "slowest_excess": excess} if len(parts) > 1 else {}
