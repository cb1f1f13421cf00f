"""AdamW and the learning-rate schedule, with learning rate, weight decay and warm-up for each part."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from lit_vlm.compat.lightning import allow_clipping
from lit_vlm.model.lora import LoraOptions
from lit_vlm.model.parts import iter_parameters
from lit_vlm.types import ModelPart


@dataclass(frozen=True, slots=True)
class PartOptions:
    """Optimizer options of one part that differ from the stage's; None uses the stage's value."""

    learning_rate: float | None = None
    weight_decay: float | None = None
    warmup: float | None = None
    lora: LoraOptions | None = None


@dataclass(frozen=True, slots=True)
class OptimizerOptions:
    """Optimizer options of a stage. Learning rates are peaks.

    A warm-up below 1 is a fraction of the steps, else a number of steps.
    """

    learning_rate: float
    weight_decay: float = 0.0
    warmup: float = 0.03
    schedule: str = "cosine"
    min_learning_rate: float = 0.0  # as a fraction of the peak
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    parts: dict[ModelPart, PartOptions] = field(default_factory=dict)

    def get(self, part: ModelPart, name: str) -> Any:
        """Get an option of a part: its own value, or the stage's."""
        own = getattr(self.parts.get(part), name, None)
        return getattr(self, name) if own is None else own


def make_optimizer_options(arguments: dict[str, Any]) -> OptimizerOptions:
    """Make the optimizer options from a stage's arguments, plain values by name."""
    parts = {}
    for name, values in (arguments["parts"] or {}).items():
        values = dict(values)
        lora = values.pop("lora", None)
        lora_options = LoraOptions(**lora) if lora and lora.get("rank", 0) > 0 else None
        parts[ModelPart(name)] = replace(PartOptions(**values), lora=lora_options)
    return OptimizerOptions(
        learning_rate=arguments["learning_rate"],
        weight_decay=arguments["weight_decay"],
        warmup=arguments["warmup"],
        schedule=str(arguments["schedule"]),
        min_learning_rate=arguments["min_learning_rate"],
        betas=tuple(arguments["adam_betas"]),
        eps=arguments["adam_eps"],
        parts=parts,
    )


def make_optimizer(model: nn.Module, options: OptimizerOptions) -> torch.optim.AdamW:
    """Make AdamW with one parameter group for each part and weight decay.

    Vectors (biases, norms) do not decay, as in the LLaVA family's trainers.
    """
    groups = []
    for part in ModelPart:
        trainable = [parameter for _, parameter in iter_parameters(model, part) if parameter.requires_grad]
        for decays in (True, False):
            members = [parameter for parameter in trainable if (count_dimensions(parameter) > 1) is decays]
            if members:
                decay = options.get(part, "weight_decay") if decays else 0.0
                rate = options.get(part, "learning_rate")
                groups.append({"params": members, "lr": rate, "weight_decay": decay, "part": part.value})
    optimizer = torch.optim.AdamW(groups, lr=options.learning_rate, betas=options.betas, eps=options.eps, fused=True)
    allow_clipping(optimizer)
    return optimizer


def count_dimensions(parameter: nn.Parameter) -> int:
    """Count the dimensions of the full parameter.

    ZeRO-3 shards a parameter and leaves an empty tensor in its place, with the full shape in `ds_shape`.
    """
    return len(getattr(parameter, "ds_shape", parameter.shape))


def make_scheduler(
    optimizer: torch.optim.Optimizer, options: OptimizerOptions, num_steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Make the learning-rate schedule (scheduler), with one curve for each parameter group."""
    lr_lambdas = [make_lr_lambda(options, ModelPart(group["part"]), num_steps) for group in optimizer.param_groups]
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lr_lambdas)


def make_lr_lambda(options: OptimizerOptions, part: ModelPart, num_steps: int) -> Callable[[int], float]:
    """Make the learning-rate schedule of a part: a linear warm-up, then the decay to its minimum.

    Returns:
        a function of the step that returns the fraction of the peak learning rate, as torch's LambdaLR needs it.
    """
    warmup = options.get(part, "warmup")
    warmup_steps = math.ceil(warmup * num_steps) if warmup < 1 else int(warmup)
    minimum = options.min_learning_rate

    def compute_factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        if options.schedule == "constant":
            return 1.0
        progress = min(1.0, (step - warmup_steps) / max(1, num_steps - warmup_steps))
        decay = 1.0 - progress if options.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
        return minimum + (1.0 - minimum) * decay

    return compute_factor
