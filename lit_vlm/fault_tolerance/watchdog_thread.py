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

from lit_vlm.cluster.slurm import ANSWER_SECONDS, get_own_job, requeue
from lit_vlm.fault_tolerance.exit_status import RESTART, STUCK
from lit_vlm.fault_tolerance.watchdog import (
    AWAITED_ACTIVITIES,
    UNLIMITED_ACTIVITIES,
    Activity,
    Progress,
    RankHeartbeat,
    make_heartbeat,
    read_heartbeat,
    read_heartbeats,
    read_start_time,
)
from lit_vlm.fault_tolerance.watchdog import write_heartbeat as write
from lit_vlm.files import create_file

STUCK_FOLDER, EXIT_NOTICE_FILE = "stuck", "leave.json"
CHECK_SECONDS = 2.0  # seconds between two checks
GRACE_SECONDS = 5.0  # seconds for a rank that fails for the same reason to report its own error
INTERPRETER_HANG_SECONDS = (
    20.0  # seconds past the timeout without a check: C code holds the GIL, so the interpreter hangs
)
MAX_LISTED_SAMPLES = 12  # maximum number of sample ids in the message; the files list all


@dataclass(frozen=True, slots=True)
class ExitNotice:
    """Notice that all ranks must exit: `stuck/leave.json`, with exit status and reason."""

    code: int
    message: str
    frozen: list[RankHeartbeat]  # ranks whose process is stopped and cannot exit by itself

    @classmethod
    def read(cls, run_dir: Path) -> ExitNotice | None:
        """Read the exit notice; None if there is none or it is being written. Raise OSError on a file-system error."""
        file = run_dir / STUCK_FOLDER / EXIT_NOTICE_FILE
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            return cls(**values | {"frozen": [RankHeartbeat(**beat) for beat in values["frozen"]]})
        except (FileNotFoundError, ValueError, TypeError):
            return None

    @property
    def grace_seconds(self) -> float:
        """Seconds that other ranks wait before they exit. An exit before Slurm has answered would end the job as failed."""
        return ANSWER_SECONDS + GRACE_SECONDS if self.code == RESTART and get_own_job() else GRACE_SECONDS

    def create_file(self, run_dir: Path) -> bool:
        """Create the notice file for all ranks.

        Returns:
            Whether this rank was the first. Only the first rank reports to the user.
        """
        folder = run_dir / STUCK_FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        try:
            create_file(folder / EXIT_NOTICE_FILE, json.dumps(asdict(self), ensure_ascii=False))
        except FileExistsError:
            return False
        return True

    def stop_all_ranks(self, run_dir: Path, job: str | None = None) -> NoReturn:
        """Create the notice and exit this process. The other ranks exit when their watchdogs read the notice.

        Args:
            run_dir: run folder.
            job: Slurm job that the first rank requeues; None: no requeue.
        """
        if self.create_file(run_dir):
            write_to_stderr(self.message)
            if job is not None:
                refusal = requeue(job)
                write_to_stderr(
                    f"Job {job} could not be requeued ({refusal}): submit it again."
                    if refusal
                    else f"Job {job} is requeued."
                )
        elif job is not None:
            time.sleep(self.grace_seconds)
        flush_streams()
        os._exit(self.code)


