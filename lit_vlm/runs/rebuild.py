"""Rebuilds the manifest of a run folder from its checkpoints, its config.yaml and its model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from lit_vlm.checkpoint.folder import CheckpointFolder
from lit_vlm.checkpoint.index import CheckpointIndex, CorruptCheckpointError
from lit_vlm.checkpoint.resume import read_index
from lit_vlm.files import compute_weights_digest

CONFIG_FILE = "config.yaml"


def rebuild_manifest(path: Path, name: str) -> tuple[dict[str, Any] | None, str]:
    """Rebuild the manifest as far as possible.

    The fingerprint of a checkpoint, with the starting model, is compared again when the run resumes from it.

    Returns:
        the manifest, whose entry `rebuilt` names its origin, or None if no usable file is left; and a message to the user.
    """
    folder, index = CheckpointFolder(path / "checkpoints"), _read_newest_index(path)
    best, steps = folder.read_best(), folder.list_steps()
    has_model = (path / "hf" / "config.json").is_file()  # the model folder is moved there atomically
    is_finished = has_model and (not steps or (best is not None and steps == [best[0]]))
    if not (is_finished or index):
        return None, "Nothing lies beside it that the run could resume from: it starts anew."
    manifest: dict[str, Any] = {
        "status": "finished" if is_finished else "running",
        "name": name,
        "config": read_config_file(path) or (index.belongs.get("settings") if index else None) or {},
        "data": {"digest": index.belongs.get("data", "") if index else ""},
        "parent": None,
    }
    manifest["stage"] = (manifest["config"].get("stage") or {}).get("name", "")
    if is_finished:
        manifest |= {
            "weights_digest": compute_weights_digest(path / "hf"),
            "rebuilt": f"from {CONFIG_FILE} and hf/; its figures are lost",
        }
        return (
            manifest,
            f"It is made again from {CONFIG_FILE} and hf/, which holds the finished model; its figures are lost.",
        )
    assert index is not None
    manifest["rebuilt"] = f"from the checkpoint of step {index.step:,}"
    return manifest, f"It is made again from the checkpoint of step {index.step:,}, and the run resumes from there."


def _read_newest_index(path: Path) -> CheckpointIndex | None:
    """Read the index of the newest checkpoint whose index is valid; None if there is none."""
    folder = CheckpointFolder(path / "checkpoints")
    for step in folder.list_steps():
        try:
            return read_index(folder.get_step_path(step))
        except CorruptCheckpointError:
            continue
    return None


def read_config_file(path: Path) -> dict[str, Any] | None:
    """Read config.yaml; None if it is missing or damaged."""
    try:
        config = yaml.safe_load((path / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    if not (
        isinstance(config, dict) and isinstance(config.get("stage"), dict) and isinstance(config.get("model"), dict)
    ):
        return None
    # folder in which the parts of the tiny model are created
    tiny_parts = str(Path(str(config.get("run_dir"))) / "parts")
    for part in ("vision_tower", "language_model"):
        if str(config["model"].get(part)).startswith(tiny_parts):
            config["model"][part] = "tiny"
    return config
