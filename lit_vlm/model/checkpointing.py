"""Activation checkpointing: what of a layer is kept for its backward pass, and what is computed again.

Between keeping all (`none`) and a layer's input alone (`full`) lies `selective`: the results of matrix products and of
attention are kept, and what is cheap beside them (norms, rotary embeddings, activation functions, products, casts) is
computed again. It is exact: the same operations on the same numbers, dropout's draws included.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import LlavaOnevisionForConditionalGeneration, PreTrainedModel

from lit_vlm.config.schema import ActivationCheckpointing as Level
from lit_vlm.types import UserError

PRODUCTS = {
    torch.ops.aten.mm.default: (0, 1),
    torch.ops.aten.addmm.default: (1, 2),
    torch.ops.aten._grouped_mm.default: (0, 1),  # of experts
}  # operation -> where its two factors are among its arguments
ATTENTION = {
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_fused_attention_overrideable",
    "torch_attn::_varlen_attn",
}
NARROW = 2  # a product over less than this part of the layer's width is an adapter's


def level_of(value: str | bool) -> Level:
    """A level by its name; True is `full` and False is `none`.

    Raises:
        UserError: there is none of that name.
    """
    named = {True: "full", False: "none"}.get(value, value) if isinstance(value, bool) else value
    if named not in ("none", "selective", "full"):
        raise UserError(f"activation_checkpointing={value}: it is none, selective or full.")
    return Level[named]


def checkpoint_layers(model: LlavaOnevisionForConditionalGeneration, level: Level) -> None:
    """Let the layers of tower and language model keep no more than `level` says, while they are in train mode."""
    inner: Any = model.model
    if level is not Level.none:
        for part in (inner.vision_tower, inner.language_model):
            part.activation_checkpointing_enable({"use_reentrant": False} | _contexts(part, level))
            part.disable_input_require_grads()  # transformers' help for reentrant checkpointing alone


def are_layers_checkpointed(model: nn.Module) -> bool:
    """Whether some layer in train mode is; transformers knows not how to for every family."""
    return any(getattr(module, "gradient_checkpointing", False) and module.training for module in model.modules())


def _contexts(part: PreTrainedModel, level: Level) -> dict[str, Any]:
    if level is Level.full:
        return {}
    policy = partial(_policy, part.config.hidden_size)
    return {"context_fn": partial(create_selective_checkpoint_contexts, policy)}


def _policy(width: int, context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """What torch asks of each operation in a layer of that width."""
    keep = is_kept(width, operation, *args, **kwargs)
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def is_kept(width: int, operation: Any, *args: Any, **kwargs: Any) -> bool:
    """Whether `selective` keeps the result of an operation, called with these arguments in a layer of that width."""
    if operation in PRODUCTS:
        return _is_worth_keeping(width, *(args[place] for place in PRODUCTS[operation]))
    return operation.name().partition(".")[0] in ATTENTION and not _draws(operation, args, kwargs)


def _is_worth_keeping(width: int, left: torch.Tensor, right: torch.Tensor) -> bool:
    """Not the layer's last product, which narrows back to the layer's width: nothing behind it asks for its result. Nor
    what widens an adapter: its result is as large as the layer's own, and costs next to nothing."""
    inner, outer = left.shape[-1], right.shape[-1]
    return not (inner > outer == width) and inner * NARROW > width


def _draws(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether attention drops weights. It is computed again then, so that what is drawn behind it is drawn alike."""
    names = [argument.name for argument in operation._schema.arguments]
    return bool((dict(zip(names, args, strict=False)) | kwargs).get("dropout_p"))
