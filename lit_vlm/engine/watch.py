"""What this rank is doing, and what the others say of themselves in the run's folder: `heartbeat/rank-N.json`.

The main thread says what it turns to; a thread of its own (`watch_thread.py`) writes it down and looks at the clock.
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
    """In the order of a micro-step: of two ranks in the same one, the one that is less far holds the other up."""

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
UNLIMITED = (Doing.starting,)  # a model may load for long; what waits for others there has the process group's limit
AWAITED = (Doing.saving, Doing.exporting, Doing.generating, Doing.finishing)  # others wait while one rank does these


@dataclass(frozen=True, slots=True)
class Work:
    """What a rank does now. `step` is that of the plan and counts from 0, `micro_step` from 0 within it."""

    doing: Doing = Doing.starting
    step: int = -1
    micro_step: int = 0
    samples: tuple[str, ...] = ()
    since: float = field(default_factory=time.time)


class Pulse:
    """This rank's side: the main thread sets it, the watching thread reads it. Replaced whole, so there is no lock."""

    def __init__(self) -> None:
        self.work = Work()
        self.moved = time.monotonic()  # when something went on

    def turn_to(self, doing: Doing, **changes: object) -> None:
        self.work = replace(self.work, doing=doing, since=time.time(), **changes)  # type: ignore[arg-type]
        self.moved = time.monotonic()

    def tick(self) -> None:
        """The same work, and it goes on: a batch of validation, a file that was written."""
        self.moved = time.monotonic()

    def along(self, items: Iterable[Item]) -> Iterator[Item]:
        """The same items; each that is taken is something that goes on."""
        for item in items:
            self.tick()
            yield item

    def with_each(self, call: Callable[..., Item]) -> Callable[..., Item]:
        """The same function; each call of it is something that goes on."""

        def called(*arguments: Any) -> Item:
            self.tick()
            return call(*arguments)

        return called

    @contextmanager
    def during(self, doing: Doing) -> Iterator[None]:
        """While this lasts; say `tick()` in between when it may take longer than the ranks' time limit."""
        before = self.work.doing
        self.turn_to(doing)
        try:
            yield
        finally:
            self.turn_to(before)


@dataclass(frozen=True, slots=True)
class Beat:
    """What a rank last wrote of itself."""

    rank: int
    host: str
    pid: int
    started: (
        int  # of the process, in the kernel's ticks since boot; 0 where that is not known. Tells a number used again
    )
    state: str  # "alive", or how it ended: "left", "failed", "stuck"
    doing: str
    step: int
    micro_step: int
    since: float  # seconds since 1970, like the next two
    moved: float  # when something last went on
    beat: float  # when this was written
    samples: list[str]

    @property
    def place(self) -> tuple[int, int, int]:
        """How far it is: sorts the ranks of a run."""
        return self.step, self.micro_step, ORDER.index(Doing(self.doing))


def beat_of(rank: int, pulse: Pulse, state: str = "alive") -> Beat:
    work, now, pid = pulse.work, time.time(), os.getpid()
    facts = asdict(work) | {"doing": str(work.doing), "samples": list(work.samples)}
    facts |= {"moved": now - (time.monotonic() - pulse.moved), "beat": now}
    return Beat(rank=rank, host=socket.gethostname(), pid=pid, started=started_at(pid), state=state, **facts)


def write_beat(run_dir: Path, beat: Beat) -> None:
    """Whole or not at all."""
    folder = run_dir / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / f"rank-{beat.rank}.json", asdict(beat), durable=False)


def read_beat(run_dir: Path, rank: int) -> Beat | None:
    try:
        return Beat(**json.loads((run_dir / FOLDER / f"rank-{rank}.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def read_beats(run_dir: Path, ranks: Sequence[int]) -> list[Beat]:
    return [beat for rank in ranks if (beat := read_beat(run_dir, rank)) is not None]


def started_at(pid: int) -> int:
    """Field 22 of /proc/PID/stat; 0 where there is none."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return 0


_known: WeakKeyDictionary[L.Trainer, Pulse] = WeakKeyDictionary()


def pulse_of(trainer: L.Trainer) -> Pulse:
    """The one of this trainer, on this rank."""
    return _known.setdefault(trainer, Pulse())
