"""Peak memory of the forward and backward pass of one contender, in a subprocess."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def measure_peak_memory(stage: str, size: str, tiles: int, contender: str, folder: Path, batch: int, steps: int) -> int:
    """Measure the peak bytes above the loaded model over all steps.

    Optimizer moments are not included, because there is no update.
    """
    arguments = [stage, size, str(tiles), contender, str(folder), str(batch), str(steps)]
    command = [sys.executable, "-m", "benchmarks.compare.memory", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if process.returncode:
        raise RuntimeError(f"{contender} in a process of its own: {process.stderr[-2000:]}")
    return json.loads(process.stdout.splitlines()[-1])


def run_contender(stage: str, size: str, tiles: int, name: str, folder: Path, batch: int, steps: int) -> int:
    import torch

    from benchmarks.compare.cases import make_case, resize_case
    from benchmarks.compare.contender import Placement, make_ours
    from benchmarks.compare.peers import make_peers

    case, placement = resize_case(make_case(stage, size, tiles), batch, steps), Placement(folder)
    torch.set_num_threads(1)
    contender = (make_ours(case, placement) | make_peers(case, placement))[name]()
    warm_up_records = sorted(
        (record for step in case.batches for record in step if record.images), key=_make_length_key(case)
    )[:4]
    _run_once(contender, warm_up_records)  # warm-up: loads libraries and chooses kernels
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    start_kilobytes = _read_kilobytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark, proc(5)
    for records in case.batches:
        _run_once(contender, records)
    return 1024 * (_read_kilobytes("VmHWM") - start_kilobytes)


def read_available_memory() -> int:
    """Read the available memory of the machine in bytes."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def _make_length_key(case):
    return lambda record: case.lengths_by_id[record.id]


def _run_once(contender, records) -> None:
    contender.backward(contender.prepare(records))
    contender.clear()


def _read_kilobytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


if __name__ == "__main__":
    stage, size, tiles, name, folder, batch, steps = sys.argv[1:]
    print(run_contender(stage, size, int(tiles), name, Path(folder), int(batch), int(steps)))
