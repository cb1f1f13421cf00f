"""Run names. A name is the experiment and a short hash of the settings that differ from it.

The time is no part of the name. A job that is started again therefore finds its own folder, on a laptop and on eight GPUs.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lit_vlm.config.compose import composed
from lit_vlm.config.elsewhere import is_elsewhere
from lit_vlm.config.overrides import key_of, with_implied
from lit_vlm.config.recipe import experiment_of, overrides_for, stage_before
from lit_vlm.types import UserError


def run_name(overrides: list[str]) -> str:
    """Return the folder of a run below run_dir: `tiny/2_sft`, `tiny/2_sft-3fa2b1c0`, in a sweep `tiny/2_sft-<run id>`.

    A name from run_name= is used unchanged, except in a sweep, where all trials would share it.
    """
    explicit_name, run_id = composed(overrides).run_name, os.environ.get("WANDB_RUN_ID")
    if explicit_name and not os.environ.get("WANDB_SWEEP_ID"):
        return explicit_name
    name = explicit_name or name_by_choices(overrides)
    return f"{name}-{run_id}" if run_id else name


def name_by_choices(overrides: list[str]) -> str:
    """Compute a run name: experiment or train/<stage>, and 8 hex digits of the SHA-256 of the settings that differ from it."""
    config, experiment = composed(overrides), experiment_of(overrides)
    base = "experiment" if experiment else "stage"
    default_config = composed([text for text in overrides if key_of(text) in (base, "hydra.searchpath")])
    current, default = _flat(config), _flat(default_config)
    changed = {
        key: current.get(key, "(taken away)")
        for key in current.keys() | default.keys()
        if current.get(key) != default.get(key)
    }
    changed = {key: value for key, value in changed.items() if not is_elsewhere(key)}
    if _starts_from_previous(overrides):
        changed.pop("init_from", None)
    elif "init_from" in changed:
        changed["init_from"] = _below(str(changed["init_from"]), config.run_dir)
    name = experiment or f"train/{config.stage.name.value}"
    if not changed:
        return name
    text = json.dumps(changed, sort_keys=True, ensure_ascii=False)
    return f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def hf_folder(overrides: list[str]) -> str:
    """Return the folder of the exported model of the run with these overrides."""
    return str(Path(composed(overrides).run_dir) / run_name(overrides) / "hf")


def previous_folder(overrides: list[str]) -> str:
    """Return the folder that init_from=previous means: the exported model of the recipe's previous stage, same overrides.

    Settings of a single stage (stage.*, init_from, run_name) and the run id of a trial in a sweep are excluded.

    Raises:
        UserError: the stage is the first one.
    """
    experiment = experiment_of(overrides)
    previous = stage_before(experiment, overrides) if experiment and "/" in experiment else None
    if previous is None:
        reason = f"experiment={experiment} is the first stage" if experiment else "no experiment= is named"
        raise UserError(f"init_from=previous: {reason}, so there is no stage before. Name a folder or a hub id.")
    shared = [
        override
        for override in overrides
        if key_of(override) not in ("stage", "run_name") and not key_of(override).startswith("stage.")
    ]
    previous_overrides = with_implied([f"experiment={previous}", *overrides_for(shared, previous)])
    return str(Path(composed(previous_overrides).run_dir) / name_by_choices(previous_overrides) / "hf")


def same_folder(one: str, other: str) -> bool:
    """Return True if two paths, relative to the current folder, are the same."""
    return Path(one).expanduser().absolute() == Path(other).expanduser().absolute()


def _starts_from_previous(overrides: list[str]) -> bool:
    init_from = composed(overrides).init_from
    if init_from in (None, "previous"):
        return init_from == "previous"
    try:
        return same_folder(init_from, previous_folder(overrides))
    except UserError:
        return False


def _below(path: str, run_dir: str) -> str:
    """Make a path inside run_dir relative to it, so that a run name does not depend on the location of run_dir."""
    absolute, root = Path(path).expanduser().absolute(), Path(run_dir).expanduser().absolute()
    return absolute.relative_to(root).as_posix() if absolute.is_relative_to(root) else path


def _flat(config: DictConfig) -> dict[str, Any]:
    return dict(_leaves(OmegaConf.to_container(config, enum_to_str=True)))


def _leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value
