"""Hydra, in one place: where the files are, which choices they offer, and what they compose to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from hydra import compose, initialize_config_dir
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_store import ConfigStore
from hydra.core.default_element import ResultDefault
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from lit_vlm.config.overrides import key_of, parsed
from lit_vlm.config.schema import DPOStageConfig, RunConfig, StageConfig
from lit_vlm.config.yaml_text import register_source

CONF = Path(__file__).resolve().parents[2] / "conf"
VERSION_BASE = "1.3"  # said outright: without it Hydra changes into a folder of its own


@cache
def register() -> None:
    """Tell Hydra the schema, in a group of its own so that it never shows up as a choice of `stage=`, and how to read files."""
    register_source()
    store = ConfigStore.instance()
    store.store(group="schema", name="run", node=RunConfig)
    store.store(group="schema/stage", name="base", node=StageConfig)
    store.store(group="schema/stage", name="dpo", node=DPOStageConfig)


@contextmanager
def _hydra() -> Iterator[ConfigLoader]:
    """Hydra's loader on conf/, also inside a job that Hydra itself runs."""
    register()
    outer, state = GlobalHydra.instance().hydra, GlobalHydra.instance()
    state.clear()
    try:
        with initialize_config_dir(config_dir=str(CONF), version_base=VERSION_BASE, job_name="run"):
            yield GlobalHydra.instance().config_loader()
    finally:
        GlobalHydra.instance().hydra = outer


@lru_cache(maxsize=256)
def _composed(overrides: tuple[str, ...]) -> DictConfig:
    with _hydra():
        config = compose("config", overrides=list(overrides))
    OmegaConf.set_readonly(config, True)
    return config


def composed(overrides: list[str]) -> DictConfig:
    """The whole config, typed by the schema, read-only."""
    return _composed(tuple(overrides))


def defaults_list(overrides: list[str]) -> list[ResultDefault]:
    """The files that these choices select, in the order in which they are merged."""
    with _hydra() as loader:
        return list(loader.compute_defaults_list("config", list(overrides), RunMode.RUN).defaults)


def config_dirs(overrides: list[str] | tuple[str, ...] = ()) -> list[Path]:
    """conf/ and the user's own folders of the same shape (`--config-dir`)."""
    folders = [CONF]
    for override in overrides:
        if key_of(override) == "hydra.searchpath":
            places: Any = parsed(override).value()  # a list, though an override may hold anything
            folders += [Path(urlparse(str(place)).path) for place in places]
    return folders


def choices(group: str, overrides: list[str] | tuple[str, ...] = ()) -> list[str]:
    """The names that a group offers: `tiny/1_align` for experiment, `align` for stage."""
    pattern = "**/*.yaml" if group == "experiment" else "*.yaml"
    return sorted(
        {
            path.relative_to(folder / group).with_suffix("").as_posix()
            for folder in config_dirs(overrides)
            for path in (folder / group).glob(pattern)
        }
    )


def groups(overrides: list[str] | tuple[str, ...] = ()) -> list[str]:
    """The groups of the command line, from the folders: data, data/source, experiment, ..."""
    found = {
        path.parent.relative_to(folder).as_posix()
        for folder in config_dirs(overrides)
        for path in folder.glob("**/*.yaml")
    }
    return sorted({"experiment" if group.startswith("experiment/") else group for group in found} - {"."})
