"""Builds Lightning's strategy from the trainer settings: DDP, ZeRO, FSDP2 or hsdp."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies import Strategy as LightningStrategy

from lit_vlm.config.schema import StrategyName, TrainerConfig

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
        from lit_vlm.engine.deepspeed import ZeroStrategy

        offload = name is StrategyName.deepspeed_zero3_offload
        return ZeroStrategy(stage=ZERO_STAGES[name], offload=offload, timeout=timeout)
    from lit_vlm.engine.fsdp import FSDP2Strategy

    options: dict[str, Any] = {"shard_size": config.shard_size} if name is StrategyName.hsdp else {}
    return FSDP2Strategy(hybrid=name is StrategyName.hsdp, timeout=timeout, **options)


def resolve_strategy(config: TrainerConfig, auto_strategy: StrategyName = StrategyName.ddp) -> StrategyName:
    """Resolve `trainer.strategy`: replace `auto` by a strategy."""
    if config.strategy is not StrategyName.auto:
        return config.strategy
    return auto_strategy if config.devices * config.num_nodes > 1 else StrategyName.single
