"""Run folder and its manifest: the record of command, code, config, data, parent model and results of one run."""

from __future__ import annotations

import hashlib
import os
import subprocess
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lit_vlm.config.run_name import is_non_identity_key
from lit_vlm.distributed.ranks import get_global_rank
from lit_vlm.files import (
    CorruptFileError,
    compute_weights_digest,
    handle_write_errors,
    read_json,
    update_with_weight_files,
    write_json,
)
from lit_vlm.redaction import is_same_setting, redact, redact_arguments
from lit_vlm.types import Source, UserError

MANIFEST = "manifest.json"
REBUILD_HINT = "Start that run again with its own command: it is made again from what lies beside it."
# Types of the manifest's entries that are read again
TABLE_KEYS = ("config", "data", "parent", "tracking", "plan", "figures", "git", "versions")
NESTED_KEYS: tuple[tuple[str, str, type], ...] = (
    ("config", "stage", dict),
    ("config", "model", dict),
    ("config", "data", dict),
    ("data", "digest", str),
    ("parent", "path", str),
    ("parent", "digest", str),
    ("tracking", "wandb", dict),
)
TEXT_KEYS = ("status", "name", "stage", "started", "command", "weights_digest")
RECORDED_PACKAGES = ("torch", "lightning", "transformers", "peft", "trl", "tokenizers", "torchmetrics", "hydra-core")


@dataclass(slots=True)
class RunFolder:
    """Folder of one run and its manifest. Only rank 0 writes.

    Attributes:
        replaces_other_run: the folder held another run, which cannot be resumed.
        is_resumed: the folder holds an interrupted start of this run.
        rebuild_note: message to the user if the manifest was damaged and was rebuilt, else empty.
    """

    path: Path
    manifest: dict[str, Any]
    replaces_other_run: bool = False
    is_resumed: bool = False
    rebuild_note: str = ""

    @property
    def hf_path(self) -> Path:
        """Folder of the exported model, in transformers' layout."""
        return self.path / "hf"

    @property
    def is_finished(self) -> bool:
        """True if the manifest says that the run is finished."""
        return self.manifest.get("status") == "finished"

    def update(self, **fields: Any) -> None:
        """Update fields of the manifest and write it atomically.

        Raises:
            UserError: the manifest cannot be written.
        """
        self.manifest.update(fields)
        if is_rank_zero():
            with handle_write_errors(self.path, MANIFEST, "run_dir"):
                self.path.mkdir(parents=True, exist_ok=True)
                write_json(self.path / MANIFEST, self.manifest, indent=2)


def open_run_folder(
    path: Path,
    settings: dict[str, Any],
    *,
    name: str,
    overwrite: bool,
    data_digest: str,
    parent: dict[str, str] | None,
) -> RunFolder:
    """Open the folder of a run, which is new, interrupted (it resumes) or finished. Nothing is written before the first `update`.

    `overwrite` replaces a finished run or another run. An interrupted run with the same settings resumes nevertheless,
    because a requeued job starts with the same overrides.

    Args:
        settings: all settings of the run, see `to_plain`.
        name: name of the run, for the manifest.
        data_digest: digest of the data sources.
        parent: path and digest of the starting model, see `describe_parent`.

    Raises:
        UserError: the folder holds a run with another config, other data or another parent.
    """
    plain = redact(settings)
    known, rebuilt = read_or_rebuild_manifest(path, name)
    known = known or {}
    differences = _find_differences(known, plain, data_digest, parent) if known else []
    is_finished = known.get("status") == "finished"
    if known and not overwrite:
        if differences:
            state = "a finished" if is_finished else "an unfinished"
            raise UserError(
                f"{path} holds {state} run that differs from this one in {', '.join(differences[:5])}. "
                "Give this one a name of its own with run_name=..., or replace the old one with overwrite=true."
            )
        if is_finished:
            return RunFolder(path, known, rebuild_note=rebuilt)
    require_writable(path)
    goes_on = bool(known) and not differences and not is_finished
    now = datetime.now(UTC).isoformat(timespec="seconds")
    manifest = {
        "status": "running",
        "name": name,
        "stage": plain["stage"]["name"],
        "command": get_command_line(),
        "started": known.get("started", now) if goes_on else now,
        "git": get_git_state(),
        "versions": get_package_versions(),
        "config": plain,
        "data": {"digest": data_digest},
        "parent": parent,
        "tracking": known.get("tracking", {}) if goes_on else {},
    }
    return RunFolder(
        path, manifest, replaces_other_run=bool(known) and not goes_on, is_resumed=goes_on, rebuild_note=rebuilt
    )


