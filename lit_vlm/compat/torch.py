"""Private parts of PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

if TYPE_CHECKING:  # workers of a DataLoader import this module, and need no torch.distributed
    from torch.distributed.tensor import DTensor

__all__ = [
    "GROUPED_MM",
    "TorchDispatchMode",
    "allocate_on_device",
    "allocate_shared",
    "compute_norms",
    "get_argument_names",
    "get_local_rows",
    "initialize_fsdp",
    "queue_after_backward",
]

GROUPED_MM = torch.ops.aten._grouped_mm.default  # matrix products of experts


def compute_norms(tensors: list[Tensor]) -> tuple[Tensor, ...]:
    """Compute the L2 norm of each tensor in float32, with one kernel for all."""
    return torch._foreach_norm(tensors, 2, dtype=torch.float32)


def queue_after_backward(function: Callable[[], None]) -> None:
    """Call a function when the running backward pass has computed all gradients. Call this inside a backward pass."""
    engine: Any = torch.autograd.Variable._execution_engine
    engine.queue_callback(function)


def allocate_shared(num_bytes: int) -> torch.UntypedStorage:
    """Allocate memory that a DataLoader worker shares with the trainer, as torch's `default_collate` does."""
    return torch.UntypedStorage._new_shared(num_bytes)


def get_argument_names(operation: Any) -> list[str]:
    """Return the names of the arguments of an operation of `torch.ops`."""
    return [argument.name for argument in operation._schema.arguments]


def get_local_rows(tensor: DTensor) -> tuple[Tensor, int]:
    """Return this rank's rows of a sharded tensor, as a live view, and the offset of their first element.

    The offset counts elements of the flattened full tensor.
    """
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    width = tensor.shape[1:].numel()
    return cast("DTensor", tensor.detach()).to_local(), offset[0] * width


def allocate_on_device(model: nn.Module, device: torch.device) -> None:
    """Allocate the parameters and buffers on `meta` on a device, and move the others to it."""
    model._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device))


def initialize_fsdp(model: Any) -> None:
    """Make a sharded model the root of its units, as its first forward pass would. Without it, a unit that runs first would be one."""
    model._get_fsdp_state()._lazy_init()
