"""Gradient of an optimizer step, under every strategy: compute its norm, or skip its update."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor

from lit_vlm.compat.deepspeed import get_zero_engine, skip_next_update
from lit_vlm.compat.torch import compute_norms


def compute_grad_square_sum(trainer: L.Trainer, optimizer: torch.optim.Optimizer) -> Tensor:
    """Compute this rank's part of the squared gradient norm, [] float64. The sum over ranks is the squared norm of the step.

    Non-finite if an element of this rank's gradients is non-finite. Call it once the gradients are reduced and before they
    are clipped, in `on_before_optimizer_step`. It reads each gradient once and does not wait for the device.
    """
    total = torch.zeros((), dtype=torch.float64, device=trainer.strategy.root_device)
    for replicas, gradients in _group_by_replicas(trainer, optimizer).items():
        norms = compute_norms(gradients)
        total += torch.stack([norm.to(total.device) for norm in norms]).double().square().sum() / replicas
    return total


def get_local_gradients(trainer: L.Trainer, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return this rank's part of the reduced gradients."""
    return [gradient for gradients in _group_by_replicas(trainer, optimizer).values() for gradient in gradients]


def skip_update(trainer: L.Trainer, optimizer: torch.optim.Optimizer) -> None:
    """Skip the next update: weights, moments and the optimizer's step count stay as they are."""
    engine = get_zero_engine(trainer.strategy.model)
    if engine is not None:
        skip_next_update(engine)
        return
    for parameter in _get_parameters(optimizer):
        parameter.grad = None  # PyTorch's optimizers skip a parameter without a gradient


def _group_by_replicas(trainer: L.Trainer, optimizer: torch.optim.Optimizer) -> dict[int, list[Tensor]]:
    """Group this rank's gradients by the number of ranks that hold the same elements."""
    if hasattr(trainer.strategy, "local_gradients"):  # ZeRO: slices that no other rank holds
        slices = [gradient_slice for _, gradient_slice in trainer.strategy.local_gradients() if gradient_slice.numel()]
        return {1: slices} if slices else {}
    groups: dict[int, list[Tensor]] = {}
    for parameter in _get_parameters(optimizer):
        gradient: Any = parameter.grad
        if gradient is None:
            continue
        replicas = trainer.world_size
        if hasattr(gradient, "placements"):  # a DTensor: FSDP2
            sizes = zip(gradient.placements, gradient.device_mesh.shape, strict=True)
            for placement, size in sizes:
                replicas //= size if placement.is_shard() else 1
            gradient = gradient.to_local()
        if gradient.numel():
            groups.setdefault(replicas, []).append(gradient)
    return groups


def _get_parameters(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
