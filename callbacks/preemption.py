"""Preemption callback: on a stop request, saves a checkpoint and exits at the end of a step, on all ranks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Protocol

import lightning as L
import torch

from lit_vlm.engine.consensus import Word, consensus_of, is_last_micro_step
from lit_vlm.engine.exits import INTERRUPTED, RESTART, LeftTogether, StoppedEarly
from lit_vlm.engine.ranks import in_sweep
from lit_vlm.engine.signals import Ask, Signals, listening
from lit_vlm.engine.slurm import is_preempted, own_job, requeue

# Priority when ranks got different requests. Early stopping of a sweep comes first: it needs no restart. A time limit
# concerns all ranks. A person who interrupts wants no restart.
BY_WEIGHT = (Ask.stop, Ask.requeue, Ask.interrupt, Ask.leave)
AGAIN = "The same command goes on from there."


class Saves(Protocol):
    """Protocol of a callback that can save a checkpoint now."""

    def save_now(self, trainer: L.Trainer, pl_module: L.LightningModule, wait: bool) -> Any: ...


class Preemption(L.Callback):
    """Saves and exits on SIGUSR1 and SIGUSR2 (time limit, preemption), SIGTERM and Ctrl-C (`lit_vlm/engine/signals.py`).

    Signal handlers only set a flag. The ranks exchange their flags once per optimizer step. After the step all ranks save,
    rank 0 requeues the Slurm job if requested, and all ranks raise `CoordinatedExit` with status RESTART (75), INTERRUPTED
    (130) after Ctrl-C, or 0 for early stopping by a sweep. In validation the ranks check after each batch. They check once
    more when training has ended, so a request after the exchange of the last step is not lost. This callback must come after
    the checkpoint callback, so that the last state is already on disk.
    """

    def __init__(self) -> None:
        self._signals: Signals | None = None
        self._stack = ExitStack()
        self._asked: list[Ask] = []

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._asked = []
        _silence(trainer)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._signals = self._stack.enter_context(listening(_teller(trainer, self._asked)))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not is_last_micro_step(trainer):
            return
        flags = consensus_of(trainer)
        self._act(trainer, pl_module, [request for request in BY_WEIGHT if flags.heard(Word(request.value))])

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Exit during validation. The saved state is that of the step before; the rest of this validation is not repeated."""
        if self._signals is not None:
            self._act(trainer, pl_module, _asked_of_any(trainer, self._asked))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        handler = self._signals
        if handler is None:
            return
        num_known = len(self._asked)
        requests = _asked_of_any(trainer, self._asked)
        # a stop request of a sweep is void here: the run is already complete
        self._act(trainer, pl_module, [request for request in requests if request is not Ask.stop])
        self._let_go()  # if a signal ends this process from here on, the next start repeats the rest
        for request in self._asked[num_known:]:
            if request is not Ask.stop:
                handler.heed(request)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._let_go()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if self._signals is not None and not self._signals.leaving:
            self._signals.waiting += self._asked  # for the restart in this process, e.g. after a rollback
        self._let_go()

    def _let_go(self) -> None:
        self._signals = None
        self._stack.close()

    def _act(self, trainer: L.Trainer, pl_module: L.LightningModule, asks: list[Ask]) -> None:
        if not asks:
            return
        if self._signals is not None:
            self._signals.leaving = True
        saved = _save(trainer, pl_module)
        request = _meant(trainer, asks[0])
        if trainer.is_global_zero:
            print(f"Asked to {request}: {saved}; {_requeued(request)}", flush=True)
        trainer.strategy.barrier("leave")  # Slurm must answer first: the first exit ends the job step
        if request is Ask.stop:
            raise StoppedEarly
        raise LeftTogether(INTERRUPTED if request is Ask.interrupt else RESTART)


def _teller(trainer: L.Trainer, asked: list[Ask]) -> Callable[[Ask], None]:
    flags = consensus_of(trainer)

    def tell(ask: Ask) -> None:
        asked.append(ask)
        flags.tell(Word(ask.value))

    return tell


def _asked_of_any(trainer: L.Trainer, asked: list[Ask]) -> list[Ask]:
    """Gather the requests of all ranks, by priority. All ranks must call it at the same point."""
    snapshot = asked[:]
    flags = torch.tensor([float(request in snapshot) for request in BY_WEIGHT], device=trainer.strategy.root_device)
    if trainer.world_size > 1:
        torch.distributed.all_reduce(flags)
    return [request for request, flag in zip(BY_WEIGHT, flags.tolist(), strict=True) if flag]


def _meant(trainer: L.Trainer, ask: Ask) -> Ask:
    """Resolve a signal from the agent of a sweep: early stopping of this run, or the end of the agent itself.

    Rank 0 asks W&B and broadcasts the answer.
    """
    if ask not in (Ask.leave, Ask.requeue) or not in_sweep():
        return ask
    trackers = [logger for logger in trainer.loggers if hasattr(logger, "is_asked_to_stop")]
    should_stop = any(tracker.is_asked_to_stop() for tracker in trackers)
    return Ask.stop if trainer.strategy.broadcast(should_stop) else ask


def _save(trainer: L.Trainer, pl_module: L.LightningModule) -> str:
    """Save a checkpoint now and return a phrase that reports it."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    saver: Saves | None = next((callback for callback in callbacks if hasattr(callback, "save_now")), None)
    if saver is None:
        return f"left after step {trainer.global_step:,} without saving, for no checkpoint callback is there"
    saver.save_now(trainer, pl_module, wait=True)
    return f"saved at step {trainer.global_step:,}"


def _requeued(ask: Ask) -> str:
    """Requeue the Slurm job where the request needs it, and return a phrase that reports what happens next."""
    if ask is Ask.stop:
        return "the sweep wants no more of this run. Its state is kept."
    if in_sweep() and ask is not Ask.interrupt:
        # the agent owns the job and requeues it
        return "left. The next agent of the sweep goes on from there."
    job = own_job()
    if job is None or ask is Ask.interrupt or (ask is Ask.leave and not is_preempted(job)):
        return f"left. {AGAIN}"
    refusal = requeue(job)
    if refusal:
        return f"job {job} could not be requeued ({refusal}). Submit it again: {AGAIN[0].lower()}{AGAIN[1:]}"
    return f"job {job} is requeued and goes on from there."


def _silence(trainer: L.Trainer) -> None:
    """Disable Lightning's signal handling.

    Its handler makes ranks wait for each other, and its broadcast before each micro-batch makes the host wait for the device.
    """
    trainer._signal_connector.register_signal_handlers = lambda: None
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None
