"""One run, one folder. Its manifest says what was run, on what, from what, and what came of it."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lit_vlm.config.elsewhere import is_elsewhere
from lit_vlm.engine.ranks import global_rank
from lit_vlm.files import DamagedFile, read_json, writable, write_json
from lit_vlm.model.tensor_files import digest_of_weights
from lit_vlm.secrets import agrees, redacted, redacted_words
from lit_vlm.types import Source, UserError

MANIFEST = "manifest.json"
MADE_AGAIN = "Start that run again with its own command: it is made again from what lies beside it."
SPREAD_BLOCKS = 256  # of 64 KiB, that stand for a file of weights
# The shape of a manifest, of what in it is read again
TABLES = ("config", "data", "parent", "tracking", "plan", "figures", "git", "versions")
INNER: tuple[tuple[str, str, type], ...] = (
    ("config", "stage", dict),
    ("config", "model", dict),
    ("config", "data", dict),
    ("data", "digest", str),
    ("parent", "path", str),
    ("parent", "digest", str),
    ("tracking", "wandb", dict),
)
TEXTS = ("status", "name", "stage", "started", "command", "weights_digest")
PACKAGES = ("torch", "lightning", "transformers", "peft", "trl", "tokenizers", "torchmetrics", "hydra-core")


@dataclass(slots=True)
class RunFolder:
    """The folder of one run and its manifest. Only rank 0 writes.

    Attributes:
        replaces: it held another run, of which nothing may go on.
        goes_on: it holds this run, begun before.
        rebuilt: its manifest was damaged and is made again; what the user should know of that.
    """

    path: Path
    manifest: dict[str, Any]
    replaces: bool = False
    goes_on: bool = False
    rebuilt: str = ""

    @property
    def hf(self) -> Path:
        return self.path / "hf"

    @property
    def finished(self) -> bool:
        return self.manifest.get("status") == "finished"

    def update(self, **fields: Any) -> None:
        """Put fields into the manifest and write it, whole or not at all. UserError where it cannot be written."""
        self.manifest.update(fields)
        if is_rank_zero():
            with writable(self.path, MANIFEST, "run_dir"):
                self.path.mkdir(parents=True, exist_ok=True)
                write_json(self.path / MANIFEST, self.manifest, indent=2)


def open_run_folder(
    path: Path, config: Any, *, name: str, overwrite: bool, data_digest: str, parent: dict[str, str] | None
) -> RunFolder:
    """The folder of a run: new, interrupted (it goes on) or finished. Nothing is written before its first `update`.

    With `overwrite` a finished run or another one is replaced; an interrupted run of the same settings goes on all the same,
    for a job that is requeued comes with the same words.

    Raises:
        UserError: the folder holds a run of another config, other data or another parent.
    """
    plain = redacted(to_plain(asdict(config)))
    known, rebuilt = read_or_rebuild_manifest(path, name)
    different = _differences(known, plain, data_digest, parent) if known else []
    finished = bool(known) and known.get("status") == "finished"
    if known and not overwrite:
        if different:
            state = "a finished" if finished else "an unfinished"
            raise UserError(
                f"{path} holds {state} run that differs from this one in {', '.join(different[:5])}. "
                "Give this one a name of its own with run_name=..., or replace the old one with overwrite=true."
            )
        if finished:
            return RunFolder(path, known, rebuilt=rebuilt)
    require_writable(path)
    goes_on = bool(known) and not different and not finished
    now = datetime.now(UTC).isoformat(timespec="seconds")
    manifest = {
        "status": "running",
        "name": name,
        "stage": plain["stage"]["name"],
        "command": command_line(),
        "started": known.get("started", now) if goes_on else now,
        "git": git_state(),
        "versions": versions(),
        "config": plain,
        "data": {"digest": data_digest},
        "parent": parent,
        "tracking": known.get("tracking", {}) if goes_on else {},
    }
    return RunFolder(path, manifest, replaces=bool(known) and not goes_on, goes_on=goes_on, rebuilt=rebuilt)


def command_line() -> str:
    """What this process was started with, without secrets."""
    return " ".join(["python", Path(sys.argv[0]).name, *redacted_words(sys.argv[1:])])


def require_writable(path: Path) -> None:
    """Told now, not after the model was built; nothing is made yet. UserError naming what is in the way."""
    place = next(place for place in (path, *path.parents) if os.path.lexists(place))
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        found = "may not be written to" if place.is_dir() else "is no folder"
        raise UserError(
            f"The run's folder {path} cannot be made: {place} {found}. Choose another with run_dir=... or run_name=..."
        )


def read_manifest(path: Path) -> dict[str, Any] | None:
    """Read the manifest of a run's folder; None where there is none. DamagedFile where it is not as it was written."""
    found = read_json(path / MANIFEST, MADE_AGAIN)
    for key, kind in _find_misshaped(found or {}):
        raise DamagedFile(f"{path / MANIFEST} is damaged: its {key} is {kind}. {MADE_AGAIN}")
    return found


