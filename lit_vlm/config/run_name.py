"""Settings excluded from the identity of a run.

They say where and how fast a run computes, not what it computes: the same run on other machines keeps its name and its folder.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from lit_vlm.config.compose import compose_config, flatten_config
from lit_vlm.config.overrides import add_implied_overrides, get_override_key
from lit_vlm.config.recipe import filter_overrides_for_stage, get_experiment, get_previous_stage
from lit_vlm.types import UserError

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
    "curate",
    "generate",
    "serve",
    "demo",
    "view",
    "benchmarks",
    "evaluate",
    "judge",
    "logger",
    "callbacks",
    "export",
    "special_boxes",
    "run_dir",
    "run_name",
    "overwrite",
    "language",
    "task",
    "recipe",
    "sync",
    "runs",
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


def get_run_name(overrides: list[str]) -> str:
    """Return the folder of a run below run_dir: `tiny/2_sft`, `tiny/2_sft-3fa2b1c0`, in a sweep `tiny/2_sft-<run id>`.

    A name from run_name= is used unchanged, except in a sweep, where all trials would share it.
    """
    explicit_name, run_id = compose_config(overrides).run_name, os.environ.get("WANDB_RUN_ID")
    if explicit_name and not os.environ.get("WANDB_SWEEP_ID"):
        return explicit_name
    name = explicit_name or compute_run_name(overrides)
    return f"{name}-{run_id}" if run_id else name


def compute_run_name(overrides: list[str]) -> str:
    """Compute a run name: experiment or train/<stage>, and 8 hex digits of the SHA-256 of the settings that differ from it."""
    config, experiment = compose_config(overrides), get_experiment(overrides)
    base = "experiment" if experiment else "stage"
    current = flatten_config(overrides)
    default = flatten_config([text for text in overrides if get_override_key(text) in (base, "hydra.searchpath")])
    changed = {
        key: current.get(key, "(taken away)")
        for key in current.keys() | default.keys()
        if current.get(key) != default.get(key)
    }
    changed = {key: value for key, value in changed.items() if not is_non_identity_key(key)}
    if _is_initialised_from_previous(overrides):
        changed.pop("init_from", None)
    elif "init_from" in changed:
        changed["init_from"] = _make_relative(str(changed["init_from"]), config.run_dir)
    name = experiment or f"train/{config.stage.name.value}"
    if not changed:
        return name
    text = json.dumps(changed, sort_keys=True, ensure_ascii=False)
    return f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def get_hf_folder(overrides: list[str]) -> str:
    """Return the folder of the exported model of the run with these overrides."""
    return str(Path(compose_config(overrides).run_dir) / get_run_name(overrides) / "hf")


def get_previous_stage_folder(overrides: list[str]) -> str:
    """Return the folder that init_from=previous means: the exported model of the recipe's previous stage, same overrides.

    Settings of a single stage (stage.*, init_from, run_name) and the run id of a trial in a sweep are excluded.

    Raises:
        UserError: the stage is the first one.
    """
    experiment = get_experiment(overrides)
    previous = get_previous_stage(experiment, overrides) if experiment and "/" in experiment else None
    if previous is None:
        reason = f"experiment={experiment} is the first stage" if experiment else "no experiment= is named"
        raise UserError(f"init_from=previous: {reason}, so there is no stage before. Name a folder or a hub id.")
    shared = [
        override
        for override in overrides
        if get_override_key(override) not in ("stage", "run_name")
        and not get_override_key(override).startswith("stage.")
    ]
    previous_overrides = add_implied_overrides(
        [f"experiment={previous}", *filter_overrides_for_stage(shared, previous)]
    )
    return str(Path(compose_config(previous_overrides).run_dir) / compute_run_name(previous_overrides) / "hf")


def is_same_folder(left: str, right: str) -> bool:
    """Return True if two paths, relative to the current folder, are the same."""
    return Path(left).expanduser().absolute() == Path(right).expanduser().absolute()


def _is_initialised_from_previous(overrides: list[str]) -> bool:
    init_from = compose_config(overrides).init_from
    if init_from in (None, "previous"):
        return init_from == "previous"
    try:
        return is_same_folder(init_from, get_previous_stage_folder(overrides))
    except UserError:
        return False


def _make_relative(path: str, run_dir: str) -> str:
    """Make a path inside run_dir relative to it, so that a run name does not depend on the location of run_dir."""
    absolute, root = Path(path).expanduser().absolute(), Path(run_dir).expanduser().absolute()
    return absolute.relative_to(root).as_posix() if absolute.is_relative_to(root) else path
