"""Builds Lightning's strategy from the trainer settings: DDP, ZeRO, FSDP2 or hsdp."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from datetime import timedelta
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies import Strategy as LightningStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lit_vlm.config.choices import StrategyName
from lit_vlm.config.schema import TrainerConfig
from lit_vlm.distributed.ranks import make_cluster_plugins
from lit_vlm.types import UserError

ZERO_STAGES = {
    StrategyName.deepspeed_zero2: 2,
    StrategyName.deepspeed_zero3: 3,
    StrategyName.deepspeed_zero3_offload: 3,
}


def make_strategy(config: TrainerConfig, auto_strategy: StrategyName = StrategyName.ddp) -> LightningStrategy | str:
    """Make the strategy that `trainer.strategy` names, on GPUs (NCCL) or on CPU processes (gloo).

    Args:
        auto_strategy: meaning of `trainer.strategy=auto` on several devices; on one device it is `single`.

    Returns:
        the strategy, with its name in the attribute `setting`; for one device the text "auto".
    """
    name = resolve_strategy(config, auto_strategy)
    if name is StrategyName.single:
        return "auto"  # for Lightning: one device of any kind
    strategy: Any = _build_strategy(config, name)
    strategy.setting = name.value
    return strategy


def _build_strategy(config: TrainerConfig, name: StrategyName) -> LightningStrategy:
    # longer than the watchdog (watch_thread.py), which reports first, with stacks
    timeout = timedelta(minutes=config.timeout_minutes, seconds=30)
    if name is StrategyName.ddp:
        return DDPStrategy(timeout=timeout)
    if name in ZERO_STAGES:  # import the engines below only on use: each import takes seconds
        if config.accelerator == "cpu":
            os.environ["DS_ACCELERATOR"] = "cpu"  # else DeepSpeed uses any GPU that it finds
        from lit_vlm.distributed.zero import ZeroStrategy

        offload = name is StrategyName.deepspeed_zero3_offload
        return ZeroStrategy(stage=ZERO_STAGES[name], offload=offload, timeout=timeout)
    from lit_vlm.distributed.fsdp import FSDP2Strategy

    options: dict[str, Any] = {"shard_size": config.shard_size} if name is StrategyName.hsdp else {}
    return FSDP2Strategy(hybrid=name is StrategyName.hsdp, timeout=timeout, **options)


def resolve_strategy(config: TrainerConfig, auto_strategy: StrategyName = StrategyName.ddp) -> StrategyName:
    """Resolve `trainer.strategy`: replace `auto` by a strategy."""
    if config.strategy is not StrategyName.auto:
        return config.strategy
    return auto_strategy if config.devices * config.num_nodes > 1 else StrategyName.single


def make_trainer(
    trainer: TrainerConfig, loggers: list[Logger], callbacks: list[L.Callback], *, validate_every_steps: int | None
) -> L.Trainer:
    """Make the Trainer. The plan defines its steps: one epoch of known length.

    Args:
        validate_every_steps: optimizer steps between two validations; None: one validation, at the end.
    """
    disable_library_warnings()
    if trainer.num_threads:
        torch.set_num_threads(trainer.num_threads)
    torch.set_flush_denormal(True)  # numbers below 1e-38 do not change a loss, but they slow a CPU down
    progress_bars = [RichProgressBar()] if trainer.enable_progress_bar and sys.stdout.isatty() else []
    options: dict[str, Any] = {
        "accelerator": trainer.accelerator,
        "devices": trainer.devices,
        "num_nodes": trainer.num_nodes,
        "strategy": make_strategy(trainer),
        "precision": trainer.precision,
        "gradient_clip_val": trainer.gradient_clip_val,
        "log_every_n_steps": trainer.log_every_n_steps,
        "limit_val_batches": trainer.limit_val_batches,
        "deterministic": trainer.deterministic,
        "max_epochs": 1,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,  # the plan assigns samples to ranks
        "enable_checkpointing": False,
        "enable_model_summary": False,  # our table of trainable parts shows more
        "enable_progress_bar": bool(progress_bars),
        "logger": loggers,
        "callbacks": [*callbacks, *progress_bars],
        "plugins": make_cluster_plugins(trainer.devices, trainer.num_nodes),
        **trainer.extra,
    }
    if validate_every_steps:
        options |= {"val_check_interval": validate_every_steps, "check_val_every_n_epoch": None}
    try:
        return L.Trainer(**options)
    except (MisconfigurationException, ValueError, TypeError, RuntimeError, ImportError) as error:
        raise UserError(
            f"Lightning refuses the trainer's settings: {error} Change trainer.*; trainer=cpu runs anywhere."
        ) from error


def close_process_group() -> None:
    """Wait for all ranks and destroy the process group.

    A process that exits while threads of its group still run may abort (observed with gloo).
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def disable_library_warnings() -> None:
    """Disable warnings of libraries that do not apply here: the plan controls order, sizes and workers of the loader."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    for pattern in (
        ".*does not have many workers.*",
        ".*Checkpoint directory.*",
        ".*Experiment logs directory.*",
        ".*lr_scheduler.step.*",
        ".*`srun` command is available.*",  # a single-machine run on a cluster's login node
        ".*treespec, LeafSpec.*",  # Lightning calls it, torch deprecates it
        ".*functional.all_gather is deprecated.*",  # the same
        ".*ended before the epoch ended and your dataloader is not resumable.*",  # our loader starts at the step where the run resumes
        ".*in eval mode at the start of training.*",  # frozen parts are in eval mode on purpose
        ".*when logging on epoch level in distributed setting.*",  # the logged values are reduced over all ranks already
        ".*called before the ``update``.*",  # a rank may have no sample of some kind
        ".*across ranks is zero.*",  # there are no held-out samples
    ):
        warnings.filterwarnings("ignore", message=pattern)
