"""Benchmark of checkpoints: stall while saving, and time from the kill of a run until it trains again.

    python -m benchmarks.resume [--width 768] [--steps 24]

*Save*: an sft stage with about one gigabyte of AdamW state, on one CPU thread. A checkpoint is due every third step, once
written asynchronously and once with training waiting. The stall is the time of `save_now`. A step during which a checkpoint
is being written is compared with the median of the other steps. *Kill*: a run of the tiny model is killed by SIGKILL and
started again. The time is from the kill to the first new line of metrics.csv. Results go to benchmarks/results/resume.json.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", WANDB_MODE="disabled")

import lightning as L
import torch
from torch.utils.data import DataLoader

from benchmarks.engine_step import make_micro_batches, make_stage
from callbacks import Checkpoint, Exchange
from lit_vlm.config.schema import ModelConfig
from lit_vlm.distributed.trainer import disable_library_warnings
from lit_vlm.model.spec import load_model_spec
from lit_vlm.model.tiny import make_language_model, make_tiny_parts
from lit_vlm.runs.run_folder import get_package_versions

ROOT = Path(__file__).resolve().parents[1]
OUT = Path(__file__).parent / "results" / "resume.json"
WARM_UP, SAVE_STEPS = 3, 3  # steps
NUM_KILLS = 5
RUN_OVERRIDES = "task=train model=tiny model.grid=2 model.max_tiles=4 trainer=tiny trainer.log_every_n_steps=1 trainer.max_steps=100000"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=768, help="hidden size of a language model of ten layers")
    parser.add_argument("--steps", type=int, default=24)
    arguments = parser.parse_args()
    # on disk: the default temporary folder may be in memory
    with tempfile.TemporaryDirectory(dir=ROOT / "benchmarks") as folder:
        root = Path(folder)
        saves = {
            str(mode): measure_save(root / str(mode), mode == "beside", arguments) for mode in ("beside", "waiting")
        }
        kills = measure_kills(root / "kill")
    result = {
        "save": saves,
        "kill_to_training_seconds": kills,
        "load": os.getloadavg(),
        "versions": get_package_versions(),
    }
    OUT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({key: result[key] for key in ("save", "kill_to_training_seconds")}, indent=2))


class StepClock(L.Callback):
    """Records the seconds of each step, without the save, and whether a checkpoint was being written."""

    def __init__(self, saver: Checkpoint) -> None:
        self.saver, self.seconds, self.writing, self.start = saver, list[float](), list[bool](), 0.0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.start = time.perf_counter()
        thread = self.saver._writer._thread
        self.writing.append(thread is not None and thread.is_alive())

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        """Stop the clock after the update, before the save."""
        self.seconds.append(time.perf_counter() - self.start)


def measure_save(folder: Path, asynchronous: bool, arguments: argparse.Namespace) -> dict[str, float | None]:
    """Measure stall and step seconds of a training run that saves checkpoints."""
    disable_library_warnings()
    torch.set_num_threads(1)
    tower, _ = make_tiny_parts(folder / "parts")
    language = folder / "parts" / "language"
    width = arguments.width
    make_language_model(language, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=10)
    blueprint = load_model_spec(ModelConfig(vision_tower=tower, language_model=str(language), grid=2, max_tiles=4))
    saver = Checkpoint(
        folder, every_steps=SAVE_STEPS, every_minutes=None, asynchronous=asynchronous, say=lambda text: None
    )
    clock, stage = StepClock(saver), make_stage(blueprint)
    trainer = L.Trainer(
        accelerator="cpu",
        precision="32-true",
        gradient_clip_val=1.0,
        max_epochs=1,
        logger=False,
        callbacks=[clock, Exchange(), saver],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    batches = make_micro_batches(blueprint, 4, arguments.steps, 0, 1)
    trainer.fit(stage, DataLoader(batches, batch_size=None, shuffle=False))  # type: ignore[arg-type]
    size = sum(file.stat().st_size for file in folder.glob("checkpoints/step-*/*")) / len(saver.folder.list_steps())
    steps = list(zip(clock.seconds, clock.writing, strict=False))[WARM_UP:]
    quiet_steps, busy = ([seconds for seconds, writing in steps if writing is is_busy] for is_busy in (False, True))
    return {
        "state_gb": size / 1e9,
        # the first save allocates the host buffers
        "median_stall_seconds": statistics.median(saver.stall_seconds[1:]),
        "first_stall_seconds": saver.stall_seconds[0],
        "median_step_seconds": statistics.median(quiet_steps),
        "median_step_seconds_while_writing": statistics.median(busy) if busy else None,
        "steps_while_writing": len(busy),
    }


def measure_kills(folder: Path) -> dict[str, float]:
    """Measure the seconds from the kill of a run until it trains again."""
    folder.mkdir(parents=True)
    table, seconds = folder / "runs/a/metrics.csv", []
    overrides = [*RUN_OVERRIDES.split(), "run_name=a", f"run_dir={folder}/runs", "checkpoint.every_steps=10"]
    run = start_run(overrides, folder)
    for _ in range(NUM_KILLS):
        wait_for_rows(table, 20 + count_rows(table))
        run.send_signal(signal.SIGKILL)
        run.wait()
        start_time, num_known = time.perf_counter(), count_rows(table)
        run = start_run(overrides, folder)
        # the run first truncates the table to its checkpoint, and repeats the lost steps
        wait_for_text(folder / "log", len((folder / "log").read_text()), "resumes at step")
        num_known = count_rows(table)
        wait_for_rows(table, num_known + 1)
        seconds.append(time.perf_counter() - start_time)
    run.kill()
    run.wait()
    return {"median": statistics.median(seconds), "least": min(seconds), "most": max(seconds), "kills": NUM_KILLS}


def start_run(overrides: list[str], folder: Path) -> subprocess.Popen[bytes]:
    """Start a run in a subprocess."""
    with open(folder / "log", "a") as log:
        return subprocess.Popen([sys.executable, str(ROOT / "run.py"), *overrides], cwd=folder, stdout=log, stderr=log)


def count_rows(table: Path) -> int:
    """Count the rows of metrics.csv."""
    return len(table.read_text().splitlines()) if table.is_file() else 0


def wait_for_rows(table: Path, num_rows: int) -> None:
    """Wait until the table has at least so many rows."""
    while count_rows(table) < num_rows:
        time.sleep(0.01)


def wait_for_text(log: Path, offset: int, text: str) -> None:
    """Wait until a text appears in the log after an offset."""
    while text not in log.read_text()[offset:]:
        time.sleep(0.01)


if __name__ == "__main__":
    main()
