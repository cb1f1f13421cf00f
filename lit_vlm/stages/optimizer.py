"""AdamW and the learning-rate schedule, with learning rate, weight decay and warm-up for each part."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from lit_vlm.compat.lightning import allow_clipping
from lit_vlm.config.choices import LearningRateSchedule
from lit_vlm.config.schema import StageConfig
from lit_vlm.model.parts import iter_parameters
from lit_vlm.types import ModelPart


def make_optimizer(model: nn.Module, config: StageConfig) -> torch.optim.AdamW:
    """Make AdamW with one parameter group for each part and weight decay.

    Vectors (biases, norms) do not decay, as in the LLaVA family's trainers.
    """
    groups = []
    for part in ModelPart:
        trainable = [parameter for _, parameter in iter_parameters(model, part) if parameter.requires_grad]
        for decays in (True, False):
            members = [parameter for parameter in trainable if (count_dimensions(parameter) > 1) is decays]
            if members:
                decay = config.get_part_setting(part, "weight_decay") if decays else 0.0
                rate = config.get_part_setting(part, "learning_rate")
                groups.append({"params": members, "lr": rate, "weight_decay": decay, "part": part.value})
    optimizer = torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=config.adam_betas, eps=config.adam_eps, fused=True
    )
    allow_clipping(optimizer)
    return optimizer


def count_dimensions(parameter: nn.Parameter) -> int:
    """Count the dimensions of the full parameter.

    ZeRO-3 shards a parameter and leaves an empty tensor in its place, with the full shape in `ds_shape`.
    """
    return len(getattr(parameter, "ds_shape", parameter.shape))


def make_scheduler(
    optimizer: torch.optim.Optimizer, config: StageConfig, num_steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Make the learning rate schedule (scheduler), with one curve for each parameter group."""
    lr_lambdas = [make_lr_lambda(config, ModelPart(group["part"]), num_steps) for group in optimizer.param_groups]
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lr_lambdas)


def make_lr_lambda(config: StageConfig, part: ModelPart, num_steps: int) -> Callable[[int], float]:
    """Make the learning rate schedule of a part: a linear warm-up, then the decay to its minimum.

    Returns:
        a function of the step that returns the fraction of the peak learning rate, as torch's LambdaLR needs it.
    """
    warmup = config.get_part_setting(part, "warmup")
    warmup_steps = math.ceil(warmup * num_steps) if warmup < 1 else int(warmup)
    minimum = config.min_learning_rate

    def compute_factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        if config.schedule is LearningRateSchedule.constant:
            return 1.0
        progress = min(1.0, (step - warmup_steps) / max(1, num_steps - warmup_steps))
        decay = (
            1.0 - progress
            if config.schedule is LearningRateSchedule.linear
            else 0.5 * (1.0 + math.cos(math.pi * progress))
        )
        return minimum + (1.0 - minimum) * decay

    return compute_factor
