"""Private parts of transformers: flags and rules that its loading and saving functions read."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel


def mark_as_initialized(tensor: Tensor) -> None:
    """Mark a parameter or buffer, so that `initialize_weights` leaves it as it is."""
    tensor._is_hf_initialized = True  # type: ignore[attr-defined]


def can_tie(model: PreTrainedModel, name: str) -> bool:
    """Return True if the model's class can tie this parameter to another one."""
    return name in (model._tied_weights_keys or {})


def set_weight_conversions(model: PreTrainedModel, rules: list[Any]) -> None:
    """Set the rules by which `save_pretrained` renames parameters."""
    model._weight_conversions = rules
