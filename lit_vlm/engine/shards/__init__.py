"""What one rank holds of a run's state, told alike by every strategy: each tensor's share is one interval of it, flattened.

A whole model holds all of each tensor, ZeRO a slice of the flattened one, FSDP2 rows of it. Checkpoints are made of
these intervals, so that a run moves between strategies and world sizes without gathering anything.
"""

from lit_vlm.engine.shards.base import Kind, Piece, Shards

__all__ = ["Kind", "Piece", "Shards"]
