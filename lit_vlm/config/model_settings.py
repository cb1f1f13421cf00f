"""Reading of the settings that a run folder stores."""

from __future__ import annotations

from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lit_vlm.config.schema import RunConfig
from lit_vlm.config.settings import get_stage_config_class
from lit_vlm.types import UserError

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
