"""Frozen weights stored in the compute dtype (bfloat16): half the memory, and no cast in each forward pass.

Under bf16-mixed, autocast gives linear layers and convolutions their weights rounded to bfloat16. Frozen weights can be
stored that way: the numbers are the same, bit for bit. Embeddings, norms, and a table that is embeddings and head at
once are read without a cast, so they keep their type. The files keep the exact values; an export reads them there.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lit_vlm.model.head import LogProbHead
from lit_vlm.model.skeleton import move_buffers, read_initial_values, replace_parameters


def list_matrices(model: nn.Module) -> list[nn.Parameter]:
    """List the weights and biases that only linear layers and convolutions read."""
    matmul_modules = (nn.Linear, nn.Conv2d, LogProbHead)
    uses = [(type(module) in matmul_modules, p) for module in model.modules() for p in module.parameters(recurse=False)]
    others = {id(parameter) for is_matrix, parameter in uses if not is_matrix}
    return list({id(p): p for is_matrix, p in uses if is_matrix and id(p) not in others}.values())


def list_frozen_matrices(model: nn.Module) -> list[nn.Parameter]:
    """List the weights and biases of `list_matrices` that do not train."""
    return [parameter for parameter in list_matrices(model) if not parameter.requires_grad]


@torch.no_grad()
def fill_skeleton(model: nn.Module, frozen_dtype: torch.dtype) -> None:
    """Allocate CPU memory and fill in initial values for a skeleton whose trainable parameters are already marked.

    Args:
        frozen_dtype: type of frozen matrices; all other parameters have the skeleton's own.
    """
    frozen = {id(parameter) for parameter in list_frozen_matrices(model)}

    def make(name: str, old: nn.Parameter) -> nn.Parameter:
        new = torch.empty(old.shape, dtype=frozen_dtype if id(old) in frozen else old.dtype)
        new.view(-1).copy_(read_initial_values(model, name, old.shape, 0, old.numel()))
        return nn.Parameter(new, requires_grad=old.requires_grad)

    replace_parameters(model, make)
    move_buffers(model, torch.device("cpu"))


def read_exact_values(model: nn.Module) -> dict[str, Tensor]:
    """Read from the files the exact values of the parameters that `fill_skeleton` rounded, by name."""
    rounded = {id(p) for p in list_frozen_matrices(model) if p.dtype != model.weights.dtype}
    named = [(name, p.shape) for name, p in model.named_parameters() if id(p) in rounded]
    return {name: read_initial_values(model, name, shape, 0, shape.numel()).view(shape) for name, shape in named}
