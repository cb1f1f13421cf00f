"""Progress of this rank, and heartbeats of all ranks in the run folder: `heartbeat/rank-N.json`.

The main thread sets its activity. The watchdog thread (`watch_thread.py`) writes the heartbeat and checks the timeout.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import lightning as L

from lit_vlm.files import write_json

Item = TypeVar("Item")

FOLDER = "heartbeat"


class Doing(StrEnum):
    """Activity of a rank, in the order of a micro-step. Of two ranks in the same micro-step, the earlier one blocks the other."""

    starting = "starting"
    data = "waiting for data"
    forward = "in the forward pass"
    backward = "in the backward pass"
    communication = "waiting for the other ranks"
    optimizer = "in the optimizer"
    validation = "in validation"
    saving = "saving"
    exporting = "exporting the model"
    generating = "generating samples"
    finishing = "finishing"


ORDER = list(Doing)
# loading may take long; collectives in it have the timeout of the process group
UNLIMITED = (Doing.starting,)
AWAITED = (Doing.saving, Doing.exporting, Doing.generating, Doing.finishing)  # others wait meanwhile


@dataclass(frozen=True, slots=True)
class Work:
    """Current state of a rank. `step` counts from 0 in the plan, `micro_step` from 0 within the step."""

    doing: Doing = Doing.starting
    step: int = -1
    micro_step: int = 0
    samples: tuple[str, ...] = ()
    since: float = field(default_factory=time.time)


class Pulse:
    """Progress of this rank: set by the main thread, read by the watchdog thread.

    `state` is replaced as a whole, so no lock is needed.
    """

    def __init__(self) -> None:
        self.work = Work()
        self.moved = time.monotonic()  # monotonic time of the last progress

    def turn_to(self, doing: Doing, **changes: object) -> None:
        """Set the activity, and further fields of `RankState`. It counts as progress."""
        self.work = replace(self.work, doing=doing, since=time.time(), **changes)  # type: ignore[arg-type]
        self.moved = time.monotonic()

    def tick(self) -> None:
        """Mark progress within the same activity, e.g. a validation batch or a written file."""
        self.moved = time.monotonic()

    def along(self, items: Iterable[Item]) -> Iterator[Item]:
        """Iterate over the items, and mark progress at each one."""
        for item in items:
            self.tick()
            yield item

    def with_each(self, call: Callable[..., Item]) -> Callable[..., Item]:
        """Wrap a function so that each call marks progress."""

        def called(*arguments: Any) -> Item:
            self.tick()
            return call(*arguments)

        return called

    @contextmanager
    def during(self, doing: Doing) -> Iterator[None]:
        """Set the activity inside the context. Call `mark_progress()` if it may take longer than the timeout of the ranks."""
        previous = self.work.doing
        self.turn_to(doing)
        try:
            yield
        finally:
            self.turn_to(previous)


@dataclass(frozen=True, slots=True)
class Beat:
    """Heartbeat of a rank: content of `heartbeat/rank-N.json`."""

    rank: int
    host: str
    pid: int
    started: int  # start time of the process in kernel ticks since boot, 0 if unknown; detects a reused pid
    state: str  # "alive", or how the rank ended: "left", "failed", "stuck"
    doing: str
    step: int
    micro_step: int
    since: float  # start of the activity, in seconds since 1970, like the next two
    moved: float  # time of the last progress
    beat: float  # time at which this heartbeat was written
    samples: list[str]

    @property
    def place(self) -> tuple[int, int, int]:
        """Position of the rank in training: (step, micro-step, activity), for ordering ranks."""
        return self.step, self.micro_step, ORDER.index(Doing(self.doing))


def beat_of(rank: int, pulse: Pulse, state: str = "alive") -> Beat:
    """Make the heartbeat of this process from its progress."""
    rank_state, now, pid = pulse.work, time.time(), os.getpid()
    fields = asdict(rank_state) | {"doing": str(rank_state.doing), "samples": list(rank_state.samples)}
    fields |= {"moved": now - (time.monotonic() - pulse.moved), "beat": now}
    return Beat(rank=rank, host=socket.gethostname(), pid=pid, started=started_at(pid), state=state, **fields)


def write_beat(run_dir: Path, beat: Beat) -> None:
    """Write the heartbeat file atomically."""
    folder = run_dir / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / f"rank-{beat.rank}.json", asdict(beat), durable=False)


def read_beat(run_dir: Path, rank: int) -> Beat | None:
    """Read the heartbeat of a rank; None if there is none or it is damaged."""
    try:
        return Beat(**json.loads((run_dir / FOLDER / f"rank-{rank}.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def read_beats(run_dir: Path, ranks: Sequence[int]) -> list[Beat]:
    """Read the heartbeats of the given ranks, without missing ones."""
    return [heartbeat for rank in ranks if (heartbeat := read_beat(run_dir, rank)) is not None]


def started_at(pid: int) -> int:
    """Read the start time of a process in kernel ticks (field 22 of /proc/PID/stat); 0 if unknown."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return 0


_known: WeakKeyDictionary[L.Trainer, Pulse] = WeakKeyDictionary()


def pulse_of(trainer: L.Trainer) -> Pulse:
    """Return the progress of this trainer on this rank; create it at the first call."""
    return _known.setdefault(trainer, Pulse())
