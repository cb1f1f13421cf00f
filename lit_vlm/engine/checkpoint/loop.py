"""Lightning's loop as it stands after a number of optimizer steps, without having taken them."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import lightning as L
from torch import Tensor


def go_to(trainer: L.Trainer, step: int) -> None:
    """Counters and learning rates as after `step` steps of this run; to be called before the loop begins.

    Micro-batches are counted anew: a step may be dealt into another number of them than before. A run that was left
    after its last step still validates and ends as one that was not.
    """
    fit, epoch = trainer.fit_loop, trainer.fit_loop.epoch_loop
    optimizer = epoch.automatic_optimization.optim_progress.optimizer
    _count(epoch.batch_progress, step * trainer.accumulate_grad_batches)
    for progress in (epoch.scheduler_progress, optimizer.step, optimizer.zero_grad):
        _count(progress, step)
    epoch._batches_that_stepped = step
    if step >= fit.max_steps > 0:  # else the loop would not begin, and what comes after the last step would not come
        epoch.max_steps = step + 1
    fit.epoch_progress.total.ready = fit.epoch_progress.current.ready = 1  # the epoch that is under way
    # a validation that falls on this step is run again: what it found was not saved
    epoch.val_loop.batch_progress.total.ready = epoch.val_loop.batch_progress.total.started = 1
    fit.restarting = True
    if fit._data_fetcher is not None:  # something asked for the loader already; it is made anew, from this step on
        fit._data_fetcher.teardown()
        fit._combined_loader = fit._data_fetcher = None
    for config in trainer.lr_scheduler_configs:
        config.scheduler.last_epoch = step - 1
        config.scheduler.step()


def note_validation(trainer: L.Trainer) -> None:
    """Once the loop has its loader: a validation that is due first belongs to the step before, in the logs as well."""
    epoch, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
    if epoch.restarting and epoch._should_check_val_fx(fetcher):
        epoch._batches_that_stepped -= 1


def pending_row(trainer: L.Trainer) -> dict[str, float] | None:
    """What Lightning will log of the step that is ending; it does so only after the callbacks. None: nothing is due."""
    if trainer.validating or trainer.interrupted:
        return None  # it was logged, or the step in which an exception came has none yet
    connector = trainer._logger_connector
    metrics = connector.metrics["log"] if connector.should_update_logs else {}
    if not metrics:
        return None
    row = {name: value.item() if isinstance(value, Tensor) else value for name, value in metrics.items()}
    return {"epoch": trainer.current_epoch, **row, "step": trainer.fit_loop.epoch_loop._batches_that_stepped}


def _count(progress: Any, number: int) -> None:
    for tracker in (progress.total, progress.current):
        for field in fields(tracker):
            setattr(tracker, field.name, number)