def _find_misshaped(manifest: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Find the entries that have another type than those that are written, and the type that they have."""
    for key in TABLES:
        if not isinstance(manifest.get(key), dict | None):
            yield key, type(manifest[key]).__name__
    for key, inner, kind in INNER:
        value = (manifest.get(key) or {}).get(inner)
        if not isinstance(value, kind | None):
            yield f"{key}.{inner}", type(value).__name__
    for key in TEXTS:
        if not isinstance(manifest.get(key), str | None):
            yield key, type(manifest[key]).__name__


def find_manifest(path: Path) -> dict[str, Any]:
    """Read the manifest for what can do without it; {} where there is none, and of a damaged one."""
    try:
        return read_manifest(path) or {}
    except DamagedFile:
        return {}


def read_or_rebuild_manifest(path: Path, name: str) -> tuple[dict[str, Any] | None, str]:
    """Read the manifest; a damaged one is made again from what lies beside it, with a sentence about that."""
    try:
        found = read_manifest(path)
        if found is not None and not (isinstance(found.get("config"), dict) and isinstance(found.get("data"), dict)):
            raise DamagedFile(f"{path / MANIFEST} is damaged: it lacks what every manifest has. {MADE_AGAIN}")
        return found, ""
    except DamagedFile as error:
        from lit_vlm.engine.rebuild import rebuild_manifest  # reads checkpoints, which needs torch

        known, how = rebuild_manifest(path, name)
        return known, f"{str(error).removesuffix(MADE_AGAIN)}{how}"


def parent_of(init_from: str | None) -> dict[str, str] | None:
    """Path and digest of the model that a run starts from; hub ids have no digest of ours."""
    if init_from is None:
        return None
    folder = Path(init_from)
    if not folder.is_dir():
        return {"path": init_from, "digest": ""}
    digest = find_manifest(folder.parent).get("weights_digest")
    # where it is lost, the weights themselves say which they are
    return {"path": init_from, "digest": digest or digest_of_weights(folder)}


def require_parent(init_from: str | None) -> None:
    """A stage that starts from an earlier one needs it finished.

    Raises:
        UserError: its folder is not there; says what is there, and how to come by the model.
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


def digest_of_parts(*folders: str | None) -> str:
    """Of the weights in local folders, from their names, sizes and blocks spread over them: frozen weights are read from
    there, and another model shows in any block. Hub ids count by name."""
    hasher = hashlib.sha256()
    for folder in filter(None, folders):
        files = sorted(Path(folder).glob("*.safetensors")) if Path(folder).is_dir() else []
        hasher.update(b"parts" if files else folder.encode())
        for file in files:
            size = file.stat().st_size
            hasher.update(f"{file.name}\0{size}".encode())
            with file.open("rb") as stream:
                for place in range(0, size, max(1, size // SPREAD_BLOCKS)):
                    stream.seek(place)
                    hasher.update(stream.read(1 << 16))
    return hasher.hexdigest()


def digest_of_sources(sources: Sequence[Source]) -> str:
    """Of what the sources hold, without reading their records."""
    return hashlib.sha256("\0".join(f"{source.name}={source.digest}" for source in sources).encode()).hexdigest()


def to_plain(value: Any) -> Any:
    """Enums by name, paths as text, tuples as lists: what JSON can hold."""
    if isinstance(value, dict):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    if isinstance(value, Enum):
        return value.name
    return str(value) if isinstance(value, Path) else value


def git_state() -> dict[str, Any]:
    """Commit of the code, whether it was changed, in how many files, and the SHA-256 of what `git diff HEAD` says; empty
    outside a checkout. The difference itself stays here: a line of it may hold a key."""
    root = Path(__file__).resolve().parents[2]

    def git(*words: str) -> str | None:
        try:
            return subprocess.run(
                ["git", "-C", str(root), *words], capture_output=True, text=True, errors="replace", check=True
            ).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return None

    commit = git("rev-parse", "HEAD")
    if not commit:
        return {}
    changed = (git("status", "--porcelain") or "").splitlines()
    difference = hashlib.sha256((git("diff", "HEAD") or "").encode(errors="replace")).hexdigest() if changed else None
    return {"commit": commit, "dirty": bool(changed), "changed_files": len(changed), "diff_sha256": difference}


def versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def is_rank_zero() -> bool:
    return global_rank() == 0


def identity_of(config: dict[str, Any]) -> dict[str, Any]:
    """The settings, as `to_plain` gives them, that say what a run computes; those of `elsewhere.py` are left out, and the
    starting model, which has a digest."""

    def kept(value: Any, prefix: str) -> Any:
        if not isinstance(value, dict):
            return value
        inner = {name: (f"{prefix}{name}", item) for name, item in value.items()}
        return {
            name: kept(item, f"{key}.")
            for name, (key, item) in inner.items()
            if key != "init_from" and not is_elsewhere(key)
        }

    return kept(config, "")


def _differences(
    known: dict[str, Any], config: dict[str, Any], data_digest: str, parent: dict[str, str] | None
) -> list[str]:
    """Of a manifest that was made again, what is not known any more is not compared."""
    ours, theirs = identity_of(config), identity_of(known["config"])
    different = _changed(theirs, ours) if theirs or not known.get("rebuilt") else []
    digest = known["data"].get("digest")
    if digest != data_digest and not (known.get("rebuilt") and not digest):
        different.append("its data")
    if not known.get("rebuilt") and (known.get("parent") or {}).get("digest") != (parent or {}).get("digest"):
        different.append("the model it starts from")
    return different


def _changed(old: Any, new: Any, prefix: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            key
            for name in sorted({*old, *new})
            for key in _changed(old.get(name), new.get(name), f"{prefix}.{name}" if prefix else name)
        ]
    return [] if agrees(old, new) else [prefix]
