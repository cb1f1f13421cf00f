"""Workers of a loader survive signals that are meant for the run, and never outlive the run."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from waiting import PATIENCE

from lit_vlm.data.datamodule import SignalSafeDataLoader
from lit_vlm.data.loader import setup_worker_signals

SCRIPT = """
from torch.utils.data import DataLoader, Dataset
from lit_vlm.data.loader import register_worker_cleanup, setup_worker_signals

class Broken(Dataset):
    def __len__(self):
        return 8
    def __getitem__(self, number):
        if number == 3:
            raise MemoryError("no more")
        return number

register_worker_cleanup()
for number in DataLoader(Broken(), batch_size=None, num_workers=2, worker_init_fn=setup_worker_signals):
    print(number)
"""


# Workers that are still reading when the process ends. The exit handlers that run after they were killed take a while.
READING = """
import atexit, time
atexit.register(lambda: [time.sleep(0.01) for _ in range(50)])
from torch.utils.data import DataLoader
from lit_vlm.data.loader import register_worker_cleanup, setup_worker_signals

register_worker_cleanup()
batches = iter(DataLoader(range(100), batch_size=None, num_workers=2, worker_init_fn=setup_worker_signals))
print(next(batches))
"""


def run_script(script: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=PATIENCE
    )


def test_workers_that_are_killed_at_the_end_of_a_process_leave_no_traceback():
    done = run_script(READING)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_error_of_a_worker_ends_the_process():
    done = run_script(SCRIPT)
    assert done.returncode == 1 and "MemoryError" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_worker_survives_a_signal_that_arrives_before_it_starts(number):
    def begin(worker: int) -> None:
        os.kill(os.getpid(), number)
        setup_worker_signals(worker)

    assert [*SignalSafeDataLoader([1, 2, 3], batch_size=None, num_workers=1, worker_init_fn=begin)] == [1, 2, 3]
