"""What one optimizer step makes the device do: FLOPs, tiles through the tower, token slots through the language model."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.compare.contender import Contender
from lit_vlm.types import Record

aten = torch.ops.aten


@dataclass(slots=True)
class Counts:
    """Of the steps together; a slot is a place in a row that the language model computes, padding included."""

    flops: float = 0.0
    tiles: float = 0.0
    slots: float = 0.0
    real: float = 0.0  # tokens of the rows that were collated
    rows: float = 0.0  # the same with padding

    @property
    def padding(self) -> float:
        return 1 - self.real / self.rows


def count(contender: Contender, batches: list[list[Record]]) -> Counts:
    """One forward and backward over each batch; no weight changes. Recomputed layers count in the FLOPs alone."""
    found = Counts()
    for weight in contender.passes():
        for records in batches:
            inputs = contender.prepare(records)
            real, rows = contender.rows(inputs, records)
            with _watched(contender.models) as seen, FlopCounterMode(display=False, custom_mapping=UNKNOWN) as mode:
                contender.backward(inputs)
            contender.clear()
            now = Counts(mode.get_total_flops(), seen["tiles"], seen["slots"], real, rows)
            for field in fields(found):
                setattr(found, field.name, getattr(found, field.name) + weight * getattr(now, field.name))
    return found


@contextlib.contextmanager
def _watched(models: list[nn.Module]) -> Iterator[dict[str, int]]:
    seen = {"tiles": 0, "slots": 0}

    def see_tiles(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        pixels: Tensor = args[0] if args else kwargs["pixel_values"]
        seen["tiles"] += pixels.shape[0]

    def see_rows(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        seen["slots"] += math.prod(kwargs["inputs_embeds"].shape[:-1])

    hooks = []
    for model in models:
        inner = {name.rsplit(".", 1)[-1]: module for name, module in model.named_modules() if name.count(".") < 5}
        if "vision_tower" in inner:  # a reference may have none
            hooks.append(inner["vision_tower"].register_forward_pre_hook(see_tiles, with_kwargs=True))
        hooks.append(inner["language_model"].register_forward_pre_hook(see_rows, with_kwargs=True))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _attention(query: Any, key: Any, value: Any, dropout: float = 0.0, is_causal: bool = False, **_: Any) -> float:
    """Scores and their product with the values; a causal kernel skips half of both."""
    batch, heads, rows, width = query
    return 2 * batch * heads * rows * key[-2] * (width + value[-1]) * (0.5 if is_causal else 1)


def _attention_backward(
    gradient: Any,
    query: Any,
    key: Any,
    value: Any,
    out: Any,
    logsumexp: Any,
    dropout: float = 0.0,
    is_causal: bool = False,
    **_: Any,
) -> float:
    """Twice the forward pass, as arithmetic counts it; the scores that a kernel makes again are not counted."""
    return 2 * _attention(query, key, value, dropout, is_causal)


def _formula(function: Any) -> Any:
    return lambda *args, out_shape=None, out_val=None, **kwargs: function(*args, **kwargs)


# What torch 2.13's counter has no entry for: the CPU's attention, and products that are added in place (TRL's head). Its
# own entries for the GPU's attention count causal squares whole
UNKNOWN = {
    aten.addmm_: _formula(lambda total, a, b, **_: 2 * a[0] * a[1] * b[1]),
    aten._scaled_dot_product_flash_attention_for_cpu: _formula(_attention),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _formula(_attention_backward),
}
