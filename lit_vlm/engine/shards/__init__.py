"""What one rank holds of a run's state, told alike by every strategy: each tensor's share is one interval of it, flattened.

A whole model holds all of each tensor, ZeRO a slice of the flattened one, FSDP2 rows of it. Checkpoints are made of
these intervals, so that a run moves between strategies and world sizes without gathering anything.
"""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy

from lit_vlm.engine.shards.base import Kind, Piece, Shards
from lit_vlm.engine.shards.whole import Whole

__all__ = ["Kind", "Piece", "Shards", "Whole", "shards_of"]


def shards_of(trainer: L.Trainer) -> Shards:
    """This rank's share of what trains, once the strategy has set up model and optimizer."""
    module: Any = trainer.lightning_module
    model, optimizer = getattr(module, "model", module), trainer.optimizers[0]
    if isinstance(trainer.strategy, DeepSpeedStrategy):
        from lit_vlm.engine.shards.zero import ZeroShards

        return ZeroShards(model, optimizer)
    if isinstance(trainer.strategy, ModelParallelStrategy):
        from lit_vlm.engine.shards.fsdp import FSDPShards

        return FSDPShards(model, optimizer)
    return Whole(model, optimizer, trainer.global_rank)
