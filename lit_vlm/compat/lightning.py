"""Private parts of Lightning: counters of its training loop, pending metrics, signal handlers."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import lightning as L
import torch
from torch import Tensor


def get_batch_index(trainer: L.Trainer) -> int:
    """Return the index of the current micro-batch, counted over the whole run on this rank."""
    return trainer.fit_loop.epoch_loop.batch_idx


def is_last_micro_step(trainer: L.Trainer) -> bool:
    """Return True if the current micro-batch is the last one before the update (gradient accumulation)."""
    return (get_batch_index(trainer) + 1) % trainer.accumulate_grad_batches == 0


def should_accumulate(trainer: L.Trainer) -> bool:
    """Return True if Lightning takes no optimizer step after the current micro-batch."""
    return trainer.fit_loop._should_accumulate()


def get_num_steps(trainer: L.Trainer) -> int:
    """Return the number of optimizer steps after which training ends; -1: unknown."""
    return trainer.fit_loop.epoch_loop.max_steps


def set_num_steps(trainer: L.Trainer, steps: int) -> None:
    """Set the number of optimizer steps after which training ends."""
    trainer.fit_loop.epoch_loop.max_steps = steps


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


def discard_logged_value(trainer: L.Trainer, name: str) -> None:
    """Discard the value that `training_step` logged under this name at an earlier step; Lightning would log it again."""
    trainer._results.pop(f"training_step.{name}", None)


def disable_signal_handlers(trainer: L.Trainer) -> None:
    """Disable Lightning's signal handling.

    Its handler makes ranks wait for each other, and its broadcast before each micro-batch makes the host wait for the device.
    """
    trainer._signal_connector.register_signal_handlers = lambda: None
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None


def has_distributed_sampler(trainer: L.Trainer) -> bool:
    """Return True if Lightning adds its own distributed sampler to loaders."""
    return trainer._accelerator_connector.use_distributed_sampler


def get_trainer(module: L.LightningModule) -> L.Trainer | None:
    """Return the trainer of a module; None if it has none, where the public property raises an error."""
    return module._trainer


def set_hparams(module: L.LightningModule, hparams: dict[str, Any]) -> None:
    """Set the hyperparameters that Lightning stores in its checkpoints. The logger does not get them."""
    module._set_hparams(hparams)
    module._log_hyperparams = False


def allow_clipping(optimizer: torch.optim.Optimizer) -> None:
    """Allow Lightning to clip the gradients of an optimizer that can unscale them itself, as the fused one can.

    Under bf16-mixed there is no scale, and under 16-mixed the scaler then unscales before clipping.
    """
    optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]


def set_purge_step(logger: Any, step: int) -> None:
    """Make a `TensorBoardLogger` mark the events after `step` in its folder as purged."""
    logger._kwargs["purge_step"] = step


def set_mesh_shape(strategy: Any, *, data_parallel: int, tensor_parallel: int) -> None:
    """Set the shape of the device mesh that Lightning's `ModelParallelStrategy` makes."""
    strategy._data_parallel_size, strategy._tensor_parallel_size = data_parallel, tensor_parallel
