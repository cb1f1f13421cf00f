"""Adapter folders in PEFT's layout: their settings, and the base that they belong to. Reads no weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from lit_vlm.config.model_folders import ADAPTER_FILE, CONFIG_FILE, find_adapter_base, format_adapter_base_error
from lit_vlm.types import UserError

OWN_FILE = "lit_vlm.json"


@dataclass(frozen=True, slots=True)
class Adapter:
    """Adapter folder or repository, with its base.

    Attributes:
        peft: content of `adapter_config.json`.
        own: content of `lit_vlm.json`; empty for an adapter of another program.
    """

    name: str
    base: str
    peft: dict[str, Any]
    own: dict[str, Any]

    @property
    def has_tokenizer(self) -> bool:
        """True if the folder has a tokenizer of its own; PEFT's folders often have none."""
        return find_file(self.name, "tokenizer_config.json") is not None


def open_adapter(name: str, base: str | None) -> Adapter | None:
    """Open an adapter: its settings, and its base. None: the folder or repository holds no adapter.

    Args:
        base: folder or hub id of the base; None: as the adapter says.

    Raises:
        UserError: its base is not found, or it is of a kind that cannot be merged here.
    """
    if find_file(name, CONFIG_FILE) is not None or (path := find_file(name, ADAPTER_FILE)) is None:
        return None
    peft, own = _read_object(path), _read_object(find_file(name, OWN_FILE))
    found = find_adapter_base(Path(name), base, peft.get("base_model_name_or_path"))
    if found is None:
        raise UserError(format_adapter_base_error("init_from", name, peft.get("base_model_name_or_path")))
    unknown = [f"peft_type={peft.get('peft_type')}"] if peft.get("peft_type") != "LORA" else []
    unknown += [key for key in ("use_dora", "lora_bias", "layer_replication", "target_parameters") if peft.get(key)]
    unknown += [f"bias={peft['bias']}"] if peft.get("bias", "none") != "none" else []
    if unknown:
        raise UserError(
            f"{name}: adapters with {', '.join(unknown)} are not read here. Merge it with peft (merge_and_unload, then "
            "save_pretrained), and give that folder."
        )
    return Adapter(name, found, peft, own)


def find_file(name: str, filename: str) -> str | None:
    """Find a file of a folder or repository; None if it is not there."""
    if Path(name).is_absolute() and not Path(name).is_dir():
        return None
    try:
        return cached_file(name, filename, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError):  # no network, no such repository: the message about the model says more
        return None


def _read_object(path: str | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}).") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds {type(value).__name__} and no JSON object.")
    return value
