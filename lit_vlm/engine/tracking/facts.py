"""What W&B is told of a run beside its metrics: where it belongs, what it was started with, what came of it."""

from __future__ import annotations

import os
import secrets
import string
from pathlib import Path
from typing import Any

import yaml

from lit_vlm.config.schema import LoggerConfig
from lit_vlm.engine.run_folder import RunFolder, find_manifest
from lit_vlm.secrets import redacted, redacted_text
from lit_vlm.types import UserError

ID_LETTERS = string.ascii_lowercase + string.digits  # and eight of them, as the client's own ids


def known_run(folder: RunFolder, logger: LoggerConfig, experiment: str | None) -> dict[str, Any]:
    """What the manifest keeps of the run of W&B: id, project and group, made once for a folder. Inside an agent the id is
    the one that the agent was given."""
    known = folder.manifest["tracking"].get("wandb") or {}
    run_id = os.environ.get("WANDB_RUN_ID") or known.get("id") or _new_id()
    if known.get("id") == run_id:
        return known
    return {
        "id": run_id,
        "project": os.environ.get("WANDB_PROJECT") or logger.project,
        "entity": os.environ.get("WANDB_ENTITY") or logger.entity,
        "group": _group(folder, logger, experiment, run_id),
    }


def _new_id() -> str:
    return "".join(secrets.choice(ID_LETTERS) for _ in range(8))


def _group(folder: RunFolder, logger: LoggerConfig, experiment: str | None, run_id: str) -> str:
    """The stages of a chain are one group, which the first of them opens."""
    opened = f"{(experiment or folder.manifest['name']).split('/')[0]}-{run_id}"
    return redacted_text(logger.group or "") or parent_run(folder).get("group") or opened


def parent_run(folder: RunFolder) -> dict[str, Any]:
    """What W&B knows of the run that this one starts from; empty when it knows none."""
    parent = folder.manifest["parent"] or {}
    path = Path(parent.get("path", ""))
    manifest = find_manifest(path.parent) if path.is_dir() else {}
    return (manifest.get("tracking") or {}).get("wandb") or {}


def config_of(folder: RunFolder) -> dict[str, Any]:
    """The settings as they are typed, and under `run` what else decides a run: code, versions, data, plan, parent."""
    manifest = folder.manifest
    data = {key: value for key, value in manifest["data"].items() if key != "mixture"}
    parent = {**(manifest["parent"] or {}), **{key: parent_run(folder).get(key) for key in ("id", "url")}}
    about = {
        "folder": str(folder.path),
        "command": manifest["command"],
        "code": manifest["git"],
        "versions": manifest["versions"],
        "data": data,
        "plan": manifest.get("plan"),
        "parent": parent if manifest["parent"] else None,
    }
    # what the agent of a sweep has set stands in the config already, locked
    settings = {key: value for key, value in manifest["config"].items() if key not in sweep_values()}
    return redacted({**settings, "run": about})


def summary_of(manifest: dict[str, Any], status: str) -> dict[str, Any]:
    """The figures of the manifest by flat names: `scores/after/ocr_ko`, `tokens_per_second`, ..."""
    plan = manifest.get("plan") or {}
    digest = {"weights_digest": manifest["weights_digest"]} if manifest.get("weights_digest") else {}
    figures = {"steps": plan.get("steps"), **(manifest.get("figures") or {}), **digest, "status": status}
    return redacted(_flat(figures))


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {key: leaf for name, item in value.items() for key, leaf in _flat(item, f"{prefix}{name}/").items()}
    return {prefix.rstrip("/"): value}


def sweep_values() -> dict[str, Any]:
    """What the agent of a sweep has set for this run, by the sweep's own keys."""
    path = Path(os.environ.get("WANDB_SWEEP_PARAM_PATH") or "")
    if not os.environ.get("WANDB_SWEEP_ID") or not path.is_file():
        return {}
    found = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    return {key: item["value"] for key, item in found.items() if isinstance(item, dict) and "value" in item}


def require_sweep_values(config: dict[str, Any]) -> None:
    """What the agent has set is what this run was started with; else the sweep would learn from other values than it gave.

    Raises:
        UserError: naming the settings that differ.
    """
    different = []
    for key, wanted in sweep_values().items():
        found: Any = config
        for word in key.split("."):
            found = found.get(word) if isinstance(found, dict) else None
        if found is not None and not isinstance(found, dict) and not _same(wanted, found):
            different.append(f"{key} is {wanted!r} in the sweep and {found!r} in this run")
    if different:
        raise UserError(
            f"This run was not started with the values that the sweep gave its agent: {'; '.join(different)}. The sweep's"
            " `command` must end with ${args_json} (or ${args_no_hyphens}) and set none of these keys itself."
        )


def _same(wanted: Any, found: Any) -> bool:
    """Lists by their members, paths by their end: those of a run are absolute."""
    if isinstance(wanted, list) and isinstance(found, list):
        return len(wanted) == len(found) and all(map(_same, wanted, found))
    if isinstance(wanted, str) and isinstance(found, str):
        return found == wanted or found.endswith(wanted.lstrip("./~"))
    if isinstance(wanted, str) or isinstance(found, str):
        return str(wanted) == str(found)
    return wanted == found
