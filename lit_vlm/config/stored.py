"""Reading of the settings that a run folder stores."""

from __future__ import annotations

from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lit_vlm.config.schema import RunConfig
from lit_vlm.config.settings import stage_class
from lit_vlm.types import UserError

OF_THE_MODEL = ("model", "stage", "seed", "run_dir")  # read as a whole; of `data` and `trainer` only single settings


def read_model_settings(plain: dict[str, Any], where: str) -> RunConfig:
    """Read the settings of a stored run that define its model and its trained parts; all others have their defaults.

    Args:
        settings: settings from a manifest, config.yaml or checkpoint.
        origin: where the settings are stored, for the message.

    Raises:
        UserError: the settings do not match this version.
    """
    selected = {key: plain[key] for key in OF_THE_MODEL if key in plain}
    for group, names in {"data": ("tiling", "lock"), "trainer": ("precision",)}.items():
        section = plain.get(group) or {}
        selected[group] = {name: section[name] for name in names if name in section}
    try:
        schema = OmegaConf.structured(RunConfig)
        schema.stage = OmegaConf.structured(stage_class((plain.get("stage") or {}).get("name")))
        config = OmegaConf.to_object(OmegaConf.merge(schema, selected))
    except (OmegaConfBaseException, ValueError, TypeError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{where}: its settings are not those of this version ({reason}).") from None
    assert isinstance(config, RunConfig)
    return config
