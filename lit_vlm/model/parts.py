"""Parts of a model (vision tower, projector, language model) and the parameters that belong to each."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from lit_vlm.model.projectors import get_projector
from lit_vlm.types import ModelPart, UserError

PARTS_BY_PREFIX = {
    "model.vision_tower.": ModelPart.vision_tower,
    "model.multi_modal_projector.": ModelPart.projector,
    "model.image_newline": ModelPart.projector,  # LLaVA-OneVision's learned row separator
    "model.language_model.": ModelPart.language_model,
    "lm_head.": ModelPart.language_model,
    "new_tokens.": ModelPart.language_model,  # rows of tokens that this run adds (TrainableTokens)
}
# SigLIP's and CLIP's last norms and heads are unused here: the projector reads the encoder's output. As trainable
# parameters they would stop DDP, because they get no gradient.
UNUSED_PARAMETERS = re.compile(r"^model\.vision_tower\.(vision_model\.)?(post_layernorm|head)\.")


@dataclass(frozen=True, slots=True)
class PartSummary:
    """One row of the summary of trainable parameters."""

    part: str
    parameters: int
    trainable: int
    how: str  # "frozen", "all", "LoRA r=8", "new tokens"

    def to_dict(self) -> dict:
        return asdict(self)


def get_part(name: str) -> ModelPart:
    """Return the part that owns a parameter of the model, by its name in memory."""
    for prefix, part in PARTS_BY_PREFIX.items():
        if name.startswith(prefix):
            return part
    raise UserError(f"The parameter {name} belongs to no part; known prefixes: {', '.join(PARTS_BY_PREFIX)}.")


def iter_parameters(model: nn.Module, part: ModelPart) -> Iterator[tuple[str, nn.Parameter]]:
    """Iterate over the named parameters of a part."""
    return ((name, parameter) for name, parameter in model.named_parameters() if get_part(name) is part)


def freeze_except(model: nn.Module, trainable: Iterable[ModelPart]) -> None:
    """Freeze all parameters except those of the trainable parts.

    Parameters that the forward pass never uses stay frozen.
    """
    trainable_parts = set(trainable)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(get_part(name) in trainable_parts and not UNUSED_PARAMETERS.match(name))
    inner: Any = model.model  # transformers' class; nn.Module types an attribute only as tensor or module
    for parameter in get_projector(model.config).list_fixed_parameters(inner.multi_modal_projector):
        parameter.requires_grad_(False)


def get_modules(model: nn.Module, part: ModelPart) -> list[nn.Module]:
    inner: Any = model.model
    head: Any = model.lm_head
    return {
        ModelPart.vision_tower: [inner.vision_tower],
        ModelPart.projector: [inner.multi_modal_projector],
        ModelPart.language_model: [inner.language_model, head],
    }[part]


def set_train_modes(model: nn.Module, trainable: Iterable[ModelPart], *, checkpointed: bool) -> None:
    """Set train mode for parts that train, and eval mode for frozen ones.

    A frozen part that gradients pass through under activation checkpointing is in train mode with dropout 0:
    transformers skips activation checkpointing of a module in eval mode, silently.
    """
    trainable_parts = set(trainable)
    model.train()
    for part in ModelPart:
        needs_train_mode = checkpointed and part is ModelPart.language_model
        for module in get_modules(model, part):
            if part in trainable_parts:
                continue
            module.train(needs_train_mode)
            if needs_train_mode:
                _disable_dropout(module)


def count_elements(parameter: nn.Parameter) -> int:
    """Count the elements of the full parameter.

    ZeRO-3 shards a parameter and leaves an empty tensor in its place, with the full size in `ds_numel`.
    """
    return getattr(parameter, "ds_numel", parameter.numel())


def summarize_parts(model: nn.Module, how: dict[ModelPart, str]) -> list[PartSummary]:
    """Summarize the parameters of each part, [3] rows; `how` says how a part trains, where that is not "all"."""
    rows = []
    for part in ModelPart:
        parameters = [parameter for _, parameter in iter_parameters(model, part)]
        total, trainable = (
            sum(map(count_elements, parameters)),
            sum(count_elements(p) for p in parameters if p.requires_grad),
        )
        rows.append(PartSummary(part.value, total, trainable, how.get(part, "all") if trainable else "frozen"))
    return rows


def _disable_dropout(module: nn.Module) -> None:
    children: Iterable[Any] = module.modules()  # nn.Module's annotations do not allow a float attribute
    for child in children:
        if isinstance(child, nn.Dropout):
            child.p = 0.0
        if hasattr(child, "attention_dropout"):
            child.attention_dropout = 0.0


def summarize_modules(model: nn.Module, patterns: Mapping[str, str]) -> list[PartSummary]:
    """Summarise the parameters of a model of other parts; a shared parameter counts once.

    Args:
        patterns: part -> regular expression that is searched in the names; the first that matches.
    """
    counts = {part: [0, 0] for part in patterns}
    for name, parameter in model.named_parameters():
        part = next(part for part, pattern in patterns.items() if re.search(pattern, name))
        counts[part][0] += parameter.numel()
        counts[part][1] += parameter.numel() * parameter.requires_grad
    how = {0: "frozen", 1: "part of it", 2: "all"}
    return [
        PartSummary(part, total, trainable, how[(trainable > 0) + (trainable == total > 0)])
        for part, (total, trainable) in counts.items()
    ]
