"""LoRA through peft, injected in place: the model keeps transformers' class and its parameters keep their names."""

from __future__ import annotations

import contextlib
import hashlib
import math
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lit_vlm.config.schema import LoraConfig
from lit_vlm.model.parts import get_modules, iter_parameters
from lit_vlm.types import ModelPart, UserError

if TYPE_CHECKING:
    from peft.tuners.tuners_utils import BaseTunerLayer

MODULE_PATTERNS = {
    ModelPart.vision_tower: r"model\.vision_tower\.",
    ModelPart.projector: r"model\.multi_modal_projector\.",
    ModelPart.language_model: r"model\.language_model\.",
}


def add_lora(model: nn.Module, part: ModelPart, lora: LoraConfig, seed: int = 0) -> None:
    """Add LoRA adapters to a part's linear layers, initialised from `seed`, and freeze the rest of the part.

    Raises:
        UserError: a LoRA target is no linear layer of the part.
    """
    import peft  # late: 0.2 s that a stage without LoRA does not need

    linear = {
        name.rsplit(".", 1)[-1]
        for module in get_modules(model, part)
        for name, child in module.named_modules()
        if isinstance(child, nn.Linear)
    }
    linear.discard("")  # the head itself
    unknown = [target for target in lora.targets if target not in linear]
    if unknown:
        raise UserError(
            f"stage.parts.{part}.lora.targets: {', '.join(unknown)} is no linear layer of the {part}; it has {', '.join(sorted(linear))}."
        )
    names = "|".join(lora.targets or sorted(linear))
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=rf"{MODULE_PATTERNS[part]}(.*\.)?({names})",
    )
    frozen = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    peft.inject_adapter_in_model(config, model, adapter_name=str(part))
    for layer in find_lora_layers(model).values():  # peft has disabled the adapters of an earlier part
        layer.set_adapter(list(layer.lora_A))
    for name, parameter in model.named_parameters():
        before = name.replace(".base_layer", "")
        if before in frozen:  # peft freezes the whole model; restore the other parts
            parameter.requires_grad_(frozen[before])
    for name, parameter in iter_parameters(model, part):
        parameter.requires_grad_("lora_" in name)
        if "lora_" in name and not parameter.is_meta:
            parameter.data.copy_(init_adapter(name, parameter.shape, seed))


def init_adapter(name: str, shape: Sequence[int], seed: int) -> Tensor:
    """Initialise an adapter's matrix, float32, from peft's own distributions.

    Each matrix has a seed of its own, so that a process can initialise one without the others.
    """
    if "lora_B" in name:
        return torch.zeros(*shape, dtype=torch.float32)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return nn.init.kaiming_uniform_(torch.empty(*shape, dtype=torch.float32), a=math.sqrt(5), generator=generator)


@contextlib.contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """Disable all adapters inside: the model as it was before LoRA."""
    layers = find_lora_layers(model)
    for layer in layers.values():
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers.values():
            layer.enable_adapters(True)


def find_lora_layers(model: nn.Module) -> dict[str, BaseTunerLayer]:
    """Find the layers with LoRA adapters, by module name."""
    if "peft" not in sys.modules:  # it makes these layers, so there are none
        return {}
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
