"""Progress of this rank, and heartbeats of all ranks in the run folder: `heartbeat/rank-N.json`.

The main thread sets its activity. The watchdog thread (`watch_thread.py`) writes the heartbeat and checks the timeout.
"""

from __future__ import annotations

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

from lit_vlm.files import read_json_or_none, write_json

Item = TypeVar("Item")

HEARTBEAT_FOLDER = "heartbeat"


class Activity(StrEnum):
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


ACTIVITY_ORDER = list(Activity)
# loading may take long; collectives in it have the timeout of the process group
UNLIMITED_ACTIVITIES = (Activity.starting,)
AWAITED_ACTIVITIES = (
    Activity.saving,
    Activity.exporting,
    Activity.generating,
    Activity.finishing,
)  # others wait meanwhile


@dataclass(frozen=True, slots=True)
class RankState:
    """Current state of a rank. `step` counts from 0 in the plan, `micro_step` from 0 within the step."""

    doing: Activity = Activity.starting
    step: int = -1
    micro_step: int = 0
    samples: tuple[str, ...] = ()
    since: float = field(default_factory=time.time)


class Progress:
    """Progress of this rank: set by the main thread, read by the watchdog thread.

    `state` is replaced as a whole, so no lock is needed.
    """

    def __init__(self) -> None:
        self.state = RankState()
        self.last_progress = time.monotonic()  # monotonic time of the last progress

    def set_activity(self, activity: Activity, **changes: object) -> None:
        """Set the activity, and further fields of `RankState`. It counts as progress."""
        self.state = replace(self.state, doing=activity, since=time.time(), **changes)  # type: ignore[arg-type]
        self.last_progress = time.monotonic()

    def mark_progress(self) -> None:
        """Mark progress within the same activity, e.g. a validation batch or a written file."""
        self.last_progress = time.monotonic()

    def iterate(self, items: Iterable[Item]) -> Iterator[Item]:
        """Iterate over the items, and mark progress at each one."""
        for item in items:
            self.mark_progress()
            yield item

    def wrap(self, function: Callable[..., Item]) -> Callable[..., Item]:
        """Wrap a function so that each call marks progress."""

        def call_and_mark(*arguments: Any) -> Item:
            self.mark_progress()
            return function(*arguments)

        return call_and_mark

    @contextmanager
    def use_activity(self, activity: Activity) -> Iterator[None]:
        """Set the activity inside the context. Call `mark_progress()` if it may take longer than the timeout of the ranks."""
        previous = self.state.doing
        self.set_activity(activity)
        try:
            yield
        finally:
            self.set_activity(previous)


@dataclass(frozen=True, slots=True)
class RankHeartbeat:
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
    def position(self) -> tuple[int, int, int]:
        """Position of the rank in training: (step, micro-step, activity), for ordering ranks."""
        return self.step, self.micro_step, ACTIVITY_ORDER.index(Activity(self.doing))


def make_heartbeat(rank: int, progress: Progress, state: str = "alive") -> RankHeartbeat:
    """Make the heartbeat of this process from its progress."""
    rank_state, now, pid = progress.state, time.time(), os.getpid()
    fields = asdict(rank_state) | {"doing": str(rank_state.doing), "samples": list(rank_state.samples)}
    fields |= {"moved": now - (time.monotonic() - progress.last_progress), "beat": now}
    return RankHeartbeat(
        rank=rank, host=socket.gethostname(), pid=pid, started=read_start_time(pid), state=state, **fields
    )


def write_heartbeat(run_dir: Path, heartbeat: RankHeartbeat) -> None:
    """Write the heartbeat file atomically."""
    folder = run_dir / HEARTBEAT_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / f"rank-{heartbeat.rank}.json", asdict(heartbeat), durable=False)


def read_heartbeat(run_dir: Path, rank: int) -> RankHeartbeat | None:
    """Read the heartbeat of a rank; None if there is none or it is damaged."""
    try:
        return RankHeartbeat(**read_json_or_none(run_dir / HEARTBEAT_FOLDER / f"rank-{rank}.json"))
    except TypeError:
        return None


def read_heartbeats(run_dir: Path, ranks: Sequence[int]) -> list[RankHeartbeat]:
    """Read the heartbeats of the given ranks, without missing ones."""
    return [heartbeat for rank in ranks if (heartbeat := read_heartbeat(run_dir, rank)) is not None]


def read_start_time(pid: int) -> int:
    """Read the start time of a process in kernel ticks (field 22 of /proc/PID/stat); 0 if unknown."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return 0


_progress_by_trainer: WeakKeyDictionary[L.Trainer, Progress] = WeakKeyDictionary()


def get_progress(trainer: L.Trainer) -> Progress:
    """Return the progress of this trainer on this rank; create it at the first call."""
    return _progress_by_trainer.setdefault(trainer, Progress())
