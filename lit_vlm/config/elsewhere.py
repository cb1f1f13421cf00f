"""Settings excluded from the identity of a run.

They say where and how fast a run computes, not what it computes: the same run on other machines keeps its name and its folder.
"""

from __future__ import annotations

NON_IDENTITY_KEYS = (
    "stage.activation_checkpointing",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.accelerator",
    "trainer.strategy",
    "trainer.timeout_minutes",
    "trainer.shard_size",
    "trainer.num_threads",
    "trainer.enable_progress_bar",
    "data.tokens_per_micro_batch",
    "data.tiles_per_micro_batch",
    "data.num_workers",
    "data.prefetch_factor",
    "data.index_dir",
    "data.index_workers",
    "data.verify",
    "data.lock",
    "preflight",
    "prefer",
    "logger",
    "callbacks",
    "export",
    "run_dir",
    "run_name",
    "overwrite",
    "task",
    "recipe",
    "sync",
    "image",
    "prompt",
    "max_new_tokens",
    "checkpoint",
    "submit",
    "sweep",
    "trials",
    "resume_from",
    "guard.heartbeat_seconds",
    "guard.max_oom_retries",
)


def is_non_identity_key(key: str) -> bool:
    """Return True if a dotted key is one of these settings or inside one."""
    return any(key == name or key.startswith(f"{name}.") for name in NON_IDENTITY_KEYS)
