"""Compute the language model's last layer only at the positions whose result is read.

Behind it is the head, which runs on supervised positions only. So the last layer needs all tokens as keys and values,
but only those positions as queries, in the output projection and in the MLP. This is exact, forward and backward. It
saves most of one layer in an align or preference step.
"""

from __future__ import annotations

import sys
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlavaOnevisionForConditionalGeneration

from lit_vlm.cost.shape import MODELS_WITH_PRUNED_LAST_LAYER
from lit_vlm.model.attention import flat_attention_forward
from lit_vlm.model.segments import Segments

# Shapes: T tokens, D width, R positions that are read, Q queries: these and the positions between them in a segment.


class PrunedLastLayer(nn.Module):
    """Decoder layer of transformers that returns only the positions of `segments.last_layer`, when it is set.

    For families whose layer is norm, attention, norm, MLP, with or without a norm behind attention and MLP and with or
    without a factor on each residual.
    """

    def forward(self, hidden_states: Tensor, *args: Any, segments: Segments | None = None, **kwargs: Any) -> Tensor:
        """Return transformers' result, or [1, R, D] of hidden_states [1, T, D]."""
        if segments is None:
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        if segments.last_layer is None:
            return super().forward(hidden_states, *args, segments=segments, **kwargs)  # type: ignore[misc]
        query_segments, positions = segments.last_layer
        layer: Any = self
        factor = getattr(layer, "residual_multiplier", 1.0)
        normed = layer.input_layernorm(hidden_states)
        attended = _compute_attention(
            layer.self_attn, normed, query_segments, positions, *kwargs["position_embeddings"]
        )
        residual = (
            hidden_states.index_select(1, positions) + _apply_optional_norm(layer, "post_norm1", attended) * factor
        )
        mlp_out = layer.mlp(layer.post_attention_layernorm(residual))
        return residual + _apply_optional_norm(layer, "post_norm2", mlp_out) * factor


def _compute_attention(
    attention: Any, normed: Tensor, segments: Segments, positions: Tensor, cos: Tensor, sin: Tensor
) -> Tensor:
    """Compute attention of the queries: [1, R, D] of normed [1, T, D]; cos and sin [1, T, head width]."""
    queries = segments.query_positions
    q, k, v = (
        projection(states).unflatten(-1, (-1, attention.head_dim))
        for projection, states in (
            (attention.q_proj, normed.index_select(1, queries)),
            (attention.k_proj, normed),
            (attention.v_proj, normed),
        )
    )
    if hasattr(attention, "q_norm"):
        q, k = attention.q_norm(q), attention.k_norm(k)
    q, k, v = (states.transpose(1, 2) for states in (q, k, v))
    rotate = sys.modules[
        type(attention).__module__
    ].apply_rotary_pos_emb  # rotates queries and keys together; here their lengths differ
    q, _ = rotate(q, q[:, :0], cos.index_select(1, queries), sin.index_select(1, queries))
    k, _ = rotate(k, k[:, :0], cos, sin)
    out, _ = flat_attention_forward(
        attention,
        q,
        k,
        v,
        None,
        scaling=attention.scaling,
        dropout=attention.attention_dropout if attention.training else 0.0,
        segments=segments,
        # Qwen's layers each have their own window, Mistral's use the one of the model's config
        sliding_window=getattr(attention, "sliding_window", getattr(attention.config, "sliding_window", None)),
    )
    index = torch.searchsorted(queries, positions)
    return attention.o_proj(out.index_select(1, index).flatten(2))


def _apply_optional_norm(layer: Any, name: str, states: Tensor) -> Tensor:
    return getattr(layer, name)(states) if hasattr(layer, name) else states


def prune_last_layer(model: LlavaOnevisionForConditionalGeneration) -> bool:
    """Patch the last layer of a supported family to skip positions that are not read; return True if it is patched."""
    layer = model.model.language_model.layers[-1]
    if not isinstance(layer, PrunedLastLayer) and model.config.text_config.model_type in MODELS_WITH_PRUNED_LAST_LAYER:
        layer.__class__ = _make_pruned_class(type(layer))  # type: ignore[arg-type]
    return isinstance(layer, PrunedLastLayer)


@lru_cache
def _make_pruned_class(layer_class: Any) -> Any:
    return type(
        layer_class.__name__, (PrunedLastLayer, layer_class), {}
    )  # keep the name: transformers looks layers up by it
