"""Lightning's Trainer from the settings."""

from __future__ import annotations

import logging
import sys
import warnings
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lit_vlm.config.schema import RunConfig
from lit_vlm.engine.ranks import cluster_environment
from lit_vlm.engine.strategy import make_strategy
from lit_vlm.types import UserError

FEW_STEPS = 4  # debug=fast
PROFILED_STEPS = 6  # debug=profile: three to warm up and three that are looked at


def make_trainer(config: RunConfig, loggers: list[Logger], callbacks: list[L.Callback]) -> L.Trainer:
    """A Trainer whose steps come from the plan: one epoch of known length."""
    quiet()
    trainer = config.trainer
    if trainer.num_threads:
        torch.set_num_threads(trainer.num_threads)
    torch.set_flush_denormal(True)  # numbers below 1e-38 are nothing to a loss and slow a CPU down
    bar = [RichProgressBar()] if trainer.enable_progress_bar and sys.stdout.isatty() else []
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
        "use_distributed_sampler": False,  # the plan deals to ranks
        "enable_checkpointing": False,
        "enable_model_summary": False,  # the table of what trains says more
        "enable_progress_bar": bool(bar),
        "logger": loggers,
        "callbacks": [*callbacks, *bar],
        "plugins": cluster_environment(trainer.devices, trainer.num_nodes),
        **trainer.extra,
    }
    if config.data.validation.every_steps:
        options |= {"val_check_interval": config.data.validation.every_steps, "check_val_every_n_epoch": None}
    try:
        return L.Trainer(**options)
    except (MisconfigurationException, ValueError, TypeError, RuntimeError, ImportError) as error:
        raise UserError(
            f"Lightning refuses the trainer's settings: {error} Change trainer.*; trainer=cpu runs anywhere."
        ) from error


def leave_process_group() -> None:
    """Once all ranks are done: a process that ends while its group's threads still run may abort (seen with gloo)."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def quiet() -> None:
    """Silence advice that does not apply: the loader's order, sizes and workers are the plan's business."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    for text in (
        ".*does not have many workers.*",
        ".*Checkpoint directory.*",
        ".*Experiment logs directory.*",
        ".*lr_scheduler.step.*",
        ".*`srun` command is available.*",  # a run of one machine on a cluster's login node
        ".*treespec, LeafSpec.*",  # Lightning's call, torch's deprecation
        ".*functional.all_gather is deprecated.*",  # likewise
        ".*ended before the epoch ended and your dataloader is not resumable.*",  # ours begins where the run goes on
        ".*in eval mode at the start of training.*",  # frozen parts are, on purpose
        ".*when logging on epoch level in distributed setting.*",  # what is logged there is of all ranks already
        ".*called before the ``update``.*",  # a rank may hold no sample of a kind
        ".*across ranks is zero.*",  # nothing held out
    ):
        warnings.filterwarnings("ignore", message=text)
