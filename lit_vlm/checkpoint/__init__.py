"""Checkpoints of an unfinished run, in one layout for every strategy and any number of ranks. See `layout.py`."""

from lit_vlm.checkpoint.folder import CheckpointFolder
from lit_vlm.checkpoint.index import (
    CheckpointIndex,
    CorruptCheckpointError,
    RunFingerprint,
    SampleHash,
    compute_plan_digest,
)
from lit_vlm.checkpoint.resume import load_tensors, read_index
from lit_vlm.checkpoint.write import CheckpointWriter

__all__ = [
    "CheckpointFolder",
    "CheckpointIndex",
    "CheckpointWriter",
    "CorruptCheckpointError",
    "RunFingerprint",
    "SampleHash",
    "compute_plan_digest",
    "load_tensors",
    "read_index",
]
