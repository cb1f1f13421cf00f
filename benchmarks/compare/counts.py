"""Counts of an optimizer step: FLOPs, tiles through the vision tower, token slots through the language model."""

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
class StepCounts:
    """Counts summed over steps. A slot is a token position that the language model computes, padding included."""

    flops: float = 0.0
    tiles: float = 0.0
    slots: float = 0.0
    real: float = 0.0  # real tokens of the collated rows
    rows: float = 0.0  # tokens of the collated rows, padding included

    @property
    def padding(self) -> float:
        return 1 - self.real / self.rows


def count_step(contender: Contender, batches: list[list[Record]]) -> StepCounts:
    """Count one forward and backward pass over each batch, without an update. Recomputed layers count only as FLOPs."""
    totals = StepCounts()
    for weight in contender.iter_passes():
        for records in batches:
            inputs = contender.prepare(records)
            real, rows = contender.count_tokens(inputs, records)
            with (
                _register_counters(contender.models) as counters,
                FlopCounterMode(display=False, custom_mapping=FLOP_FORMULAS) as mode,
            ):
                contender.backward(inputs)
            contender.clear()
            step_counts = StepCounts(mode.get_total_flops(), counters["tiles"], counters["slots"], real, rows)
            for field in fields(totals):
                setattr(totals, field.name, getattr(totals, field.name) + weight * getattr(step_counts, field.name))
    return totals


@contextlib.contextmanager
def _register_counters(models: list[nn.Module]) -> Iterator[dict[str, int]]:
    counters = {"tiles": 0, "slots": 0}

    def count_tiles(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        pixels: Tensor = args[0] if args else kwargs["pixel_values"]
        counters["tiles"] += pixels.shape[0]

    def count_slots(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        counters["slots"] += math.prod(kwargs["inputs_embeds"].shape[:-1])

    hooks = []
    for model in models:
        inner = {name.rsplit(".", 1)[-1]: module for name, module in model.named_modules() if name.count(".") < 5}
        if "vision_tower" in inner:  # a reference model may have none
            hooks.append(inner["vision_tower"].register_forward_pre_hook(count_tiles, with_kwargs=True))
        hooks.append(inner["language_model"].register_forward_pre_hook(count_slots, with_kwargs=True))
    try:
        yield counters
    finally:
        for hook in hooks:
            hook.remove()


def _count_attention(
    query: Any, key: Any, value: Any, dropout: float = 0.0, is_causal: bool = False, **_: Any
) -> float:
    """Count the FLOPs of attention scores and of their product with the values. A causal kernel skips half of both."""
    batch, heads, rows, width = query
    return 2 * batch * heads * rows * key[-2] * (width + value[-1]) * (0.5 if is_causal else 1)


def _count_attention_backward(
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
    """Count twice the forward FLOPs. Scores that a kernel recomputes are not counted."""
    return 2 * _count_attention(query, key, value, dropout, is_causal)


def _wrap_formula(function: Any) -> Any:
    return lambda *args, out_shape=None, out_val=None, **kwargs: function(*args, **kwargs)


# Operators without a formula in torch 2.13's counter: CPU attention, and in-place addmm (TRL's head). Its own formulas
# for GPU attention count full squares for causal masks.
FLOP_FORMULAS = {
    aten.addmm_: _wrap_formula(lambda total, a, b, **_: 2 * a[0] * a[1] * b[1]),
    aten._scaled_dot_product_flash_attention_for_cpu: _wrap_formula(_count_attention),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _wrap_formula(_count_attention_backward),
}
