"""The thread that notices when ranks no longer get on, and ends the process when its main thread cannot.

A rank that hangs in a collective does so in C++, where no exception reaches it. So each rank has a thread that writes
its heartbeat, and looks at three things: whether its own main thread got on within the time limit; whether the rank next
to it still beats (a process that was stopped does not); and whether another rank has said that all are to leave.
The first to notice writes `stuck/leave.json`, which only one rank can create, and tells it on stderr; every rank writes
its stacks and the samples in work to `stuck/rank-N.txt` and leaves. All are gone within the limit and a few seconds.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

from lit_vlm.engine.exits import RESTART, STUCK
from lit_vlm.engine.slurm import ANSWER_SECONDS, own_job, requeue
from lit_vlm.engine.watch import AWAITED, UNLIMITED, Beat, Doing, Pulse, beat_of, read_beat, read_beats, started_at
from lit_vlm.engine.watch import write_beat as write
from lit_vlm.files import draft_of

FOLDER, NOTE = "stuck", "leave.json"
TICK = 2.0  # seconds between two looks
GRACE = 5.0  # for a rank that is about to fail alike, and has something to say about it
HELD_UP = 20.0  # and this much past a look that is due the interpreter itself hangs: C code holds its lock
NUM_NAMED = 12  # samples in the message; the files have all


@dataclass(frozen=True, slots=True)
class Note:
    """Why all ranks leave, and with which code."""

    code: int
    message: str
    frozen: list[Beat]  # ranks that cannot leave by themselves

    @classmethod
    def read(cls, run_dir: Path) -> Note | None:
        """None where there is none, or where it is being written. OSError: the file system stumbles."""
        file = run_dir / FOLDER / NOTE
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            return cls(**values | {"frozen": [Beat(**beat) for beat in values["frozen"]]})
        except (FileNotFoundError, ValueError, TypeError):
            return None

    @property
    def patience(self) -> float:
        """Seconds that ranks who read it stay. Who leaves before Slurm has answered ends the job as a failed one."""
        return ANSWER_SECONDS + GRACE if self.code == RESTART and own_job() else GRACE

    def announce(self, run_dir: Path) -> bool:
        """Put it there for all ranks. Whether this rank was the first; only that one tells the user."""
        folder = run_dir / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        try:
            _create(folder / NOTE, json.dumps(asdict(self), ensure_ascii=False))
        except FileExistsError:
            return False
        return True

    def leave_together(self, run_dir: Path, job: str | None = None) -> NoReturn:
        """This process ends here, and the others when their watches read the note.

        Args:
            job: of Slurm, that the first one puts back into the queue.
        """
        if self.announce(run_dir):
            say(self.message)
            if job is not None:
                refused = requeue(job)
                say(
                    f"Job {job} could not be requeued ({refused}): submit it again."
                    if refused
                    else f"Job {job} is requeued."
                )
        elif job is not None:
            time.sleep(self.patience)
        flush()
        os._exit(self.code)


class Watch(threading.Thread):
    """See the module. `start()` and `end()`.

    Args:
        seconds: between two heartbeats.
        limit: seconds without anything going on, after which ranks are stuck.
        failing: whether this rank's main thread is ending with an exception: it saves what was begun, and has something to
            say. It is not cut short before the limit.
    """

    def __init__(
        self,
        pulse: Pulse,
        run_dir: Path,
        rank: int,
        world_size: int,
        *,
        seconds: float,
        limit: float,
        failing: Callable[[], bool] = lambda: False,
    ) -> None:
        super().__init__(name="watch", daemon=True)
        self.pulse, self.run_dir, self.rank, self.world_size = pulse, run_dir, rank, world_size
        self.limit, self.seconds, self.failing = limit, min(seconds, limit / 4), failing
        self.tick = min(TICK, self.seconds)
        self.neighbour = (rank + 1) % world_size
        self._ended = threading.Event()
        self._last_beat = 0.0
        self._told: float | None = None  # when this rank first read that all are to leave
        self._seen: tuple[float, float] = (0.0, time.monotonic())  # the neighbour's last beat, and when it was new here

    def run(self) -> None:
        looked = time.monotonic()
        while not self._ended.is_set():
            faulthandler.dump_traceback_later(self.limit + HELD_UP, exit=True, file=2)  # a notebook's stderr is no file
            now = time.monotonic()
            if now - looked > 5 * self.tick + 1.0:  # this process itself was stopped for a while, and goes on
                self.pulse.tick()
                self._seen = (self._seen[0], now)
            looked = now
            try:
                self._beat(now)
                self._look(now)
            except OSError as error:  # a file system that stumbles is no reason to end a run
                print(f"heartbeat of rank {self.rank}: {error}", file=sys.stderr)
            self._ended.wait(self.tick)

    def end(self, state: str = "left") -> None:
        """No more is watched. From the main thread."""
        self._ended.set()
        self.join(timeout=10.0)
        faulthandler.cancel_dump_traceback_later()
        with contextlib.suppress(OSError):  # the run itself is what counts
            write(self.run_dir, beat_of(self.rank, self.pulse, state))

    def _beat(self, now: float) -> None:
        if now - self._last_beat >= self.seconds - 0.01:
            write(self.run_dir, beat_of(self.rank, self.pulse))
            self._last_beat = now

    def _look(self, now: float) -> None:
        if (note := Note.read(self.run_dir)) is not None:
            self._told = self._told or now
            patience = max(note.patience, self.limit if self.failing() else 0.0)
            if note.code == STUCK or now - self._told > patience:
                self.leave(note)
            return
        quiet = self.pulse.work.doing not in UNLIMITED and now - self.pulse.moved > self.limit
        frozen = self.world_size > 1 and self._neighbour_is_frozen(now)
        if not (quiet or frozen) or (self.world_size == 1 and sys.stdin and sys.stdin.isatty()):  # a person debugs
            return
        beats = read_beats(self.run_dir, range(self.world_size))
        if frozen or not any(beat.rank != self.rank and _goes_on(beat, self.limit) for beat in beats):
            self.give_up(beats)

    def give_up(self, beats: list[Beat] | None = None) -> None:
        """The ranks are stuck: this process ends here. Also for a main thread whose collective ran into its time limit."""
        write(self.run_dir, beat_of(self.rank, self.pulse))
        beats = read_beats(self.run_dir, range(self.world_size)) if beats is None else beats
        note = verdict(beats, self.limit, self.run_dir)
        if note.announce(self.run_dir):
            say(note.message)
        self.leave(Note.read(self.run_dir) or note)

    def _neighbour_is_frozen(self, now: float) -> bool:
        beat = read_beat(self.run_dir, self.neighbour)
        if beat is None or beat.state != "alive" or beat.beat != self._seen[0]:
            self._seen = (beat.beat if beat else 0.0, now)
            return False
        return now - self._seen[1] > self.limit

    def leave(self, note: Note) -> None:
        """This process ends here."""
        try:
            if note.code == STUCK:
                self._dump()
            write(self.run_dir, beat_of(self.rank, self.pulse, "stuck" if note.code == STUCK else "left"))
            if note.code == STUCK and self.world_size > 1:
                time.sleep(1.5 * self.tick)  # or the others find their connections broken, and their stacks are of that
            for beat in note.frozen:
                _kill(beat)
            flush()
        finally:
            os._exit(note.code)

    def _dump(self) -> None:
        work, folder = self.pulse.work, self.run_dir / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"rank-{self.rank}.txt").open("w", encoding="utf-8") as file:
            file.write(
                f"rank {self.rank}, host {socket.gethostname()}, pid {os.getpid()}\n{_where(beat_of(self.rank, self.pulse))}\n"
            )
            file.write(f"samples: {', '.join(work.samples) or 'none'}\n\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
            file.flush()
            os.fsync(file.fileno())


def _create(path: Path, text: str) -> None:
    """A file that is whole at once. FileExistsError where another process was first."""
    draft = draft_of(path)
    draft.write_text(text, encoding="utf-8")
    try:
        os.link(draft, path)
    except FileExistsError:
        if draft.stat().st_nlink == 1:  # else it is ours: NFS asks twice where the first answer was lost
            raise
    except OSError:  # a file system without links
        with path.open("x", encoding="utf-8") as stream:
            stream.write(text)
    finally:
        draft.unlink()


def verdict(beats: list[Beat], limit: float, run_dir: Path) -> Note:
    """Who holds the others up: ranks that no longer beat, else the one that is least far."""
    newest = max((beat.beat for beat in beats), default=0.0)
    alive = [beat for beat in beats if beat.state == "alive"]
    frozen = [beat for beat in alive if newest - beat.beat > limit / 2]
    behind = [beat for beat in alive if beat.place == min(other.place for other in alive)]
    if frozen:
        whose = "; ".join(
            f"{_who(beat)} does not answer any more: it is stopped or dead. It was {_where(beat)}" for beat in frozen
        )
    elif len(alive) == 1 or len(behind) < len(alive):
        whose = "; ".join(f"{_who(beat)} does not get on, {_where(beat)}" for beat in behind)
    else:
        whose = (
            f"all ranks are at the same place and wait for each other, {_where(behind[0])}"
            if behind
            else "no rank beats"
        )
    message = (
        f"Stuck: {whose}. Nothing went on for {limit:,.0f} s (trainer.timeout_minutes), so all ranks leave with exit "
        f"status {STUCK}. Their stacks and samples are in {run_dir / FOLDER}. The same command goes on from the last "
        "checkpoint."
    )
    return Note(STUCK, message, frozen)


def _goes_on(beat: Beat, limit: float) -> bool:
    """A rank that the others rightly wait for: it saves or exports, and got on within the limit."""
    recent = time.time() - beat.beat < limit / 2
    return beat.state == "alive" and recent and Doing(beat.doing) in AWAITED and time.time() - beat.moved < limit


def _who(beat: Beat) -> str:
    return f"rank {beat.rank} on {beat.host} (pid {beat.pid})"


def _where(beat: Beat) -> str:
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(beat.since))
    step = f" of step {beat.step + 1:,}, micro-batch {beat.micro_step + 1}" if beat.step >= 0 else ""
    more = f" and {len(beat.samples) - NUM_NAMED:,} more" if len(beat.samples) > NUM_NAMED else ""
    samples = f", with the samples {', '.join(beat.samples[:NUM_NAMED])}{more}" if beat.samples else ""
    return f"{beat.doing}{step} since {since}{samples}"


def _kill(beat: Beat) -> None:
    """A stopped process cannot leave by itself. Only the one that wrote the heartbeat: same host, number and birth."""
    here = beat.host == socket.gethostname() and beat.pid != os.getpid()
    if here and beat.started and started_at(beat.pid) == beat.started:
        os.kill(beat.pid, signal.SIGKILL)


def say(text: str) -> None:
    os.write(2, f"{text}\n".encode())  # print() may wait for a lock that the main thread holds


def flush() -> None:
    """What was printed is out, unless the main thread holds a stream's lock for ever."""

    def both() -> None:
        sys.stdout.flush()
        sys.stderr.flush()

    flusher = threading.Thread(target=both, daemon=True)
    flusher.start()
    flusher.join(timeout=1.0)
