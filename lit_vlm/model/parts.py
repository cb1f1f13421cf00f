"""Parts of a model (vision tower, projector, language model) and the parameters that belong to each."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from lit_vlm.types import Part, UserError

OWNERS = {
    "model.vision_tower.": Part.vision_tower,
    "model.multi_modal_projector.": Part.projector,
    "model.image_newline": Part.projector,  # LLaVA-OneVision's learned row separator
    "model.language_model.": Part.language_model,
    "lm_head.": Part.language_model,
    "new_tokens.": Part.language_model,  # rows of tokens that this run adds (TrainableTokens)
}
# SigLIP's and CLIP's last norms and heads are unused here: the projector reads the encoder's output. As trainable
# parameters they would stop DDP, because they get no gradient.
UNUSED = re.compile(r"^model\.vision_tower\.(vision_model\.)?(post_layernorm|head)\.")


@dataclass(frozen=True, slots=True)
class PartSummary:
    """One row of the summary of trainable parameters."""

    part: str
    parameters: int
    trainable: int
    how: str  # "frozen", "all", "LoRA r=8", "new tokens"

    def as_dict(self) -> dict:
        return asdict(self)


def part_of(name: str) -> Part:
    """Return the part that owns a parameter of LlavaOnevisionForConditionalGeneration, by its name in memory."""
    for prefix, part in OWNERS.items():
        if name.startswith(prefix):
            return part
    raise UserError(f"The parameter {name} belongs to no part; known prefixes: {', '.join(OWNERS)}.")


def parameters_of(model: nn.Module, part: Part) -> Iterator[tuple[str, nn.Parameter]]:
    """Iterate over the named parameters of a part."""
    return ((name, parameter) for name, parameter in model.named_parameters() if part_of(name) is part)


def freeze(model: nn.Module, trainable: Iterable[Part]) -> None:
    """Freeze all parameters except those of the trainable parts.

    Parameters that the forward pass never uses stay frozen.
    """
    trainable_parts = set(trainable)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) in trainable_parts and not UNUSED.match(name))
    inner: Any = model.model  # transformers' class; nn.Module types an attribute only as tensor or module
    projector = inner.multi_modal_projector
    if getattr(model.config, "projector_hidden_act", "") == "linear":  # a linear projector is W then the identity
        projector.linear_2.requires_grad_(False)


def module_of(model: nn.Module, part: Part) -> list[nn.Module]:
    inner: Any = model.model
    head: Any = model.lm_head
    return {
        Part.vision_tower: [inner.vision_tower],
        Part.projector: [inner.multi_modal_projector],
        Part.language_model: [inner.language_model, head],
    }[part]


def set_modes(model: nn.Module, trainable: Iterable[Part], *, checkpointed: bool) -> None:
    """Set train mode for parts that train, and eval mode for frozen ones.

    A frozen part that gradients pass through under activation checkpointing is in train mode with dropout 0:
    transformers skips activation checkpointing of a module in eval mode, silently.
    """
    trainable_parts = set(trainable)
    model.train()
    for part in Part:
        needs_train_mode = checkpointed and part is Part.language_model
        for module in module_of(model, part):
            if part in trainable_parts:
                continue
            module.train(needs_train_mode)
            if needs_train_mode:
                _without_dropout(module)


def size_of(parameter: nn.Parameter) -> int:
    """Count the elements of the full parameter.

    ZeRO-3 shards a parameter and leaves an empty tensor in its place, with the full size in `ds_numel`.
    """
    return getattr(parameter, "ds_numel", parameter.numel())


def summary(model: nn.Module, how: dict[Part, str]) -> list[PartSummary]:
    """Summarize the parameters of each part, [3] rows; `how` says how a part trains, where that is not "all"."""
    rows = []
    for part in Part:
        parameters = [parameter for _, parameter in parameters_of(model, part)]
        total, trainable = sum(map(size_of, parameters)), sum(size_of(p) for p in parameters if p.requires_grad)
        rows.append(PartSummary(part.value, total, trainable, how.get(part, "all") if trainable else "frozen"))
    return rows


def _without_dropout(module: nn.Module) -> None:
    children: Iterable[Any] = module.modules()  # nn.Module's annotations do not allow a float attribute
    for child in children:
        if isinstance(child, nn.Dropout):
            child.p = 0.0
        if hasattr(child, "attention_dropout"):
            child.attention_dropout = 0.0
