"""A run's name is what was chosen: the experiment, and a short hash of what differs from it. The clock has no
part in it, so a job that is started again finds its own folder, on a laptop and on eight GPUs alike.
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
from lit_vlm.config.overrides import key_of, with_implied
from lit_vlm.config.recipe import experiment_of, overrides_for, stage_before
from lit_vlm.types import UserError

# Where and how fast a run computes, not what: the same run on another machine keeps its name.
NOT_IDENTITY = (
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.accelerator",
    "trainer.strategy",
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
    "logger",
    "callbacks",
    "run_dir",
    "run_name",
    "overwrite",
    "task",
    "recipe",
    "image",
    "prompt",
    "max_new_tokens",
)


def run_name(overrides: list[str]) -> str:
    """The folder of a run below run_dir: `tiny/2_sft`, `tiny/2_sft-3fa2b1c0`, in a sweep `tiny/2_sft-<run id>`.

    A name given with run_name= stands as it is, but in a sweep, where all trials would share it.
    """
    given, run_id = composed(overrides).run_name, os.environ.get("WANDB_RUN_ID")
    if given and not os.environ.get("WANDB_SWEEP_ID"):
        return given
    name = given or name_by_choices(overrides)
    return f"{name}-{run_id}" if run_id else name


def name_by_choices(overrides: list[str]) -> str:
    """The experiment, or train/<stage>, and 8 hex digits of the SHA-256 of the settings that differ from its own."""
    config, experiment = composed(overrides), experiment_of(overrides)
    base = "experiment" if experiment else "stage"
    plain = composed([text for text in overrides if key_of(text) in (base, "hydra.searchpath")])
    mine, theirs = _flat(config), _flat(plain)
    changed = {
        key: mine.get(key, "(taken away)") for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key)
    }
    changed = {key: value for key, value in changed.items() if not _left_out(key)}
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
    """Where the run of these overrides leaves its finished model."""
    return str(Path(composed(overrides).run_dir) / run_name(overrides) / "hf")


def previous_folder(overrides: list[str]) -> str:
    """What init_from=previous means: the finished model of the same recipe's stage before, run with the same overrides.

    Without stage.*, init_from and run_name, which are each stage's own, and without a sweep's run id, which is each
    trial's own.

    Raises:
        UserError: there is no stage before.
    """
    experiment = experiment_of(overrides)
    before = stage_before(experiment, overrides) if experiment and "/" in experiment else None
    if before is None:
        here = f"experiment={experiment} is the first stage" if experiment else "no experiment= is named"
        raise UserError(f"init_from=previous: {here}, so there is no stage before. Name a folder or a hub id.")
    shared = [
        text
        for text in overrides
        if key_of(text) not in ("stage", "run_name") and not key_of(text).startswith("stage.")
    ]
    words = with_implied([f"experiment={before}", *overrides_for(shared, before)])
    return str(Path(composed(words).run_dir) / name_by_choices(words) / "hf")


def same_folder(one: str, other: str) -> bool:
    """Whether two paths, from the current folder, are one."""
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
    """A path inside run_dir relative to it, so that a name does not depend on where the runs are kept."""
    inside, outside = Path(path).expanduser().absolute(), Path(run_dir).expanduser().absolute()
    return inside.relative_to(outside).as_posix() if inside.is_relative_to(outside) else path


def _left_out(key: str) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in NOT_IDENTITY)


def _flat(config: DictConfig) -> dict[str, Any]:
    return dict(_leaves(OmegaConf.to_container(config, enum_to_str=True)))


def _leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value
