"""Activation checkpointing: which activations of a layer are saved for the backward pass, and which are recomputed.

`none` saves all of them and `full` saves only the input of each layer. Between them is `selective`: results of matrix
products and of attention are saved, and what is cheap in comparison (norms, rotary embeddings, activation functions,
element-wise products, casts) is recomputed. It is exact: the same operations on the same numbers, dropout masks
included.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

from lit_vlm.compat.torch import GROUPED_MM, get_argument_names
from lit_vlm.config.choices import ActivationCheckpointing as Level

if TYPE_CHECKING:
    from lit_vlm.model.classes import VisionLanguageModel

MATMUL_OPERAND_INDICES = {
    torch.ops.aten.mm.default: (0, 1),
    torch.ops.aten.addmm.default: (1, 2),
    GROUPED_MM: (0, 1),
}  # operation -> indices of its two factors among its arguments
ATTENTION_OPS = {
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_fused_attention_overrideable",
    "torch_attn::_varlen_attn",
}
ADAPTER_WIDTH_RATIO = 2  # a product over at most 1/2 of the layer's width is one of an adapter


def enable_activation_checkpointing(model: VisionLanguageModel, level: Level) -> None:
    """Enable activation checkpointing at this level in vision tower and language model; it works in train mode only."""
    inner: Any = model.model
    if level is not Level.none:
        for part in (inner.vision_tower, inner.language_model):
            part.activation_checkpointing_enable({"use_reentrant": False} | _make_checkpoint_options(part, level))
            part.disable_input_require_grads()  # only reentrant checkpointing needs transformers' hook


def has_checkpointed_layers(model: nn.Module) -> bool:
    """Return True when some layer in train mode is checkpointed; transformers does not support it for every family."""
    return any(getattr(module, "gradient_checkpointing", False) and module.training for module in model.modules())


def _make_checkpoint_options(part: PreTrainedModel, level: Level) -> dict[str, Any]:
    if level is Level.full:
        return {}
    policy = partial(_choose_policy, part.config.hidden_size)
    return {"context_fn": partial(create_selective_checkpoint_contexts, policy)}


def _choose_policy(width: int, context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Choose whether torch saves or recomputes the result of an operation in a layer of that width."""
    is_saved = should_save_result(width, operation, *args, **kwargs)
    return CheckpointPolicy.MUST_SAVE if is_saved else CheckpointPolicy.PREFER_RECOMPUTE


def should_save_result(width: int, operation: Any, *args: Any, **kwargs: Any) -> bool:
    """Return True when `selective` saves the result of this operation, called in a layer of that width."""
    if operation in MATMUL_OPERAND_INDICES:
        return _should_save_matmul(width, *(args[place] for place in MATMUL_OPERAND_INDICES[operation]))
    return operation.name().partition(".")[0] in ATTENTION_OPS and not _has_dropout(operation, args, kwargs)


def _should_save_matmul(width: int, left: torch.Tensor, right: torch.Tensor) -> bool:
    """Return True when the result of a matrix product is worth its memory.

    Not the layer's last product, which narrows back to the layer's width: no operation behind it reads its result. Nor
    the product that widens an adapter: its result is as large as the layer's own, and costs next to nothing to compute.
    """
    inner, outer = left.shape[-1], right.shape[-1]
    return not (inner > outer == width) and inner * ADAPTER_WIDTH_RATIO > width


def _has_dropout(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return True when attention applies dropout.

    It is recomputed then, so that all later random numbers of the layer are the same again.
    """
    return bool((dict(zip(get_argument_names(operation), args, strict=False)) | kwargs).get("dropout_p"))
