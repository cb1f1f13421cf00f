"""What fills a device's memory, by part."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lit_vlm.engine.gradients import gradients_of


def memory_parts(trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, int]:
    """Bytes of weights, gradients and optimizer that this rank's device holds now; frozen weights count as weights.

    To be called when a step's gradients are there. Offloaded parts are in the host's memory and count nothing.
    """
    device = trainer.strategy.root_device
    return {
        "weights": _bytes(_weights(pl_module), device),
        "gradients": _bytes(gradients_of(trainer, trainer.optimizers[0]), device),
        "optimizer": _bytes(_states(trainer), device),
    }


def _weights(module: torch.nn.Module) -> Iterator[Tensor]:
    for parameter in module.parameters():
        value: Any = parameter
        yield getattr(value, "ds_tensor", parameter)  # ZeRO-3's share of it
    yield from module.buffers()


def _states(trainer: L.Trainer) -> Iterator[Tensor]:
    """Moments, and the float32 masters of DeepSpeed."""
    engine: Any = getattr(trainer.strategy.model, "optimizer", None)
    for owner in (engine, getattr(engine, "optimizer", None), trainer.optimizers[0]):
        for state in getattr(owner, "state", {}).values():
            yield from (value for value in state.values() if isinstance(value, Tensor))
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups"):
        yield from getattr(engine, name, None) or ()


def _bytes(tensors: Iterable[Tensor], device: torch.device) -> int:
    """Each storage counts once, whoever looks into it."""
    found: dict[int, int] = {}
    for tensor in tensors:
        local: Any = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        if local.device.type == device.type and local.numel():
            storage = local.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())
