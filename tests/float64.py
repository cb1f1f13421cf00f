"""Float64 instead of float32, so that numeric comparisons do not depend on the order of additions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode


class Float64(TorchFunctionMode):
    """Mode in which code that asks for float32 gets float64: norms, softmax, rotary embeddings, losses, new tensors.

    The rounding error is then 1e-16 instead of 6e-8. A comparison within 1e-6 holds on every processor, however much
    the loss amplifies an error. The model must be in float64: `with Float64(): model.double()`.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {name: _widen(value) for name, value in (kwargs or {}).items()}
        if func is Tensor.float:
            return args[0].double()
        if func is Tensor.backward:
            with (
                self
            ):  # an edge instead of a tensor: the mode stays active in backward passes and in recomputed forward passes
                return torch.autograd.backward(get_gradient_edge(args[0]), kwargs.pop("gradient", None), **kwargs)
        return func(*map(_widen, args), **kwargs)


def _widen(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


def restore_pixels(values: Tensor, mean: float = 0.5, std: float = 0.5) -> Tensor:
    """Normalise again in float64 what transformers' image processor normalised in float32; its pixels are whole numbers."""
    whole = ((values.double() * std + mean) * 255).round()
    return (whole / 255 - mean) / std
