"""Loads weights into model skeletons (`model/skeleton.py`) under ZeRO, so that a process holds no more than its part."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lit_vlm.model.skeleton import move_buffers, read_initial_values, replace_parameters


def load_full_weights(model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Load every weight completely, in the compute dtype (ZeRO-2)."""

    def make_parameter(name: str, old: nn.Parameter) -> nn.Parameter:
        values = read_initial_values(model, name, old.shape, 0, old.numel()) if old.is_meta else old.detach()
        return nn.Parameter(values.view(old.shape).to(device, dtype), requires_grad=old.requires_grad)

    replace_parameters(model, make_parameter)
    move_buffers(model, device)


def load_partitioned_weights(
    model: nn.Module, config: dict[str, Any], dtype: torch.dtype, device: torch.device
) -> None:
    """Load this rank's slice of each weight from its file (ZeRO-3).

    In addition to the slices, it needs memory for one uninitialised full weight at a time.

    Args:
        config: DeepSpeed's configuration.
        dtype: compute dtype of the weights.
    """
    import deepspeed

    converter = deepspeed.zero.Init(config_dict_or_path=config, dtype=dtype)  # not entered: torch stays unpatched

    def make_parameter(name: str, old: nn.Parameter) -> nn.Parameter:
        values = torch.empty(old.shape, dtype=dtype, device=device) if old.is_meta else old.detach().to(device, dtype)
        new: Any = nn.Parameter(values, requires_grad=old.requires_grad)
        del values
        converter._convert_to_deepspeed_param(new)
        new.partition()
        if old.is_meta:
            size = new.ds_tensor.numel()
            start = min(size * new.ds_zero_partition_rank, old.numel())
            stop = min(start + size, old.numel())
            new.ds_tensor[: stop - start].copy_(read_initial_values(model, name, old.shape, start, stop))
            new.ds_tensor[stop - start :].zero_()
        return new

    replace_parameters(model, make_parameter)
    move_buffers(model, device)
