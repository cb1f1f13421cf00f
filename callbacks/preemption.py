"""Saves and leaves when a scheduler or a person asks for it: at the end of a step, on all ranks alike."""

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

# Where ranks were asked differently: what a sweep has seen enough of needs no new start, a time limit is everybody's, and a
# person who interrupts wants no new start.
BY_WEIGHT = (Ask.stop, Ask.requeue, Ask.interrupt, Ask.leave)
AGAIN = "The same command goes on from there."


class Saves(Protocol):
    """What is needed of the checkpoint callback."""

    def save_now(self, trainer: L.Trainer, pl_module: L.LightningModule, wait: bool) -> Any: ...


class Preemption(L.Callback):
    """On SIGUSR1 and SIGUSR2 (time limit, preemption), SIGTERM and Ctrl-C: see `lit_vlm/engine/signals.py`.

    Handlers only tell; the ranks exchange what they were told once per optimizer step. After the step all save, the first
    one requeues the Slurm job where that was asked, and all leave by `LeftTogether`: RESTART (75), INTERRUPTED (130) after
    Ctrl-C, 0 when a sweep wants no more of this run. In validation they look after each batch, and once more when training has
    ended: what was told after the last step's exchange is not lost. To come behind the checkpoint callback, so that the last
    state is on the disk by then.
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
        consensus = consensus_of(trainer)
        self._act(trainer, pl_module, [ask for ask in BY_WEIGHT if consensus.heard(Word(ask.value))])

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """The state is that of the step before; the rest of this validation is not made up for."""
        if self._signals is not None:
            self._act(trainer, pl_module, _asked_of_any(trainer, self._asked))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        signals = self._signals
        if signals is None:
            return
        known = len(self._asked)
        asks = _asked_of_any(trainer, self._asked)
        self._act(trainer, pl_module, [ask for ask in asks if ask is not Ask.stop])  # a sweep's run is done
        self._let_go()  # what follows is done again by the next start, when this one is ended
        for ask in self._asked[known:]:
            if ask is not Ask.stop:
                signals.heed(ask)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._let_go()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if self._signals is not None and not self._signals.leaving:
            self._signals.waiting += self._asked  # for the start that follows in this process, as after a rollback
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
        ask = _meant(trainer, asks[0])
        if trainer.is_global_zero:
            print(f"Asked to {ask}: {saved}; {_requeued(ask)}", flush=True)
        trainer.strategy.barrier("leave")  # nobody leaves before Slurm has answered: the first to leave ends the step
        if ask is Ask.stop:
            raise StoppedEarly
        raise LeftTogether(INTERRUPTED if ask is Ask.interrupt else RESTART)


def _teller(trainer: L.Trainer, asked: list[Ask]) -> Callable[[Ask], None]:
    consensus = consensus_of(trainer)

    def tell(ask: Ask) -> None:
        asked.append(ask)
        consensus.tell(Word(ask.value))

    return tell


def _asked_of_any(trainer: L.Trainer, asked: list[Ask]) -> list[Ask]:
    """What some rank was asked. All ranks must call it at the same place."""
    mine = asked[:]
    flags = torch.tensor([float(ask in mine) for ask in BY_WEIGHT], device=trainer.strategy.root_device)
    if trainer.world_size > 1:
        torch.distributed.all_reduce(flags)
    return [ask for ask, flag in zip(BY_WEIGHT, flags.tolist(), strict=True) if flag]


def _meant(trainer: L.Trainer, ask: Ask) -> Ask:
    """A signal of a sweep's agent is the sweep's wish, or the agent's own end. W&B knows; the first rank asks it for all."""
    if ask not in (Ask.leave, Ask.requeue) or not in_sweep():
        return ask
    trackers = [logger for logger in trainer.loggers if hasattr(logger, "is_asked_to_stop")]
    wanted = any(tracker.is_asked_to_stop() for tracker in trackers)
    return Ask.stop if trainer.strategy.broadcast(wanted) else ask


def _save(trainer: L.Trainer, pl_module: L.LightningModule) -> str:
    """What was saved, in words."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    saver: Saves | None = next((found for found in callbacks if hasattr(found, "save_now")), None)
    if saver is None:
        return f"left after step {trainer.global_step:,} without saving, for no checkpoint callback is there"
    saver.save_now(trainer, pl_module, wait=True)
    return f"saved at step {trainer.global_step:,}"


def _requeued(ask: Ask) -> str:
    """Put the job back into the queue where that is right, and say what happens next."""
    if ask is Ask.stop:
        return "the sweep wants no more of this run. Its state is kept."
    if in_sweep() and ask is not Ask.interrupt:
        return "left. The next agent of the sweep goes on from there."  # the job is the agent's, to be requeued by it
    job = own_job()
    if job is None or ask is Ask.interrupt or (ask is Ask.leave and not is_preempted(job)):
        return f"left. {AGAIN}"
    refused = requeue(job)
    if refused:
        return f"job {job} could not be requeued ({refused}). Submit it again: {AGAIN[0].lower()}{AGAIN[1:]}"
    return f"job {job} is requeued and goes on from there."


def _silence(trainer: L.Trainer) -> None:
    """Lightning's own handling off: a handler in which ranks wait for each other, and a broadcast before every micro-batch
    that makes the host wait for the device."""
    trainer._signal_connector.register_signal_handlers = lambda: None
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None
