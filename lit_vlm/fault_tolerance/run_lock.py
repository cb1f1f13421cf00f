"""Lock of a run folder: one process at a time. Two agents or a second start would overwrite each other's state.

The lock is a lock file of the operating system (flock), so a killed process does not keep it. Rank 0 acquires it for all
ranks.
"""

from __future__ import annotations

import os
import socket
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

from lit_vlm.files import read_json_or_none, write_json
from lit_vlm.runs.run_folder import is_rank_zero
from lit_vlm.types import UserError

LOCK_FILE, HOLDER_FILE = "held.lock", "held.json"
DEFAULT_REMEDY = "Wait for it or end that process; or give this run a name of its own with run_name=..."
ORPHAN_WAIT_SECONDS = 10.0  # loader workers of a killed run keep its lock until they notice, after 5 s


class RunIsHeldError(UserError):
    """Error for a run folder whose lock another process holds."""


class RunLock:
    """Lock of a run folder, held from `acquire` to the end of the context.

    Args:
        folder: run folder. `acquire` creates it.
        remedy: advice in the error message if another process holds the lock.
    """

    def __init__(self, folder: Path, remedy: str = DEFAULT_REMEDY) -> None:
        self.folder, self.remedy = Path(folder), remedy
        self._lock: FileLock | None = None

    def acquire(self) -> bool:
        """Acquire the lock unless this process already holds it. Ranks other than 0 do nothing.

        Returns:
            Whether the lock was acquired by this call.

        Raises:
            RunIsHeldError: another process holds the lock; the message names process, host and time.
            UserError: the lock files cannot be used.
        """
        if self._lock is not None or not is_rank_zero():
            return False
        lock = FileLock(self.folder / LOCK_FILE, timeout=0)
        holder = {"host": socket.gethostname(), "process": os.getpid(), "since": datetime.now(UTC).isoformat()}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _acquire_lock(lock, self.folder)
            write_json(self.folder / HOLDER_FILE, holder, durable=False)
        except Timeout:
            raise RunIsHeldError(f"{_format_holder(self.folder)} {self.remedy}") from None
        except OSError as error:
            path = self.folder / (HOLDER_FILE if lock.is_locked else LOCK_FILE)
            lock.release()
            remedy = "Remove it" if path.is_dir() else "Make room or change its rights"
            raise UserError(
                f"{path} cannot be used: {error.strerror or error}. {remedy}, and start the run again."
            ) from error
        self._lock = lock
        return True

    def __enter__(self) -> RunLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is not None:
            with suppress(OSError):  # only the lock counts; a holder file that stays is harmless
                (self.folder / HOLDER_FILE).unlink(missing_ok=True)
            self._lock.release()
            self._lock = None


def _acquire_lock(lock: FileLock, folder: Path) -> None:
    """Acquire the lock at once, or after the orphaned workers of a dead process have exited. Raise Timeout if it is held."""
    deadline = time.monotonic() + ORPHAN_WAIT_SECONDS
    while True:
        try:
            lock.acquire()
            return
        except Timeout:
            if is_holder_alive(read_holder(folder)) or time.monotonic() > deadline:
                raise
        time.sleep(0.2)


def read_holder(folder: Path) -> dict[str, Any]:
    """Read the holder of the lock; {} if it is unknown, e.g. because the file is damaged."""
    found = read_json_or_none(folder / HOLDER_FILE)
    is_known = isinstance(found, dict) and type(found.get("process")) is int and isinstance(found.get("host"), str)
    return found if is_known else {}


def is_holder_alive(holder: dict[str, Any]) -> bool:
    """Return whether the holder process exists. A process on another host is assumed to exist."""
    if not holder or holder.get("host") != socket.gethostname():
        return True
    return Path(f"/proc/{holder['process']}").exists() or not Path("/proc").is_dir()


def _format_holder(folder: Path) -> str:
    holder = read_holder(folder)
    since = str(holder.get("since", ""))[:19].replace("T", " ")
    owner = f"process {holder['process']} on {holder['host']}, since {since} UTC" if holder else "another process"
    return f"{folder}: this run is under way already, in {owner}."
