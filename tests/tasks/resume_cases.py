"""Runs that are killed and started again. Each start is a process forked from this one, so imports happen once.

A child that is killed by SIGKILL ends as any process does: no handler, no `finally`, no flush.
"""

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import chdir
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from run_helpers import TINY, RunOutput, write_data_choice
from waiting import PATIENCE

from lit_vlm.checkpoint.folder import CheckpointFolder
from lit_vlm.checkpoint.index import CheckpointIndex
from lit_vlm.checkpoint.resume import read_index
from lit_vlm.config import Run, parse
from lit_vlm.tasks import train_steps  # noqa: F401 - forked children need no imports
from lit_vlm.tasks.train import train
from lit_vlm.types import UserError

STEPS = 6
KINDS = {"align": ("caption",), "sft": ("caption", "text"), "highres": ("word", "multi_image"), "dpo": ("preference",)}
# Dropout, so that random numbers of a step matter; several micro-batches in a step.
OWN = {
    "align": [],
    "sft": ["stage.parts.language_model.lora.rank=4", "stage.parts.language_model.lora.dropout=0.2"],
    "highres": ["data.tiles_per_micro_batch=16"],
    "dpo": [],
}
COMMON = [
    "callbacks=[throughput,guard]",
    "export=false",  # keeps the last checkpoint of a finished run for comparison
    "trainer.log_every_n_steps=1",
    "stage.learning_rate=1e-3",
    "data.tokens_per_micro_batch=400",
    "checkpoint.every_minutes=null",
    "checkpoint.every_steps=1",
    f"trainer.max_steps={STEPS}",
]
TIME_COLUMNS = ("throughput/", "seconds")


def build_overrides(folder: Path, stage: str, *overrides: str) -> list[str]:
    """Return the overrides of `python run.py` for a small run of a stage on built-in samples."""

    def make_source(kind: str, language: str, number: int) -> dict:
        return {"format": "builtin", "path": kind, "language": language, "num_samples": number}

    both = [(kind, language) for kind in KINDS[stage] for language in ("ko", "en")]
    sources = {f"{kind}_{language}": make_source(kind, language, 20) for kind, language in both}
    held_out = {f"{kind}_{language}": make_source(kind, language, 2) for kind, language in both}
    choice = write_data_choice(folder / stage, sources=sources, validation={"sources": held_out})
    return [*TINY, f"stage={stage}", *choice, *COMMON, *OWN[stage], *overrides]


@cache
def parse_once(folder: Path, *overrides: str) -> Run:
    """Parse the overrides once for all starts of a run."""
    with chdir(folder):
        return parse([*overrides])


def run_undisturbed(overrides: list[str], folder: Path, *, finished: bool = False) -> CheckpointIndex | None:
    """Run without a fault, in this process, so that forked children need no imports. Return its last state.

    Args:
        finished: the run exports its model and leaves no state.
    """
    job = parse_once(folder, *overrides)
    with chdir(folder):
        train(deepcopy(job))
    return None if finished else read_last_state(folder, job.name)


