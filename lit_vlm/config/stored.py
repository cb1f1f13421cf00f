"""Settings as a run's folder holds them become settings again."""

from __future__ import annotations

from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lit_vlm.config.schema import RunConfig
from lit_vlm.config.settings import stage_class
from lit_vlm.types import UserError

OF_THE_MODEL = ("model", "stage", "seed", "run_dir")  # besides these, single ones of `data` and `trainer`


def read_model_settings(plain: dict[str, Any], where: str) -> RunConfig:
    """Read from a run's settings those that say what its model is and what of it trained; all others have their defaults.

    Args:
        plain: as a manifest, config.yaml or a checkpoint holds them.
        where: for the message.

    Raises:
        UserError: they are not those of this version.
    """
    chosen = {key: plain[key] for key in OF_THE_MODEL if key in plain}
    for group, names in {"data": ("tiling", "lock"), "trainer": ("precision",)}.items():
        given = plain.get(group) or {}
        chosen[group] = {name: given[name] for name in names if name in given}
    try:
        schema = OmegaConf.structured(RunConfig)
        schema.stage = OmegaConf.structured(stage_class((plain.get("stage") or {}).get("name")))
        config = OmegaConf.to_object(OmegaConf.merge(schema, chosen))
    except (OmegaConfBaseException, ValueError, TypeError, AttributeError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"{where}: its settings are not those of this version ({first}).") from None
    assert isinstance(config, RunConfig)
    return config