def get_command_line() -> str:
    """Return the command line of this process as one types it in a shell, with secrets redacted."""
    return shlex.join(["python", Path(sys.argv[0]).name, *redact_arguments(sys.argv[1:])])


def require_writable(path: Path) -> None:
    """Require that the run folder can be created, before the model is built. Nothing is created yet.

    Raises:
        UserError: a file or a missing permission prevents it. The text names the path.
    """
    existing = next(existing for existing in (path, *path.parents) if os.path.lexists(existing))
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        found = "may not be written to" if existing.is_dir() else "is no folder"
        raise UserError(
            f"The run's folder {path} cannot be made: {existing} {found}. Choose another with run_dir=... or run_name=..."
        )


def read_manifest(path: Path) -> dict[str, Any] | None:
    """Read the manifest of a run folder; None if there is none.

    Raises:
        DamagedFile: the manifest is not as it was written.
    """
    manifest = read_json(path / MANIFEST, REBUILD_HINT)
    for key, kind in _find_type_errors(manifest or {}):
        raise CorruptFileError(f"{path / MANIFEST} is damaged: its {key} is {kind}. {REBUILD_HINT}")
    return manifest


def _find_type_errors(manifest: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Find manifest entries of a wrong type. Yields the key and the type that was found."""
    for key in TABLE_KEYS:
        if not isinstance(manifest.get(key), dict | None):
            yield key, type(manifest[key]).__name__
    for key, inner, kind in NESTED_KEYS:
        value = (manifest.get(key) or {}).get(inner)
        if not isinstance(value, kind | None):
            yield f"{key}.{inner}", type(value).__name__
    for key in TEXT_KEYS:
        if not isinstance(manifest.get(key), str | None):
            yield key, type(manifest[key]).__name__


def read_manifest_or_empty(path: Path) -> dict[str, Any]:
    """Read the manifest for optional use; {} if it is missing or damaged."""
    try:
        return read_manifest(path) or {}
    except CorruptFileError:
        return {}


def read_or_rebuild_manifest(path: Path, name: str) -> tuple[dict[str, Any] | None, str]:
    """Read the manifest. Rebuild a damaged one from the other files of the folder, and return a message about that."""
    try:
        manifest = read_manifest(path)
        if manifest is not None and not (
            isinstance(manifest.get("config"), dict) and isinstance(manifest.get("data"), dict)
        ):
            raise CorruptFileError(f"{path / MANIFEST} is damaged: it lacks what every manifest has. {REBUILD_HINT}")
        return manifest, ""
    except CorruptFileError as error:
        from lit_vlm.runs.rebuild import rebuild_manifest  # reads checkpoints, which needs torch

        rebuilt, note = rebuild_manifest(path, name)
        return rebuilt, f"{str(error).removesuffix(REBUILD_HINT)}{note}"


def describe_parent(init_from: str | None) -> dict[str, str] | None:
    """Return path and digest of the model that a run starts from; None without one. A hub id has an empty digest."""
    if init_from is None:
        return None
    return {"path": init_from, "digest": compute_model_digest(init_from)}


def compute_model_digest(name: str) -> str:
    """Return the digest of a model folder's weights; "" for a hub id."""
    folder = Path(name)
    if not folder.is_dir():
        return ""
    digest = read_manifest_or_empty(folder.parent).get("weights_digest")
    return digest or compute_weights_digest(folder)  # if the manifest is lost, hash the weights themselves


def require_finished_parent(init_from: str | None) -> None:
    """Require that the model folder of the earlier stage exists, for a stage that starts from it.

    Raises:
        UserError: the folder does not exist. The text names the state of that run, and how to get the model.
    """
    if init_from is None:
        return
    folder = Path(init_from)
    if not folder.is_absolute() or folder.is_dir():
        return
    manifest = read_manifest(folder.parent)
    if manifest and manifest.get("status") == "finished":
        raise UserError(
            f"init_from={init_from}: that run is finished and left no model there (it was trained with export=false, or the "
            f"folder was removed). Make it from the run's last checkpoint: python run.py task=export init_from={folder.parent}"
        )
    state = "is not finished" if manifest else "does not exist"
    raise UserError(
        f"init_from={init_from}: the run that should have left this folder {state}. Run the stage before it first (`python run.py` runs "
        "a recipe's stages in order), or name another folder or hub id with init_from=..."
    )


def compute_parts_digest(*folders: str | None) -> str:
    """Compute the SHA-256 of the model parts, for the frozen weights that are read from there.

    Of weight files in local folders it hashes what `update_with_weight_files` does. A hub id is hashed by its name.
    """
    hasher = hashlib.sha256()
    for folder in filter(None, folders):
        files = sorted(Path(folder).glob("*.safetensors")) if Path(folder).is_dir() else []
        hasher.update(b"parts" if files else folder.encode())
        update_with_weight_files(hasher, files)
    return hasher.hexdigest()


def compute_sources_digest(sources: Sequence[Source]) -> str:
    """Compute the SHA-256 over names and digests of all sources, without reading their records."""
    return hashlib.sha256("\0".join(f"{source.name}={source.digest}" for source in sources).encode()).hexdigest()


def to_plain(value: Any) -> Any:
    """Convert a value to plain JSON types: enums to their names, paths to text, tuples to lists."""
    if isinstance(value, dict):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    if isinstance(value, Enum):
        return value.name
    return str(value) if isinstance(value, Path) else value


def get_git_state() -> dict[str, Any]:
    """Return the commit of the code, a flag for local changes, the number of changed files, and the SHA-256 of `git diff HEAD`.

    Empty outside a checkout. The diff itself is not recorded: a line of it may contain a key.
    """
    root = Path(__file__).resolve().parents[2]

    def run_git(*arguments: str) -> str | None:
        try:
            return subprocess.run(
                ["git", "-C", str(root), *arguments], capture_output=True, text=True, errors="replace", check=True
            ).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return None

    commit = run_git("rev-parse", "HEAD")
    if not commit:
        return {}
    changed = (run_git("status", "--porcelain") or "").splitlines()
    diff_digest = (
        hashlib.sha256((run_git("diff", "HEAD") or "").encode(errors="replace")).hexdigest() if changed else None
    )
    return {"commit": commit, "dirty": bool(changed), "changed_files": len(changed), "diff_sha256": diff_digest}


def get_package_versions() -> dict[str, str]:
    """Return the versions of Python and of the main packages."""
    found = {"python": sys.version.split()[0]}
    for package in RECORDED_PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def is_rank_zero() -> bool:
    """Return True on global rank 0."""
    return get_global_rank() == 0


def extract_identity(config: dict[str, Any]) -> dict[str, Any]:
    """Extract the settings that define what a run computes, from the output of `to_plain`.

    Settings of `config/elsewhere.py` are left out, and so is the starting model, which has a digest.
    """

    def filter_keys(value: Any, prefix: str) -> Any:
        if not isinstance(value, dict):
            return value
        items = {name: (f"{prefix}{name}", item) for name, item in value.items()}
        return {
            name: filter_keys(item, f"{key}.")
            for name, (key, item) in items.items()
            if key != "init_from" and not is_non_identity_key(key)
        }

    return filter_keys(config, "")


def _find_differences(
    known: dict[str, Any], config: dict[str, Any], data_digest: str, parent: dict[str, str] | None
) -> list[str]:
    """Find differences between a manifest and this run: changed settings, data and parent model.

    Fields that a rebuilt manifest has lost are not compared.
    """
    new_identity, old_identity = extract_identity(config), extract_identity(known["config"])
    differences = _find_changed_keys(old_identity, new_identity) if old_identity or not known.get("rebuilt") else []
    digest = known["data"].get("digest")
    if digest != data_digest and not (known.get("rebuilt") and not digest):
        differences.append("its data")
    if not known.get("rebuilt") and (known.get("parent") or {}).get("digest") != (parent or {}).get("digest"):
        differences.append("the model it starts from")
    return differences


def _find_changed_keys(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Find the settings that differ. A section that one of the two lacks, or that is null, has no settings."""
    changed: list[str] = []
    for key in sorted({*old, *new}):
        sections = [side.get(key) for side in (old, new)]
        if any(isinstance(section, dict) for section in sections) and all(
            isinstance(section, dict | None) for section in sections
        ):
            changed += _find_changed_keys(sections[0] or {}, sections[1] or {}, f"{prefix}{key}.")
        elif not is_same_setting(key, old, new):
            changed.append(prefix + key)
    return changed
