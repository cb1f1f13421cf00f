"""Moves Lightning's training loop to a given optimizer step, so that a run can resume there."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import lightning as L
from torch import Tensor


def set_loop_position(trainer: L.Trainer, step: int) -> None:
    """Set loop counters and learning-rate schedule to the state after `step` optimizer steps. Call it before the loop begins.

    The micro-batch counter follows the current packing, because a step may now be packed into another number of
    micro-batches. A run that was interrupted after its last step still validates and ends like an uninterrupted run.
    """
    fit, epoch = trainer.fit_loop, trainer.fit_loop.epoch_loop
    optimizer = epoch.automatic_optimization.optim_progress.optimizer
    _set_counters(epoch.batch_progress, step * trainer.accumulate_grad_batches)
    for progress in (epoch.scheduler_progress, optimizer.step, optimizer.zero_grad):
        _set_counters(progress, step)
    epoch._batches_that_stepped = step
    if step >= fit.max_steps > 0:  # else the loop would not start, and its end (validation, export) would not run
        epoch.max_steps = step + 1
    fit.epoch_progress.total.ready = fit.epoch_progress.current.ready = 1  # the current epoch
    # a validation of this step runs again: its result was not saved
    epoch.val_loop.batch_progress.total.ready = epoch.val_loop.batch_progress.total.started = 1
    fit.restarting = True
    if fit._data_fetcher is not None:  # the loader exists already; build it again, from this step on
        fit._data_fetcher.teardown()
        fit._combined_loader = fit._data_fetcher = None
    for config in trainer.lr_scheduler_configs:
        config.scheduler.last_epoch = step - 1
        config.scheduler.step()


def move_validation_to_previous_step(trainer: L.Trainer) -> None:
    """Assign a validation that is due before the first resumed step to the previous step, in the logs as well.

    Call it once the loop has its loader.
    """
    epoch, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
    if epoch.restarting and epoch._should_check_val_fx(fetcher):
        epoch._batches_that_stepped -= 1


def get_pending_metrics(trainer: L.Trainer) -> dict[str, float] | None:
    """Return the metrics that Lightning will log for the current step; it does so only after the callbacks.

    None if no metrics are due.
    """
    if trainer.validating or trainer.interrupted:
        return None  # they are logged already, or the step was ended by an exception and has none
    connector = trainer._logger_connector
    metrics = connector.metrics["log"] if connector.should_update_logs else {}
    if not metrics:
        return None
    values = {name: value.item() if isinstance(value, Tensor) else value for name, value in metrics.items()}
    return {"epoch": trainer.current_epoch, **values, "step": trainer.fit_loop.epoch_loop._batches_that_stepped}


def _set_counters(progress: Any, number: int) -> None:
    for tracker in (progress.total, progress.current):
        for field in fields(tracker):
            setattr(tracker, field.name, number)
