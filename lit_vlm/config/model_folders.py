"""Validation of the folders that `init_from` and `model.*` name, before any heavy import; each error names the nearest folder."""

from __future__ import annotations

import difflib
import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lit_vlm.config.choices import Task
from lit_vlm.config.overrides import ConfigError
from lit_vlm.config.parse import Run

CONFIG_FILE, ADAPTER_FILE = "config.json", "adapter_config.json"
_NEEDED = f" Give the folder that holds the model's {CONFIG_FILE}, or a hub id like 'owner/name'."
MAX_FOLDERS = 3  # that a message lists
FOLDER_NAMES = ("runs", "models", "checkpoints", "output", "outputs", "weights")  # no owners on the hub
# Tasks that read the model at init_from; task=export reads a run folder
MODEL_TASKS = (
    Task.pipeline,
    Task.train,
    Task.prepare,
    Task.preflight,
    Task.submit,
    Task.prefer,
    Task.chat,
    Task.exam,
    Task.serve,
    Task.demo,
    Task.view,
    Task.evaluate,
)
MISSING_PARENT = (
    "no such folder: the run that should have left it does not exist. Run it first (`python run.py` runs a recipe's stages"
    " in order), or name another folder or hub id with init_from=..."
)


def require_model_folders(run: Run) -> None:
    """Require that the model folders in the settings exist and hold a model.

    Raises:
        ConfigError: lists each setting that names no model, with the nearest folder that holds one.
    """
    if errors := list(find_model_folder_errors(run)):
        raise ConfigError(errors)


def find_model_folder_errors(run: Run) -> Iterator[str]:
    """Yield an error message for each setting that names a folder without a model."""
    config = run.config
    if config.task not in MODEL_TASKS:
        return
    names = {"init_from": config.init_from if config.init_from != "previous" else None}
    if config.init_from is None and config.task is not Task.pipeline:
        names |= {
            "model.vision_tower": config.model.vision_tower,
            "model.language_model": config.model.language_model,
        }
    names["demo.compare_with"] = config.demo.compare_with
    names["stage.reference"] = getattr(config.stage, "reference", None)
    for setting, name in names.items():
        if name is not None and "://" in name:
            if config.task is not Task.evaluate or setting != "init_from":
                yield f"{setting}={name}: is the URL of an endpoint, which only task=evaluate reads. Give a folder or a hub id."
        elif name not in (None, "tiny"):
            yield from find_folder_errors(setting, name, Path(config.run_dir), config.model.adapter_base)


def find_folder_errors(setting: str, name: str, run_dir: Path, adapter_base: str | None = None) -> Iterator[str]:
    """Yield an error message for a name of a model that is a folder without one. A hub id is not checked.

    Args:
        adapter_base: model.adapter_base, the base of an adapter at `init_from`.
    """
    folder = Path(name)
    if not folder.is_absolute():
        owner = name.partition("/")[0]
        if "/" not in name or not (Path(owner).is_dir() and (owner in FOLDER_NAMES or Path(owner).samefile(run_dir))):
            return  # a hub id
        folder = folder.absolute()
    if (folder / CONFIG_FILE).is_file():
        return
    if (folder / ADAPTER_FILE).is_file():
        named = read_adapter_base(folder / ADAPTER_FILE)
        if setting != "init_from":
            yield format_adapter_error(setting, name, named)
        elif find_adapter_base(folder, adapter_base, named) is None:
            yield format_adapter_base_error(setting, name, adapter_base or named)
    elif not folder.exists():
        if folder.name == "hf" and (folder.parent / "manifest.json").is_file():
            return  # an unfinished run; the message about it needs its manifest
        nearest = _format_nearest(setting, folder)
        yield f"{setting}={name}: {MISSING_PARENT if folder.name == 'hf' and not nearest else f'no such folder.{nearest or _NEEDED}'}"
    elif not folder.is_dir():
        yield f"{setting}={name}: is a file.{_NEEDED}"
    elif (folder / "hf" / CONFIG_FILE).is_file():
        yield f"{setting}={name}: is a run's folder; its model is in hf/ below it. Did you mean {_format_override(setting, folder / 'hf')}?"
    elif (folder / "manifest.json").is_file():
        yield (
            f"{setting}={name}: this run has no model yet. Let it finish, or make the model from its last checkpoint:"
            f" python run.py task=export init_from={shlex.quote(_shorten(folder))}"
        )
    else:
        nearest = _format_nearest(setting, folder)
        yield f"{setting}={name}: no model in this folder: it has no {CONFIG_FILE}.{nearest or _NEEDED}"


