"""GPU memory by part: weights, gradients, optimizer state."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lit_vlm.engine.gradients import get_local_gradients


def measure_memory_parts(trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, int]:
    """Measure the bytes of weights, gradients and optimizer state on this rank's device. Frozen weights count as weights.

    Call it while the gradients of a step exist. Offloaded parts lie in host memory and do not count.
    """
    device = trainer.strategy.root_device
    return {
        "weights": _count_bytes(_iter_weights(pl_module), device),
        "gradients": _count_bytes(get_local_gradients(trainer, trainer.optimizers[0]), device),
        "optimizer": _count_bytes(_iter_optimizer_states(trainer), device),
    }


def _iter_weights(module: torch.nn.Module) -> Iterator[Tensor]:
    for parameter in module.parameters():
        value: Any = parameter
        yield getattr(value, "ds_tensor", parameter)  # ZeRO-3: the local partition
    yield from module.buffers()


def _iter_optimizer_states(trainer: L.Trainer) -> Iterator[Tensor]:
    """Yield the optimizer moments and the float32 master weights of DeepSpeed."""
    engine: Any = getattr(trainer.strategy.model, "optimizer", None)
    for optimizer in (engine, getattr(engine, "optimizer", None), trainer.optimizers[0]):
        for state in getattr(optimizer, "state", {}).values():
            yield from (value for value in state.values() if isinstance(value, Tensor))
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups"):
        yield from getattr(engine, name, None) or ()


def _count_bytes(tensors: Iterable[Tensor], device: torch.device) -> int:
    """Return the bytes of the tensors on the device. Views of one storage count once."""
    sizes: dict[int, int] = {}
    for tensor in tensors:
        local: Any = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        if local.device.type == device.type and local.numel():
            storage = local.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())
