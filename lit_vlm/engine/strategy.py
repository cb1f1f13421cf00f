"""How the devices share the work: Lightning's strategies from the settings."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies import Strategy as LightningStrategy

from lit_vlm.config.schema import Strategy, TrainerConfig

ZERO_STAGES = {Strategy.deepspeed_zero2: 2, Strategy.deepspeed_zero3: 3, Strategy.deepspeed_zero3_offload: 3}


def make_strategy(config: TrainerConfig, auto: Strategy = Strategy.ddp) -> LightningStrategy | str:
    """The strategy that `trainer.strategy` names, on GPUs (NCCL) or as CPU processes (gloo).

    Args:
        auto: what `trainer.strategy=auto` means on several devices; on one it is `single`.

    Returns:
        With the name in `setting`.
    """
    name = settled(config, auto)
    if name is Strategy.single:
        return "auto"  # Lightning's word for one device, whichever there is
    made: Any = _made(config, name)
    made.setting = name.value
    return made


def _made(config: TrainerConfig, name: Strategy) -> LightningStrategy:
    # the watch (watch_thread.py) comes first, with stacks
    timeout = timedelta(minutes=config.timeout_minutes, seconds=30)
    if name is Strategy.ddp:
        return DDPStrategy(timeout=timeout)
    if name in ZERO_STAGES:  # the engines below are imported when they are asked for: each takes seconds
        if config.accelerator == "cpu":
            os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed takes a GPU where there is one, whatever the trainer does
        from lit_vlm.engine.deepspeed import ZeroStrategy

        offload = name is Strategy.deepspeed_zero3_offload
        return ZeroStrategy(stage=ZERO_STAGES[name], offload=offload, timeout=timeout)
    from lit_vlm.engine.fsdp import FSDP2Strategy

    options: dict[str, Any] = {"shard_size": config.shard_size} if name is Strategy.hsdp else {}
    return FSDP2Strategy(hybrid=name is Strategy.hsdp, timeout=timeout, **options)


def settled(config: TrainerConfig, auto: Strategy = Strategy.ddp) -> Strategy:
    """`trainer.strategy`, with `auto` decided."""
    if config.strategy is not Strategy.auto:
        return config.strategy
    return auto if config.devices * config.num_nodes > 1 else Strategy.single
