"""Preemption callback: on a stop request, saves a checkpoint and exits at the end of a step, on all ranks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Protocol

import lightning as L

from lit_vlm.cluster.slurm import get_own_job, is_preempted, requeue
from lit_vlm.compat.lightning import disable_signal_handlers, is_last_micro_step
from lit_vlm.distributed.collectives import StepFlag, get_shared_flags, sum_over_ranks
from lit_vlm.distributed.ranks import is_in_sweep
from lit_vlm.fault_tolerance.exit_status import INTERRUPTED, RESTART, CoordinatedExit, EarlyStoppingExit
from lit_vlm.fault_tolerance.signals import SignalHandler, StopRequest, use_listener

# Priority when ranks got different requests. Early stopping of a sweep comes first: it needs no restart. A time limit
# concerns all ranks. A person who interrupts wants no restart.
REQUEST_PRIORITY = (StopRequest.early_stop, StopRequest.requeue, StopRequest.interrupt, StopRequest.save_and_stop)
RERUN_HINT = "The same command resumes from there."


class CheckpointSaver(Protocol):
    """Protocol of a callback that can save a checkpoint now."""

    def save_now(self, trainer: L.Trainer, pl_module: L.LightningModule, wait: bool) -> Any: ...


class Preemption(L.Callback):
    """Saves and exits on SIGUSR1 and SIGUSR2 (time limit, preemption), SIGTERM and Ctrl-C (`lit_vlm/fault_tolerance/signals.py`).

    Signal handlers only set a flag. The ranks exchange their flags once per optimizer step. After the step all ranks save,
    rank 0 requeues the Slurm job if requested, and all ranks raise `CoordinatedExit` with status RESTART (75), INTERRUPTED
    (130) after Ctrl-C, or 0 for early stopping by a sweep. In validation the ranks check after each batch. They check once
    more when training has ended, so a request after the exchange of the last step is not lost. This callback must come after
    the checkpoint callback, so that the last state is already on disk.
    """

    def __init__(self) -> None:
        self._signal_handler: SignalHandler | None = None
        self._stack = ExitStack()
        self._requests: list[StopRequest] = []

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._requests = []
        disable_signal_handlers(trainer)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._signal_handler = self._stack.enter_context(use_listener(_make_listener(trainer, self._requests)))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not is_last_micro_step(trainer):
            return
        flags = get_shared_flags(trainer)
        self._save_and_exit(
            trainer, pl_module, [request for request in REQUEST_PRIORITY if flags.get(StepFlag(request.value))]
        )

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
        if self._signal_handler is not None:
            self._save_and_exit(trainer, pl_module, _gather_requests(trainer, self._requests))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        handler = self._signal_handler
        if handler is None:
            return
        num_known = len(self._requests)
        requests = _gather_requests(trainer, self._requests)
        # a stop request of a sweep is void here: the run is already complete
        self._save_and_exit(
            trainer, pl_module, [request for request in requests if request is not StopRequest.early_stop]
        )
        self._release_signals()  # if a signal ends this process from here on, the next start repeats the rest
        for request in self._requests[num_known:]:
            if request is not StopRequest.early_stop:
                handler.handle_late_request(request)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._release_signals()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if self._signal_handler is not None and not self._signal_handler.is_exiting:
            self._signal_handler.pending += self._requests  # for the restart in this process, e.g. after a rollback
        self._release_signals()

    def _release_signals(self) -> None:
        self._signal_handler = None
        self._stack.close()

    def _save_and_exit(self, trainer: L.Trainer, pl_module: L.LightningModule, requests: list[StopRequest]) -> None:
        if not requests:
            return
        if self._signal_handler is not None:
            self._signal_handler.is_exiting = True
        saved = _save_checkpoint(trainer, pl_module)
        request = _resolve_request(trainer, requests[0])
        if trainer.is_global_zero:
            print(f"Asked to {request}: {saved}; {_requeue_if_requested(request)}", flush=True)
        trainer.strategy.barrier("leave")  # Slurm must answer first: the first exit ends the job step
        if request is StopRequest.early_stop:
            raise EarlyStoppingExit
        raise CoordinatedExit(INTERRUPTED if request is StopRequest.interrupt else RESTART)


def _make_listener(trainer: L.Trainer, requests: list[StopRequest]) -> Callable[[StopRequest], None]:
    flags = get_shared_flags(trainer)

    def add_request(request: StopRequest) -> None:
        requests.append(request)
        flags.add(StepFlag(request.value))

    return add_request


def _gather_requests(trainer: L.Trainer, own_requests: list[StopRequest]) -> list[StopRequest]:
    """Gather the requests of all ranks, by priority. All ranks must call it at the same point."""
    snapshot = own_requests[:]
    counts = sum_over_ranks(trainer, [float(request in snapshot) for request in REQUEST_PRIORITY])
    return [request for request, count in zip(REQUEST_PRIORITY, counts, strict=True) if count]


def _resolve_request(trainer: L.Trainer, request: StopRequest) -> StopRequest:
    """Resolve a signal from the agent of a sweep: early stopping of this run, or the end of the agent itself.

    Rank 0 asks W&B and broadcasts the answer.
    """
    if request not in (StopRequest.save_and_stop, StopRequest.requeue) or not is_in_sweep():
        return request
    trackers = [logger for logger in trainer.loggers if hasattr(logger, "is_asked_to_stop")]
    should_stop = any(tracker.is_asked_to_stop() for tracker in trackers)
    return StopRequest.early_stop if trainer.strategy.broadcast(should_stop) else request


def _save_checkpoint(trainer: L.Trainer, pl_module: L.LightningModule) -> str:
    """Save a checkpoint now and return a phrase that reports it."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    saver: CheckpointSaver | None = next((callback for callback in callbacks if hasattr(callback, "save_now")), None)
    if saver is None:
        return f"left after step {trainer.global_step:,} without saving, for no checkpoint callback is there"
    saver.save_now(trainer, pl_module, wait=True)
    return f"saved at step {trainer.global_step:,}"


def _requeue_if_requested(request: StopRequest) -> str:
    """Requeue the Slurm job where the request needs it, and return a phrase that reports what happens next."""
    if request is StopRequest.early_stop:
        return "the sweep wants no more of this run. Its state is kept."
    if is_in_sweep() and request is not StopRequest.interrupt:
        # the agent owns the job and requeues it
        return "left. The next agent of the sweep resumes from there."
    job = get_own_job()
    if (
        job is None
        or request is StopRequest.interrupt
        or (request is StopRequest.save_and_stop and not is_preempted(job))
    ):
        return f"left. {RERUN_HINT}"
    refusal = requeue(job)
    if refusal:
        return f"job {job} could not be requeued ({refusal}). Submit it again: {RERUN_HINT[0].lower()}{RERUN_HINT[1:]}"
    return f"job {job} is requeued and resumes from there."
