"""A run folder is one process's at a time. Two agents, or an impatient second start, would write over each other's state.

The lock is the system's (flock), so one of a process that was killed holds nobody up. Rank 0 takes it for all ranks.
"""

from __future__ import annotations

import json
import os
import socket
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

from lit_vlm.engine.run_folder import is_rank_zero
from lit_vlm.files import write_json
from lit_vlm.types import UserError

LOCK, HOLDER = "held.lock", "held.json"
OTHERWISE = "Wait for it or end that process; or give this run a name of its own with run_name=..."
ORPHANS_SECONDS = 10.0  # loader processes of a run that was killed hold its lock until they notice, after 5 s


class Hold:
    """The lock of a run folder, from `take` to the end of the context.

    Args:
        folder: of the run. It is made by `take`, no sooner.
        remedy: what to do where another process has it.
    """

    def __init__(self, folder: Path, remedy: str = OTHERWISE) -> None:
        self.folder, self.remedy = Path(folder), remedy
        self._lock: FileLock | None = None

    def take(self) -> bool:
        """Take it, unless this process has it. Whether it was taken now.

        Raises:
            UserError: another process has it: who, where, since when; or its files cannot be used.
        """
        if self._lock is not None or not is_rank_zero():
            return False
        lock = FileLock(self.folder / LOCK, timeout=0)
        holder = {"host": socket.gethostname(), "process": os.getpid(), "since": datetime.now(UTC).isoformat()}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _acquire(lock, self.folder)
            write_json(self.folder / HOLDER, holder, durable=False)
        except Timeout:
            raise UserError(f"{_held(self.folder)} {self.remedy}") from None
        except OSError as error:
            path = self.folder / (HOLDER if lock.is_locked else LOCK)
            lock.release()
            remedy = "Remove it" if path.is_dir() else "Make room or change its rights"
            raise UserError(
                f"{path} cannot be used: {error.strerror or error}. {remedy}, and start the run again."
            ) from error
        self._lock = lock
        return True

    def __enter__(self) -> Hold:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is not None:
            with suppress(OSError):  # the lock alone decides; what is left here is no error of the run
                (self.folder / HOLDER).unlink(missing_ok=True)
            self._lock.release()
            self._lock = None


def _acquire(lock: FileLock, folder: Path) -> None:
    """At once, or once the orphans of a process that is gone have gone, too. Timeout: someone has it."""
    end = time.monotonic() + ORPHANS_SECONDS
    while True:
        try:
            lock.acquire()
            return
        except Timeout:
            if _is_alive(_holder(folder)) or time.monotonic() > end:
                raise
        time.sleep(0.2)


def _holder(folder: Path) -> dict[str, Any]:
    """Read who holds the folder; {} where that is not known, as of a damaged file."""
    with suppress(OSError, ValueError, RecursionError):
        found = json.loads((folder / HOLDER).read_text(encoding="utf-8"))
        if isinstance(found, dict) and type(found.get("process")) is int and isinstance(found.get("host"), str):
            return found
    return {}


def _is_alive(holder: dict[str, Any]) -> bool:
    """Whether the process is there; one of another machine is taken to be."""
    if not holder or holder.get("host") != socket.gethostname():
        return True
    return Path(f"/proc/{holder['process']}").exists() or not Path("/proc").is_dir()


def _held(folder: Path) -> str:
    holder = _holder(folder)
    since = str(holder.get("since", ""))[:19].replace("T", " ")
    who = f"process {holder['process']} on {holder['host']}, since {since} UTC" if holder else "another process"
    return f"{folder}: this run is under way already, in {who}."