def format_adapter_error(setting: str, name: str, base: str | None) -> str:
    """Format the error for a folder or hub repository that holds an adapter instead of a model."""
    base_text = f", {setting}={base}" if base else ""
    return (
        f"{setting}={name}: is an adapter ({ADAPTER_FILE}), not a model. Merge it into its base model (peft's"
        f" merge_and_unload, then save_pretrained) and give that folder, or give its base{base_text}."
    )


def find_adapter_base(folder: Path, given: str | None, named: Any) -> str | None:
    """Find the base model of an adapter: a folder that exists, or a hub id; None: it is not found.

    Args:
        folder: of the adapter, or its hub id.
        given: model.adapter_base.
        named: base_model_name_or_path of the adapter; a folder is relative to the adapter's, or to this one.
    """
    if given is not None:
        return given if (Path(given) / CONFIG_FILE).is_file() or not _looks_local(given) else None
    if not isinstance(named, str) or not named:
        return None
    candidates = [folder / named, Path(named), *_list_parents(folder.parent / "manifest.json")]
    for path in candidates:
        if (path / CONFIG_FILE).is_file():
            return path.resolve().as_posix()
    return None if _looks_local(named) else named


def _list_parents(manifest: Path) -> list[Path]:
    """List the model that a run started from, by its manifest; an adapter, which may be published, names no folder."""
    try:
        return [Path(json.loads(manifest.read_text(encoding="utf-8"))["parent"]["path"])]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _looks_local(name: str) -> bool:
    """Return True for a name that is a folder, and no id `owner/name` of the hub."""
    is_path = Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") != 1
    return is_path or name.partition("/")[0] in FOLDER_NAMES


def format_adapter_base_error(setting: str, name: str, base: Any) -> str:
    """Format the error for an adapter whose base model is not there."""
    found = f"its base {base!r} is no folder with a {CONFIG_FILE} here" if base else "it does not name its base"
    return f"{setting}={name}: is an adapter, and {found}. Give the base model: model.adapter_base=<folder or hub id>."


def read_adapter_base(path: Path) -> str | None:
    """Read the name of the base model from an adapter_config.json; None if it names none."""
    try:
        base = json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return base if isinstance(base, str) and base else None


def _format_nearest(setting: str, folder: Path) -> str:
    """Format a suggestion: the nearest folder with a model, else the models below the same folder; empty without any."""
    if (nearest := find_nearest_folder(folder)) is not None:
        return f" Did you mean {_format_override(setting, nearest)}?"
    existing = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
    is_searched = existing.is_relative_to(Path.cwd()) or existing == folder  # not all of a machine
    if models := list_model_folders(existing) if is_searched else []:
        more = f" and {len(models) - MAX_FOLDERS} more" if len(models) > MAX_FOLDERS else ""
        found = ", ".join(_shorten(model) for model in models[:MAX_FOLDERS])
        return f" Models are in {found}{more}."
    return ""


def find_nearest_folder(folder: Path) -> Path | None:
    """Find the existing model folder whose path is most similar, each part of it; also below `hf`. None if there is none."""
    existing = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
    candidate = existing
    for part in folder.relative_to(existing).parts:
        if (candidate / part).is_dir():
            candidate /= part
            continue
        names = sorted(child.name for child in _list_folders(candidate))
        matches = difflib.get_close_matches(part, names, n=1, cutoff=0.6)
        if not matches:
            break
        candidate /= matches[0]
    if candidate == existing:
        return None
    return next((path for path in (candidate, candidate / "hf") if (path / CONFIG_FILE).is_file()), None)


def list_model_folders(folder: Path) -> list[Path]:
    """List folders with a model at most three levels below a folder, the newest first. Large trees are not searched."""
    level, found = [folder], list[Path]()
    for _ in range(3):
        level = [child for parent in level for child in _list_folders(parent)][:200]
        found += [child for child in level if (child / CONFIG_FILE).is_file()]
    return sorted(found, key=lambda path: -(path / CONFIG_FILE).stat().st_mtime)


def _list_folders(folder: Path) -> list[Path]:
    try:
        return sorted(child for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))
    except OSError:
        return []


def _format_override(setting: str, folder: Path) -> str:
    return shlex.quote(f"{setting}={_shorten(folder)}")


def _shorten(path: Path) -> str:
    """Return the path relative to the current folder if it is inside it, else the whole path."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
