"""One interface to the training state that a rank holds: each shard is an interval of one flattened tensor.

Under DDP a rank holds each tensor completely, under ZeRO a slice of the flattened tensor, under FSDP2 some rows of it.
Checkpoints consist of these intervals. So a run can resume under another strategy or world size, without a gather.
"""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy

from lit_vlm.engine.shards.base import ShardedState, StateKind, TensorShard
from lit_vlm.engine.shards.whole import ReplicatedState

__all__ = ["ReplicatedState", "ShardedState", "StateKind", "TensorShard", "get_sharded_state"]


def get_sharded_state(trainer: L.Trainer) -> ShardedState:
    """Return this rank's part of the trainable state. Call it once the strategy has set up model and optimizer."""
    module: Any = trainer.lightning_module
    model, optimizer = getattr(module, "model", module), trainer.optimizers[0]
    if isinstance(trainer.strategy, DeepSpeedStrategy):
        from lit_vlm.engine.shards.zero import ZeroShardedState

        return ZeroShardedState(model, optimizer)
    if isinstance(trainer.strategy, ModelParallelStrategy):
        from lit_vlm.engine.shards.fsdp import FSDPShardedState

        return FSDPShardedState(model, optimizer)
    return ReplicatedState(model, optimizer, trainer.global_rank)