@dataclass
class StartedRun:
    """One start of a run: its processes, one per rank."""

    pids: list[int]
    log: Path

    def kill(self, *ranks: int) -> None:
        """Send SIGKILL to these ranks, or to all if none is named."""
        for rank in ranks or range(len(self.pids)):
            os.kill(self.pids[rank], signal.SIGKILL)

    def wait(self, limit: float = PATIENCE) -> list[int]:
        """Return exit codes; negative ones are signals. All are killed when one fails, as torchrun does."""
        codes: dict[int, int] = {}
        end = time.monotonic() + limit
        while len(codes) < len(self.pids):
            for pid in self.pids:
                found, status = os.waitpid(pid, os.WNOHANG) if pid not in codes else (0, 0)
                if found:
                    codes[pid] = os.waitstatus_to_exitcode(status)
            late = time.monotonic() > end
            if late or any(codes.values()):
                self._end(codes, 0 if late else 5.0)
                assert not late, f"no end after {limit} s: {self.read_output()}"
            time.sleep(0.002)
        return [codes[pid] for pid in self.pids]

    def _end(self, codes: dict[int, int], grace: float) -> None:
        """Give the other processes `grace` seconds to end by themselves, then kill them."""
        end = time.monotonic() + grace
        while any(pid not in codes for pid in self.pids):
            for pid in [pid for pid in self.pids if pid not in codes]:
                if time.monotonic() > end:
                    os.kill(pid, signal.SIGKILL)
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    codes[pid] = os.waitstatus_to_exitcode(status)
            time.sleep(0.002)

    def read_output(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")


def start(overrides: list[str], folder: Path, ranks: int = 1, patch: Callable[[], None] | None = None) -> StartedRun:
    """Start a run in `folder`. Each child first calls `patch`."""
    log = folder / "logs" / f"{time.monotonic_ns()}.log"
    log.parent.mkdir(exist_ok=True)
    log.touch()
    job = parse_once(folder, *overrides)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = []
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            _run_child(job, folder, log, patch, _build_rank_environment(rank, ranks, port) if ranks > 1 else {})
        pids.append(pid)
    return StartedRun(pids, log)


def run_to_end(
    overrides: list[str], folder: Path, ranks: int = 1, patch: Callable[[], None] | None = None
) -> tuple[int, str]:
    """Start a run and wait. Return the exit code of the first rank and the output of all."""
    started = start(overrides, folder, ranks, patch)
    return started.wait()[0], started.read_output()


def open_run(folder: Path, name: str) -> RunOutput:
    return RunOutput(folder / "runs" / name)


def read_last_state(folder: Path, name: str) -> CheckpointIndex:
    """Read the state after the last step."""
    checkpoints = CheckpointFolder(folder / "runs" / name / "checkpoints")
    return read_index(checkpoints.get_step_path(checkpoints.list_steps()[0]))


def is_same_state(one: CheckpointIndex, other: CheckpointIndex) -> bool:
    """Compare states bit by bit: the index holds the SHA-256 of the files and of the consumed samples."""
    one_content, other_content = ((i.step, i.updates, i.consumed, i.intervals, i.files) for i in (one, other))
    return one_content == other_content


def list_leftovers(folder: Path, name: str) -> list[str]:
    """List the files and folders in a run folder that no finished run has."""
    run_folder = folder / "runs" / name
    return [str(path.relative_to(run_folder)) for path in run_folder.rglob("*") if path.name.startswith(".")]


def read_metrics(folder: Path, name: str) -> list[dict]:
    """Read metrics.csv without its times."""
    import csv

    with (folder / "runs" / name / "metrics.csv").open(encoding="utf-8", newline="") as stream:
        found = list(csv.DictReader(stream))
    return [{key: value for key, value in row.items() if not key.startswith(TIME_COLUMNS)} for row in found]


def kill_at_micro_batch(micro_batch: int) -> Callable[[], None]:
    """Return a patch that sends SIGKILL in the training step of that micro-batch of the run."""

    def patch() -> None:
        from lit_vlm.stages.base import Stage

        step = Stage.training_step

        def kill_or_step(self, batch, number):
            if number == micro_batch:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(self, batch, number)

        Stage.training_step = kill_or_step

    return patch


def _build_rank_environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """Return the environment that torchrun sets for a rank."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "GROUP_RANK": 0}
    names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
    return {key: str(value) for key, value in names.items()}


def _run_child(job: Run, folder: Path, log: Path, patch: Callable[[], None] | None, env: dict[str, str]) -> None:
    code = 1
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1, closefd=False)
        os.environ.update(env)
        os.chdir(folder)
        from lit_vlm.fault_tolerance.signals import handle_signals
        from lit_vlm.tasks import terminal

        handle_signals()  # as run.py does
        terminal.console.file = sys.stdout
        if patch is not None:
            patch()
        train(deepcopy(job))
        code = 0
    except UserError as error:
        print(error)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)
