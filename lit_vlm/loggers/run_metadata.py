"""Metadata of a run for W&B: its id and group, its config and its summary."""

from __future__ import annotations

import os
import secrets
import string
from pathlib import Path
from typing import Any

import yaml

from lit_vlm.config.schema import LoggerConfig
from lit_vlm.redaction import redact, redact_text
from lit_vlm.runs.run_folder import RunFolder, read_manifest_or_empty
from lit_vlm.types import UserError, flatten

ID_LETTERS = string.ascii_lowercase + string.digits  # eight of them make an id, as in the client's own ids

EXIT_CODES = {  # status of an ended W&B run -> exit code of its client
    "finished": 0,
    "stopped early": 0,
    "preempted": 75,
    "interrupted": 255,
    "failed": 1,
}  # 255: W&B's "killed"


def get_run_record(folder: RunFolder, logger: LoggerConfig, experiment: str | None) -> dict[str, Any]:
    """Return the W&B entry of the manifest: id, project, entity and group, created once for each run folder. Inside a sweep
    agent the id is that of the agent."""
    record = folder.manifest["tracking"].get("wandb") or {}
    run_id = os.environ.get("WANDB_RUN_ID") or record.get("id") or _generate_run_id()
    if record.get("id") == run_id:
        return record
    return {
        "id": run_id,
        "project": os.environ.get("WANDB_PROJECT") or logger.project,
        "entity": os.environ.get("WANDB_ENTITY") or logger.entity,
        "group": _get_group(folder, logger, experiment, run_id),
    }


def _generate_run_id() -> str:
    return "".join(secrets.choice(ID_LETTERS) for _ in range(8))


def _get_group(folder: RunFolder, logger: LoggerConfig, experiment: str | None, run_id: str) -> str:
    """Return the group of the run. All stages of a pipeline share one group, which the first stage creates."""
    new_group = f"{(experiment or folder.manifest['name']).split('/')[0]}-{run_id}"
    return redact_text(logger.group or "") or get_parent_run(folder).get("group") or new_group


def get_parent_run(folder: RunFolder) -> dict[str, Any]:
    """Return the W&B entry of the parent run, from its manifest; empty when it has none."""
    parent = folder.manifest["parent"] or {}
    path = Path(parent.get("path", ""))
    manifest = read_manifest_or_empty(path.parent) if path.is_dir() else {}
    return (manifest.get("tracking") or {}).get("wandb") or {}


def build_config(folder: RunFolder) -> dict[str, Any]:
    """Build the W&B config: the settings by their names, and under `run` code, versions, data, plan and parent."""
    manifest = folder.manifest
    data = {key: value for key, value in manifest["data"].items() if key != "mixture"}
    parent = {**(manifest["parent"] or {}), **{key: get_parent_run(folder).get(key) for key in ("id", "url")}}
    details = {
        "folder": str(folder.path),
        "command": manifest["command"],
        "code": manifest["git"],
        "versions": manifest["versions"],
        "data": data,
        "plan": manifest.get("plan"),
        "parent": parent if manifest["parent"] else None,
    }
    # values that the sweep agent has set are in the W&B config already, locked
    settings = {key: value for key, value in manifest["config"].items() if key not in read_sweep_values()}
    return redact({**settings, "run": details})


def build_summary(manifest: dict[str, Any], status: str) -> dict[str, Any]:
    """Build the W&B summary: the figures of the manifest with flat names, `scores/after/ocr_ko`, `tokens_per_second`, ..."""
    plan = manifest.get("plan") or {}
    digest = {"weights_digest": manifest["weights_digest"]} if manifest.get("weights_digest") else {}
    figures = {"steps": plan.get("steps"), **(manifest.get("figures") or {}), **digest, "status": status}
    return redact({name: value for name, value in flatten(figures, "/").items() if value != {}})


def read_sweep_values() -> dict[str, Any]:
    """Read the values that a sweep agent has set for this run, with the keys of the sweep."""
    path = Path(os.environ.get("WANDB_SWEEP_PARAM_PATH") or "")
    if not os.environ.get("WANDB_SWEEP_ID") or not path.is_file():
        return {}
    found = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    return {key: item["value"] for key, item in found.items() if isinstance(item, dict) and "value" in item}


def require_sweep_values(config: dict[str, Any]) -> None:
    """Require that the run uses the values of the sweep agent; else the sweep would learn from wrong values.

    Raises:
        UserError: lists the settings that differ.
    """
    differences = []
    for key, expected in read_sweep_values().items():
        actual: Any = config
        for part in key.split("."):
            actual = actual.get(part) if isinstance(actual, dict) else None
        if actual is not None and not isinstance(actual, dict) and not _is_same_value(expected, actual):
            differences.append(f"{key} is {expected!r} in the sweep and {actual!r} in this run")
    if differences:
        raise UserError(
            f"This run was not started with the values that the sweep gave its agent: {'; '.join(differences)}. The sweep's"
            " `command` must end with ${args_json} (or ${args_no_hyphens}) and set none of these keys itself."
        )


def _is_same_value(wanted: Any, found: Any) -> bool:
    """Compare two values. Lists are compared by their members, paths by their end, because paths of a run are absolute."""
    if isinstance(wanted, list) and isinstance(found, list):
        return len(wanted) == len(found) and all(map(_is_same_value, wanted, found))
    if isinstance(wanted, str) and isinstance(found, str):
        return found == wanted or found.endswith(wanted.lstrip("./~"))
    if isinstance(wanted, str) or isinstance(found, str):
        return str(wanted) == str(found)
    return wanted == found
