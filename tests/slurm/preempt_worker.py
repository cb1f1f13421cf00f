"""One rank that is preempted several times and resumes each time: `preempt_worker.py TOWER LANGUAGE FOLDER SIGNALS STEPS SEED`.

Each start is a new stage and a new trainer in the same process. The results go to FOLDER/seen.json, the final weights to
FOLDER/weights.pt. Started by test_preemption.py.
"""

import json
import logging
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

import lightning as L
import torch

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]
sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))

from rank_cases import Case

from callbacks.checkpoint import Checkpoint
from callbacks.guard import Exchange
from callbacks.preemption import Preemption
from lit_vlm.checkpoint.folder import CheckpointFolder
from lit_vlm.distributed.trainer import close_process_group, disable_library_warnings

WORLD, RANK = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))


class SignalSender(L.Callback):
    """Sends this process a signal some micro-batches and milliseconds after the start of training."""

    def __init__(self, number: signal.Signals | None, after: int, delay: float) -> None:
        self.number, self.after, self.delay, self.last = number, after, delay, -1

    def on_train_start(self, trainer, pl_module):
        if self.number is not None:
            threading.Thread(target=self.send_signal, args=(trainer,), daemon=True).start()

    def send_signal(self, trainer):
        first = trainer.fit_loop.epoch_loop.batch_progress.current.completed
        while trainer.fit_loop.epoch_loop.batch_progress.current.completed - first < self.after:
            time.sleep(0.0005)
        time.sleep(self.delay)
        os.kill(os.getpid(), self.number)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.last = batch_idx


def make_senders(rng: random.Random) -> list[SignalSender]:
    """Return one callback for each rank: each rank gets a signal at its own moment, or only one rank does."""
    number = rng.choice([signal.SIGUSR1, signal.SIGUSR2])
    hit = rng.choice([range(WORLD), *([rank] for rank in range(WORLD))])
    numbers = [number if rank in hit else None for rank in range(WORLD)]
    return [SignalSender(number, rng.randrange(6), rng.uniform(0, 0.04)) for number in numbers]


def start(stage, data, folder: Path, sender: SignalSender) -> dict:
    trainer = L.Trainer(
        accelerator="cpu",
        devices=WORLD,
        strategy="ddp" if WORLD > 1 else "auto",
        use_distributed_sampler=False,
        logger=False,
        max_epochs=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        callbacks=[Exchange(), Checkpoint(folder, every_minutes=None, say=lambda text: None), Preemption(), sender],
    )
    code = None
    try:
        trainer.fit(stage, data)
    except SystemExit as left:
        code = left.code
    if code is None and RANK == 0:
        torch.save(
            {name: p.detach() for name, p in stage.model.named_parameters() if p.requires_grad}, folder / "weights.pt"
        )
    saved = CheckpointFolder(folder / "checkpoints").list_steps()
    whole = (sender.last + 1) % trainer.accumulate_grad_batches == 0
    return {"code": code, "step": trainer.global_step, "saved": saved[0] if saved else 0, "whole": whole}


def main(tower: str, language: str, folder: str, signals: str, steps: str, seed: str) -> None:
    logging.getLogger("lightning").setLevel(logging.ERROR)
    disable_library_warnings()
    torch.set_num_threads(1)
    torch.manual_seed(0)  # initialises the adapters
    rng, results = random.Random(int(seed)), []
    case, parts = Case("sft_lora", sgd=False, tokens=160, batch=8, steps=int(steps)), (tower, language)
    data = case.make_data(parts)
    for number in range(int(signals) + 1):
        sender = make_senders(rng)[RANK] if number < int(signals) else SignalSender(None, 0, 0.0)
        results.append(start(case.make_stage(parts), data, Path(folder), sender))
    if WORLD > 1:
        all_results: list = [None] * WORLD
        torch.distributed.all_gather_object(all_results, results)
    else:
        all_results = [results]
    if RANK == 0:
        (Path(folder) / "seen.json").write_text(
            json.dumps({"ranks": all_results, "k": data.plan.accumulate_grad_batches})
        )
    close_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