class Watchdog(threading.Thread):
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
        progress: Progress,
        run_dir: Path,
        rank: int,
        world_size: int,
        *,
        heartbeat_seconds: float,
        timeout_seconds: float,
        failing: Callable[[], bool] = lambda: False,
    ) -> None:
        super().__init__(name="watch", daemon=True)
        self.progress, self.run_dir, self.rank, self.world_size = progress, run_dir, rank, world_size
        self.timeout_seconds, self.heartbeat_seconds, self.failing = (
            timeout_seconds,
            min(heartbeat_seconds, timeout_seconds / 4),
            failing,
        )
        self.check_seconds = min(CHECK_SECONDS, self.heartbeat_seconds)
        self.neighbour = (rank + 1) % world_size
        self._stopped = threading.Event()
        self._last_heartbeat = 0.0
        self._notice_time: float | None = None  # when this rank first read the exit notice
        # time of the neighbour's last heartbeat, and when it arrived
        self._neighbour_heartbeat: tuple[float, float] = (0.0, time.monotonic())

    def run(self) -> None:
        """Write heartbeats and check the ranks until stopped."""
        last_check = time.monotonic()
        while not self._stopped.is_set():
            # fd 2: the stderr of a notebook is not a file
            faulthandler.dump_traceback_later(self.timeout_seconds + INTERPRETER_HANG_SECONDS, exit=True, file=2)
            now = time.monotonic()
            if now - last_check > 5 * self.check_seconds + 1.0:  # this process itself was stopped for a while
                self.progress.mark_progress()
                self._neighbour_heartbeat = (self._neighbour_heartbeat[0], now)
            last_check = now
            try:
                self._write_heartbeat(now)
                self._check_ranks(now)
            except OSError as error:  # a file-system error must not end the run
                print(f"heartbeat of rank {self.rank}: {error}", file=sys.stderr)
            self._stopped.wait(self.check_seconds)

    def stop(self, state: str = "left") -> None:
        """Stop the watchdog. Called by the main thread."""
        self._stopped.set()
        self.join(timeout=10.0)
        faulthandler.cancel_dump_traceback_later()
        with contextlib.suppress(OSError):  # a file-system error must not end the run
            write(self.run_dir, make_heartbeat(self.rank, self.progress, state))

    def _write_heartbeat(self, now: float) -> None:
        if now - self._last_heartbeat >= self.heartbeat_seconds - 0.01:
            write(self.run_dir, make_heartbeat(self.rank, self.progress))
            self._last_heartbeat = now

    def _check_ranks(self, now: float) -> None:
        if (notice := ExitNotice.read(self.run_dir)) is not None:
            self._notice_time = self._notice_time or now
            grace = max(notice.grace_seconds, self.timeout_seconds if self.failing() else 0.0)
            if notice.code == STUCK or now - self._notice_time > grace:
                self.exit_process(notice)
            return
        is_stalled = (
            self.progress.state.doing not in UNLIMITED_ACTIVITIES
            and now - self.progress.last_progress > self.timeout_seconds
        )
        is_frozen = self.world_size > 1 and self._is_neighbour_frozen(now)
        # a debugger may be in use
        if not (is_stalled or is_frozen) or (self.world_size == 1 and sys.stdin and sys.stdin.isatty()):
            return
        heartbeats = read_heartbeats(self.run_dir, range(self.world_size))
        if is_frozen or not any(
            other.rank != self.rank and _is_busy_alone(other, self.timeout_seconds) for other in heartbeats
        ):
            self.stop_stuck_run(heartbeats)

    def stop_stuck_run(self, heartbeats: list[RankHeartbeat] | None = None) -> None:
        """Report the stuck ranks and exit this process. The main thread calls it too, when a collective has timed out."""
        write(self.run_dir, make_heartbeat(self.rank, self.progress))
        heartbeats = read_heartbeats(self.run_dir, range(self.world_size)) if heartbeats is None else heartbeats
        notice = make_stuck_notice(heartbeats, self.timeout_seconds, self.run_dir)
        if notice.create_file(self.run_dir):
            write_to_stderr(notice.message)
        self.exit_process(ExitNotice.read(self.run_dir) or notice)

    def _is_neighbour_frozen(self, now: float) -> bool:
        heartbeat = read_heartbeat(self.run_dir, self.neighbour)
        if heartbeat is None or heartbeat.state != "alive" or heartbeat.beat != self._neighbour_heartbeat[0]:
            self._neighbour_heartbeat = (heartbeat.beat if heartbeat else 0.0, now)
            return False
        return now - self._neighbour_heartbeat[1] > self.timeout_seconds

    def exit_process(self, notice: ExitNotice) -> None:
        """Exit this process with the status of the notice. If ranks are stuck, write the stacks first."""
        try:
            if notice.code == STUCK:
                self._dump_stacks()
            write(self.run_dir, make_heartbeat(self.rank, self.progress, "stuck" if notice.code == STUCK else "left"))
            if notice.code == STUCK and self.world_size > 1:
                # an exit breaks connections: other ranks must dump their stacks before
                time.sleep(1.5 * self.check_seconds)
            for heartbeat in notice.frozen:
                _kill_process(heartbeat)
            flush_streams()
        finally:
            os._exit(notice.code)

    def _dump_stacks(self) -> None:
        state, folder = self.progress.state, self.run_dir / STUCK_FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"rank-{self.rank}.txt").open("w", encoding="utf-8") as file:
            file.write(
                f"rank {self.rank}, host {socket.gethostname()}, pid {os.getpid()}\n{_format_activity(make_heartbeat(self.rank, self.progress))}\n"
            )
            file.write(f"samples: {', '.join(state.samples) or 'none'}\n\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
            file.flush()
            os.fsync(file.fileno())


def make_stuck_notice(heartbeats: list[RankHeartbeat], timeout_seconds: float, run_dir: Path) -> ExitNotice:
    """Make the exit notice of a stuck run. It names the ranks without recent heartbeats, else those with the least progress.

    Args:
        heartbeats: last heartbeats of all ranks.
        timeout_seconds: seconds without progress, for the message and for the age of a stale heartbeat.
        run_dir: run folder, for the message.
    """
    newest = max((other.beat for other in heartbeats), default=0.0)
    alive = [other for other in heartbeats if other.state == "alive"]
    frozen = [other for other in alive if newest - other.beat > timeout_seconds / 2]
    behind = [other for other in alive if other.position == min(any_other.position for any_other in alive)]
    if frozen:
        finding = "; ".join(
            f"{_format_rank(other)} does not answer any more: it is stopped or dead. It was {_format_activity(other)}"
            for other in frozen
        )
    elif len(alive) == 1 or len(behind) < len(alive):
        finding = "; ".join(f"{_format_rank(other)} does not get on, {_format_activity(other)}" for other in behind)
    else:
        finding = (
            f"all ranks are at the same place and wait for each other, {_format_activity(behind[0])}"
            if behind
            else "no rank beats"
        )
    message = (
        f"Stuck: {finding}. Nothing went on for {timeout_seconds:,.0f} s (trainer.timeout_minutes), so all ranks leave with exit "
        f"status {STUCK}. Their stacks and samples are in {run_dir / STUCK_FOLDER}. The same command resumes from the last "
        "checkpoint."
    )
    return ExitNotice(STUCK, message, frozen)


def _is_busy_alone(heartbeat: RankHeartbeat, timeout_seconds: float) -> bool:
    """Return whether the others rightly wait for this rank: it saves, exports or generates, with recent progress."""
    recent = time.time() - heartbeat.beat < timeout_seconds / 2
    return (
        heartbeat.state == "alive"
        and recent
        and Activity(heartbeat.doing) in AWAITED_ACTIVITIES
        and time.time() - heartbeat.moved < timeout_seconds
    )


def _format_rank(heartbeat: RankHeartbeat) -> str:
    return f"rank {heartbeat.rank} on {heartbeat.host} (pid {heartbeat.pid})"


def _format_activity(heartbeat: RankHeartbeat) -> str:
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(heartbeat.since))
    step = f" of step {heartbeat.step + 1:,}, micro-batch {heartbeat.micro_step + 1}" if heartbeat.step >= 0 else ""
    more = (
        f" and {len(heartbeat.samples) - MAX_LISTED_SAMPLES:,} more"
        if len(heartbeat.samples) > MAX_LISTED_SAMPLES
        else ""
    )
    samples = (
        f", with the samples {', '.join(heartbeat.samples[:MAX_LISTED_SAMPLES])}{more}" if heartbeat.samples else ""
    )
    return f"{heartbeat.doing}{step} since {since}{samples}"


def _kill_process(heartbeat: RankHeartbeat) -> None:
    """Kill a stopped process, which cannot exit by itself, if it wrote the heartbeat: same host, pid and start time."""
    here = heartbeat.host == socket.gethostname() and heartbeat.pid != os.getpid()
    if here and heartbeat.started and read_start_time(heartbeat.pid) == heartbeat.started:
        os.kill(heartbeat.pid, signal.SIGKILL)


def write_to_stderr(text: str) -> None:
    """Write a line to stderr without buffering and without locks."""
    os.write(2, f"{text}\n".encode())  # print() may need a lock that the main thread holds


def flush_streams() -> None:
    """Flush stdout and stderr, with a timeout in case the main thread holds the lock of a stream."""

    def flush_both() -> None:
        sys.stdout.flush()
        sys.stderr.flush()

    flusher = threading.Thread(target=flush_both, daemon=True)
    flusher.start()
    flusher.join(timeout=1.0)
