"""A loader's workers outlast signals that are meant for the run, and never the run itself."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from waiting import PATIENCE

from lit_vlm.data.datamodule import Loader
from lit_vlm.data.worker_signals import outlast_signals

SCRIPT = """
from torch.utils.data import DataLoader, Dataset
from lit_vlm.data.worker_signals import end_workers_at_exit, outlast_signals

class Broken(Dataset):
    def __len__(self):
        return 8
    def __getitem__(self, number):
        if number == 3:
            raise MemoryError("no more")
        return number

end_workers_at_exit()
for number in DataLoader(Broken(), batch_size=None, num_workers=2, worker_init_fn=outlast_signals):
    print(number)
"""


def test_an_error_of_a_worker_ends_the_process(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 1 and "MemoryError" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_worker_outlasts_a_signal_that_comes_before_it_has_begun(number):
    def begin(worker: int) -> None:
        os.kill(os.getpid(), number)
        outlast_signals(worker)

    assert [*Loader([1, 2, 3], batch_size=None, num_workers=1, worker_init_fn=begin)] == [1, 2, 3]
