"""Matmul dtype check: warn when a matrix product, convolution or attention runs in float32 under mixed precision.

In float32 it costs many times as much as in bfloat16.
"""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from lit_vlm.compat.torch import TorchDispatchMode

MATMUL_OPS = (
    "mm",
    "bmm",
    "baddbmm",
    "addmm",
    "addbmm",
    "_grouped_mm",
    "convolution",
    "scaled_dot_product",
    "varlen_attn",
)


class MatmulDtypeCounter(TorchDispatchMode):
    """Counter of matrix products by operation and dtype, backward passes included.

    Attributes:
        counts: (operation, dtype of its factors) -> number of calls.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[tuple[str, torch.dtype]] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if any(name == family or (len(family) > 8 and family in name) for family in MATMUL_OPS):
            # the first arguments are the factors; after them, attention's backward pass takes float32 log-sums
            factors = [value for value in args[:3] if isinstance(value, Tensor) and value.is_floating_point()]
            self.counts.update({(name, factor.dtype) for factor in factors})
        return function(*args, **(kwargs or {}))

    @property
    def float32_counts(self) -> dict[str, int]:
        """Number of calls in float32, by operation."""
        return {name: count for (name, dtype), count in self.counts.items() if dtype == torch.float32}


def warn_about_float32_matmuls(counter: MatmulDtypeCounter) -> None:
    """Warn when a forward pass in half precision computed some matrix products in float32."""
    if float32_counts := counter.float32_counts:
        named = ", ".join(f"{count} x {name}" for name, count in float32_counts.items())
        warnings.warn(
            f"The first forward pass computed products in float32 under half precision ({named}), many times slower on a "
            "GPU. Something casts its inputs up, or leaves autocast.",
            stacklevel=2,
        )
