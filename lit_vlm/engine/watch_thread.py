"""Watchdog: thread that detects stuck ranks, and exits the process when its main thread cannot.

A rank that hangs in a collective hangs in C++, where no exception reaches it. So each rank has a watchdog thread. It is the
heartbeat writer, and it checks three things: did its own main thread make progress within the timeout; does the next rank
still write heartbeats (a stopped process does not); and has another rank created an exit notice.
The first rank that detects a problem writes `stuck/leave.json`, which only one rank can create, and reports it on stderr.
Each rank writes its stacks and its current samples to `stuck/rank-N.txt` and exits. All ranks have exited a few seconds
after the timeout.
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
TICK = 2.0  # seconds between two checks
GRACE = 5.0  # seconds for a rank that fails for the same reason to report its own error
HELD_UP = 20.0  # seconds past the timeout without a check: C code holds the GIL, so the interpreter hangs
NUM_NAMED = 12  # maximum number of sample ids in the message; the files list all


@dataclass(frozen=True, slots=True)
class Note:
    """Notice that all ranks must exit: `stuck/leave.json`, with exit status and reason."""

    code: int
    message: str
    frozen: list[Beat]  # ranks whose process is stopped and cannot exit by itself

    @classmethod
    def read(cls, run_dir: Path) -> Note | None:
        """Read the exit notice; None if there is none or it is being written. Raise OSError on a file-system error."""
        file = run_dir / FOLDER / NOTE
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            return cls(**values | {"frozen": [Beat(**beat) for beat in values["frozen"]]})
        except (FileNotFoundError, ValueError, TypeError):
            return None

    @property
    def patience(self) -> float:
        """Seconds that other ranks wait before they exit. An exit before Slurm has answered would end the job as failed."""
        return ANSWER_SECONDS + GRACE if self.code == RESTART and own_job() else GRACE

    def announce(self, run_dir: Path) -> bool:
        """Create the notice file for all ranks.

        Returns:
            Whether this rank was the first. Only the first rank reports to the user.
        """
        folder = run_dir / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        try:
            _create(folder / NOTE, json.dumps(asdict(self), ensure_ascii=False))
        except FileExistsError:
            return False
        return True

    def leave_together(self, run_dir: Path, job: str | None = None) -> NoReturn:
        """Create the notice and exit this process. The other ranks exit when their watchdogs read the notice.

        Args:
            run_dir: run folder.
            job: Slurm job that the first rank requeues; None: no requeue.
        """
        if self.announce(run_dir):
            say(self.message)
            if job is not None:
                refusal = requeue(job)
                say(
                    f"Job {job} could not be requeued ({refusal}): submit it again."
                    if refusal
                    else f"Job {job} is requeued."
                )
        elif job is not None:
            time.sleep(self.patience)
        flush()
        os._exit(self.code)


class Watch(threading.Thread):
    """Watchdog thread of a rank (see the module). Use `start()` and `stop()`.

    Args:
        progress: progress of this rank, set by the main thread.
        run_dir: run folder.
        rank: global rank of this process.
        world_size: number of ranks.
        heartbeat_seconds: seconds between two heartbeats.
        timeout_seconds: seconds without progress after which a rank is stuck.
        failing: returns whether the main thread is ending with an exception. It then completes a save and reports the error,
            so it is not interrupted before the timeout.
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
        self._told: float | None = None  # when this rank first read the exit notice
        # time of the neighbour's last heartbeat, and when it arrived
        self._seen: tuple[float, float] = (0.0, time.monotonic())

    def run(self) -> None:
        """Write heartbeats and check the ranks until stopped."""
        last_check = time.monotonic()
        while not self._ended.is_set():
            # fd 2: the stderr of a notebook is not a file
            faulthandler.dump_traceback_later(self.limit + HELD_UP, exit=True, file=2)
            now = time.monotonic()
            if now - last_check > 5 * self.tick + 1.0:  # this process itself was stopped for a while
                self.pulse.tick()
                self._seen = (self._seen[0], now)
            last_check = now
            try:
                self._beat(now)
                self._look(now)
            except OSError as error:  # a file-system error must not end the run
                print(f"heartbeat of rank {self.rank}: {error}", file=sys.stderr)
            self._ended.wait(self.tick)

    def end(self, state: str = "left") -> None:
        """Stop the watchdog. Called by the main thread."""
        self._ended.set()
        self.join(timeout=10.0)
        faulthandler.cancel_dump_traceback_later()
        with contextlib.suppress(OSError):  # a file-system error must not end the run
            write(self.run_dir, beat_of(self.rank, self.pulse, state))

    def _beat(self, now: float) -> None:
        if now - self._last_beat >= self.seconds - 0.01:
            write(self.run_dir, beat_of(self.rank, self.pulse))
            self._last_beat = now

    def _look(self, now: float) -> None:
        if (notice := Note.read(self.run_dir)) is not None:
            self._told = self._told or now
            grace = max(notice.patience, self.limit if self.failing() else 0.0)
            if notice.code == STUCK or now - self._told > grace:
                self.leave(notice)
            return
        is_stalled = self.pulse.work.doing not in UNLIMITED and now - self.pulse.moved > self.limit
        is_frozen = self.world_size > 1 and self._neighbour_is_frozen(now)
        # a debugger may be in use
        if not (is_stalled or is_frozen) or (self.world_size == 1 and sys.stdin and sys.stdin.isatty()):
            return
        heartbeats = read_beats(self.run_dir, range(self.world_size))
        if is_frozen or not any(other.rank != self.rank and _goes_on(other, self.limit) for other in heartbeats):
            self.give_up(heartbeats)

    def give_up(self, beats: list[Beat] | None = None) -> None:
        """Report the stuck ranks and exit this process. The main thread calls it too, when a collective has timed out."""
        write(self.run_dir, beat_of(self.rank, self.pulse))
        beats = read_beats(self.run_dir, range(self.world_size)) if beats is None else beats
        notice = verdict(beats, self.limit, self.run_dir)
        if notice.announce(self.run_dir):
            say(notice.message)
        self.leave(Note.read(self.run_dir) or notice)

    def _neighbour_is_frozen(self, now: float) -> bool:
        heartbeat = read_beat(self.run_dir, self.neighbour)
        if heartbeat is None or heartbeat.state != "alive" or heartbeat.beat != self._seen[0]:
            self._seen = (heartbeat.beat if heartbeat else 0.0, now)
            return False
        return now - self._seen[1] > self.limit

    def leave(self, note: Note) -> None:
        """Exit this process with the status of the notice. If ranks are stuck, write the stacks first."""
        try:
            if note.code == STUCK:
                self._dump()
            write(self.run_dir, beat_of(self.rank, self.pulse, "stuck" if note.code == STUCK else "left"))
            if note.code == STUCK and self.world_size > 1:
                # an exit breaks connections: other ranks must dump their stacks before
                time.sleep(1.5 * self.tick)
            for heartbeat in note.frozen:
                _kill(heartbeat)
            flush()
        finally:
            os._exit(note.code)

    def _dump(self) -> None:
        state, folder = self.pulse.work, self.run_dir / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"rank-{self.rank}.txt").open("w", encoding="utf-8") as file:
            file.write(
                f"rank {self.rank}, host {socket.gethostname()}, pid {os.getpid()}\n{_where(beat_of(self.rank, self.pulse))}\n"
            )
            file.write(f"samples: {', '.join(state.samples) or 'none'}\n\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
            file.flush()
            os.fsync(file.fileno())


def _create(path: Path, text: str) -> None:
    """Create a file atomically. Raise FileExistsError if another process was first."""
    draft = draft_of(path)
    draft.write_text(text, encoding="utf-8")
    try:
        os.link(draft, path)
    except FileExistsError:
        # 2 links: the file is ours, as NFS repeats a request after a lost answer
        if draft.stat().st_nlink == 1:
            raise
    except OSError:  # file system without hard links
        with path.open("x", encoding="utf-8") as stream:
            stream.write(text)
    finally:
        draft.unlink()


def verdict(beats: list[Beat], limit: float, run_dir: Path) -> Note:
    """Make the exit notice of a stuck run. It names the ranks without recent heartbeats, else those with the least progress.

    Args:
        heartbeats: last heartbeats of all ranks.
        timeout_seconds: seconds without progress, for the message and for the age of a stale heartbeat.
        run_dir: run folder, for the message.
    """
    newest = max((other.beat for other in beats), default=0.0)
    alive = [other for other in beats if other.state == "alive"]
    frozen = [other for other in alive if newest - other.beat > limit / 2]
    behind = [other for other in alive if other.place == min(any_other.place for any_other in alive)]
    if frozen:
        finding = "; ".join(
            f"{_who(other)} does not answer any more: it is stopped or dead. It was {_where(other)}" for other in frozen
        )
    elif len(alive) == 1 or len(behind) < len(alive):
        finding = "; ".join(f"{_who(other)} does not get on, {_where(other)}" for other in behind)
    else:
        finding = (
            f"all ranks are at the same place and wait for each other, {_where(behind[0])}"
            if behind
            else "no rank beats"
        )
    message = (
        f"Stuck: {finding}. Nothing went on for {limit:,.0f} s (trainer.timeout_minutes), so all ranks leave with exit "
        f"status {STUCK}. Their stacks and samples are in {run_dir / FOLDER}. The same command goes on from the last "
        "checkpoint."
    )
    return Note(STUCK, message, frozen)


def _goes_on(beat: Beat, limit: float) -> bool:
    """Return whether the others rightly wait for this rank: it saves, exports or generates, with recent progress."""
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
    """Kill a stopped process, which cannot exit by itself, if it wrote the heartbeat: same host, pid and start time."""
    here = beat.host == socket.gethostname() and beat.pid != os.getpid()
    if here and beat.started and started_at(beat.pid) == beat.started:
        os.kill(beat.pid, signal.SIGKILL)


def say(text: str) -> None:
    """Write a line to stderr without buffering and without locks."""
    os.write(2, f"{text}\n".encode())  # print() may need a lock that the main thread holds


def flush() -> None:
    """Flush stdout and stderr, with a timeout in case the main thread holds the lock of a stream."""

    def both() -> None:
        sys.stdout.flush()
        sys.stderr.flush()

    flusher = threading.Thread(target=both, daemon=True)
    flusher.start()
    flusher.join(timeout=1.0)
