"""Hydra access: the config folders, the choices that they offer, and the composed config."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from hydra import initialize_config_dir
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_store import ConfigStore
from hydra.core.default_element import ResultDefault
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from lit_vlm.compat.hydra import FileComposition, apply_settings
from lit_vlm.config.overrides import get_override_key, parse_override
from lit_vlm.config.schema import RunConfig
from lit_vlm.config.settings import list_stage_schemas
from lit_vlm.config.yaml_reader import register_yaml_source
from lit_vlm.types import flatten

CONF_DIR = Path(__file__).resolve().parents[2] / "conf"
FileStamp = tuple[tuple[str, int, int], ...]
VERSION_BASE = "1.3"  # explicit: without it Hydra changes the working directory


@cache
def register_schema() -> None:
    """Register the schema and the YAML reader with Hydra.

    The schema is in a group of its own, so that it is never offered as a choice of `stage=`.
    """
    register_yaml_source()
    store = ConfigStore.instance()
    store.store(group="schema", name="run", node=RunConfig)
    for name, config_class in list_stage_schemas().items():
        store.store(group="schema/stage", name=name, node=config_class)


@contextmanager
def _initialize_hydra() -> Iterator[ConfigLoader]:
    """Initialise Hydra with conf/ and yield its config loader. This also works inside a job that Hydra runs."""
    register_schema()
    outer, state = GlobalHydra.instance().hydra, GlobalHydra.instance()
    state.clear()
    try:
        with initialize_config_dir(config_dir=str(CONF_DIR), version_base=VERSION_BASE, job_name="run"):
            yield GlobalHydra.instance().config_loader()
    finally:
        GlobalHydra.instance().hydra = outer


@lru_cache(maxsize=64)
def _select_files(choices: tuple[str, ...], _stamp: FileStamp) -> FileComposition:
    """Select the files of these choices, anew after a file of the user's folders changed."""
    with _initialize_hydra() as loader:
        return FileComposition(loader, "config", list(choices))


@lru_cache(maxsize=256)
def _compose_cached(choices: tuple[str, ...], settings: tuple[str, ...], stamp: FileStamp) -> DictConfig:
    composed = _select_files(choices, stamp).config
    if not settings:
        return composed
    config = copy.deepcopy(composed)
    OmegaConf.set_readonly(config, False)
    apply_settings([parse_override(text) for text in settings], config)
    OmegaConf.set_readonly(config, True)
    return config


def compose_config(overrides: list[str]) -> DictConfig:
    """Compose the whole config, typed by the schema and read-only, as `hydra.compose` does.

    Hydra composes the files of each set of choices once. The settings are applied to a copy, also by Hydra.
    """
    return _compose_cached(*_split_overrides(overrides))


def flatten_config(overrides: list[str]) -> dict[str, Any]:
    """Return the settings of the whole config by their dotted keys, enums as texts."""
    return dict(_flatten_cached(*_split_overrides(overrides)))


@lru_cache(maxsize=256)
def _flatten_cached(choices: tuple[str, ...], settings: tuple[str, ...], stamp: FileStamp) -> dict[str, Any]:
    return flatten(OmegaConf.to_container(_compose_cached(choices, settings, stamp), enum_to_str=True))


def _split_overrides(overrides: list[str]) -> tuple[tuple[str, ...], tuple[str, ...], FileStamp]:
    """Split overrides into those that select files and settings, with the stamp of the user's files."""
    groups = list_groups(overrides)
    choices = [text for text in overrides if _selects_files(text, groups)]
    settings = tuple(text for text in overrides if not _selects_files(text, groups))
    return _sort_choices(choices), settings, _read_stamp(choices)


def compute_defaults_list(choices: list[str]) -> list[ResultDefault]:
    """Compute the list of files that these choices select, in merge order."""
    return list(_select_files(_sort_choices(choices), _read_stamp(choices)).files)


def _sort_choices(choices: list[str]) -> tuple[str, ...]:
    """Put the search path first, so that equal choices are composed once."""
    return tuple(sorted(choices, key=lambda text: get_override_key(text) != "hydra.searchpath"))


def _read_stamp(choices: list[str]) -> FileStamp:
    """Read name, time and size of each file in the user's own config folders."""
    files = [(path, path.stat()) for folder in list_config_dirs(choices)[1:] for path in folder.glob("**/*.yaml")]
    return tuple(sorted((str(path), stat.st_mtime_ns, stat.st_size) for path, stat in files))


def _selects_files(override: str, groups: list[str]) -> bool:
    sets_values = override.partition("=")[2].lstrip().startswith("{")  # data={max_length: 4} merges into the group
    return get_override_key(override).startswith("hydra.") or (is_group_choice(override, groups) and not sets_values)


def is_group_choice(override: str, groups: list[str]) -> bool:
    """Return True if an override chooses a file of a group, also of a group that does not exist."""
    key = get_override_key(override)
    return key.partition("@")[0] in groups or "/" in key or "@" in key


def list_config_dirs(overrides: list[str] | tuple[str, ...] = ()) -> list[Path]:
    """List conf/ and the user's own config folders of the same structure (`--config-dir`)."""
    folders = [CONF_DIR]
    for override in overrides:
        if get_override_key(override) == "hydra.searchpath":
            urls: Any = parse_override(override).value()  # a list; the type of an override's value is wider
            folders += [Path(urlparse(str(url)).path) for url in urls]
    return folders


def list_choices(group: str, overrides: list[str] | tuple[str, ...] = ()) -> list[str]:
    """List the choices of a group: `tiny/1_align` for experiment, `align` for stage."""
    pattern = "**/*.yaml" if group == "experiment" else "*.yaml"
    return sorted(
        {
            path.relative_to(folder / group).with_suffix("").as_posix()
            for folder in list_config_dirs(overrides)
            for path in (folder / group).glob(pattern)
        }
    )


def list_groups(overrides: list[str] | tuple[str, ...] = ()) -> list[str]:
    """List the config groups of the command line, from the folders: data, data/source, experiment, ..."""
    groups = _list_own_groups().union(*(_list_groups(folder) for folder in list_config_dirs(overrides)[1:]))
    return sorted({"experiment" if group.startswith("experiment/") else group for group in groups} - {"."})


@cache
def _list_own_groups() -> set[str]:
    return _list_groups(CONF_DIR)


def _list_groups(folder: Path) -> set[str]:
    return {path.parent.relative_to(folder).as_posix() for path in folder.glob("**/*.yaml")}
