"""Fault injection for runs that `resume_cases.start` starts, and records of each step of each rank."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import lightning as L
import torch

from callbacks.checkpoint import _count_updates
from lit_vlm.distributed.sharded_state import get_sharded_state
from lit_vlm.stages.base import Stage

SMALL = ["data.global_batch_size=12", "data.tokens_per_micro_batch=120"]  # three micro-batches on two ranks


@dataclass(frozen=True)
class Fault:
    """A non-finite number in the loss of one micro-batch, or in the gradient after its backward pass."""

    where: str  # "loss" or "gradient"
    step: int
    micro_step: int
    rank: int
    value: float = float("nan")

    def matches(self, stage: Stage) -> bool:
        number = stage.trainer.fit_loop.epoch_loop.batch_idx
        place = divmod(number, stage.trainer.accumulate_grad_batches)
        return place == (self.step, self.micro_step) and stage.global_rank == self.rank


def inject_faults(faults: Iterable[Fault]) -> Callable[[], None]:
    def patch() -> None:
        original_loss, original_hook = Stage.compute_loss, L.LightningModule.on_after_backward

        def compute_loss(self, batch):
            due = [fault for fault in faults if fault.where == "loss" and fault.matches(self)]
            return original_loss(self, batch) * (due[0].value if due else 1.0)

        def on_after_backward(self):
            for fault in faults:
                if fault.where == "gradient" and fault.matches(self):
                    last = [p.grad for p in self.parameters() if p.grad is not None][-1]
                    last.view(-1)[-1] = fault.value
            return original_hook(self)

        Stage.compute_loss, Stage.on_after_backward = compute_loss, on_after_backward

    return patch


def record_steps(folder: Path) -> Callable[[], None]:
    """Return a patch: each rank writes, for each step, its samples and the digests of its state before and after."""

    def patch() -> None:
        from lit_vlm.tasks import train_steps

        fit = train_steps.run_fit

        def run_fit_with_recorder(trainer, *rest, **options):
            trainer.callbacks.append(StepRecorder(folder))
            return fit(trainer, *rest, **options)

        train_steps.run_fit = run_fit_with_recorder

    return patch


def combine_patches(*patches: Callable[[], None]) -> Callable[[], None]:
    def patch() -> None:
        for each in patches:
            each()

    return patch


class StepRecorder(L.Callback):
    def __init__(self, folder: Path) -> None:
        self.folder, self.ids, self.before = folder, [], ""

    def on_train_batch_start(self, trainer, stage, batch, batch_idx):
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self.ids, self.before = [], compute_digest(trainer)
        self.ids.append(list(batch.sample_ids))

    def on_train_batch_end(self, trainer, stage, outputs, batch, batch_idx):
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        row = {"step": batch.step, "ids": self.ids, "before": self.before, "after": compute_digest(trainer), "lr": rate}
        with (self.folder / f"notes-{trainer.global_rank}.jsonl").open("a") as stream:
            stream.write(json.dumps(row) + "\n")
            os.fsync(stream.fileno())


def compute_digest(trainer: L.Trainer) -> str:
    """Return the SHA-256 of this rank's weights and moments, and of the number of updates."""
    hasher = hashlib.sha256(str(_count_updates(trainer)).encode())
    for piece in get_sharded_state(trainer).iter_shards():
        hasher.update(piece.values.detach().contiguous().numpy().tobytes())
    return hasher.hexdigest()


def read_step_records(folder: Path, rank: int = 0) -> list[dict]:
    return [json.loads(line) for line in (folder / f"notes-{rank}.jsonl").read_text().splitlines()]


def raise_out_of_memory_at(step: int, micro_step: int, where: str, rank: int = 0, times: int = 1) -> Callable[[], None]:
    """Return a patch that raises torch.OutOfMemoryError in "forward", "backward" or "optimizer", up to `times` times."""

    def patch() -> None:
        remaining = [times]
        training_step, clip = Stage.training_step, L.LightningModule.configure_gradient_clipping

        def is_due(stage):
            at, micro = divmod(stage.trainer.fit_loop.epoch_loop.batch_idx, stage.trainer.accumulate_grad_batches)
            is_here = at == step and (micro == micro_step or where == "optimizer")
            if not is_here or stage.global_rank != rank or not remaining[0]:
                return False
            remaining[0] -= 1
            return True

        def step_or_fail(self, batch, number):
            if where == "forward" and is_due(self):
                raise_out_of_memory()
            loss = training_step(self, batch, number)
            if where == "backward" and is_due(self):
                loss.register_hook(raise_out_of_memory)
            return loss

        def clip_or_fail(self, *options, **keywords):
            if where == "optimizer" and is_due(self):
                raise_out_of_memory()
            return clip(self, *options, **keywords)

        Stage.training_step, Stage.configure_gradient_clipping = step_or_fail, clip_or_fail

    return patch


def raise_out_of_memory(*_):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. (a test)")
