"""Typed settings from plain values: those that a run folder stores, and those of a stage that is used as a library."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lit_vlm.config.schema import RunConfig, StageConfig
from lit_vlm.config.settings import get_stage_config_class
from lit_vlm.types import UserError

ConfigClass = TypeVar("ConfigClass", bound=StageConfig)

MODEL_KEYS = ("model", "stage", "seed", "run_dir")  # read as a whole; of `data` and `trainer` only single settings


def read_model_config(settings: dict[str, Any], origin: str) -> RunConfig:
    """Read the settings of a stored run that define its model and its trained parts; all others have their defaults.

    Args:
        settings: settings from a manifest, config.yaml or checkpoint.
        origin: where the settings are stored, for the message.

    Raises:
        UserError: the settings do not match this version.
    """
    selected = {key: settings[key] for key in MODEL_KEYS if key in settings}
    for group, names in {"data": ("tiling", "lock"), "trainer": ("precision",)}.items():
        section = settings.get(group) or {}
        selected[group] = {name: section[name] for name in names if name in section}
    try:
        schema = OmegaConf.structured(RunConfig)
        schema.stage = OmegaConf.structured(get_stage_config_class((settings.get("stage") or {}).get("name")))
        config = OmegaConf.to_object(OmegaConf.merge(schema, selected))
    except (OmegaConfBaseException, ValueError, TypeError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{origin}: its settings are not those of this version ({reason}).") from None
    assert isinstance(config, RunConfig)
    return config


def build_stage_config(config_class: type[ConfigClass], settings: Mapping[str, Any]) -> ConfigClass:
    """Build the config of a stage from plain keyword arguments of the same names; None is the default.

    Activation checkpointing is off by default: `auto` needs the memory of a device. True means `full`, False `none`.

    Raises:
        UserError: an unknown name, or a value of another type.
    """
    values = {key: str(value) if isinstance(value, Path) else value for key, value in settings.items()}
    values = {key: value for key, value in values.items() if value is not None}
    level = values.get("activation_checkpointing", False)
    values["activation_checkpointing"] = {True: "full", False: "none"}[level] if isinstance(level, bool) else level
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(config_class), values))
    except OmegaConfBaseException as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise UserError(
            f"stage.{error.full_key}: {reason}. Names and types are those of {config_class.__name__}."
        ) from None
    assert isinstance(config, config_class)
    config.adam_betas = (config.adam_betas[0], config.adam_betas[1])
    return config


def convert_to_plain(config: StageConfig) -> dict[str, Any]:
    """Convert a stage's config to plain containers: its settings by name, without the name of the stage."""
    plain: Any = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    return {key: value for key, value in plain.items() if key != "name"}
