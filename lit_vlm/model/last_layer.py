"""The language model's last layer, computed only where its result is read.

Behind it stands the head, which runs on the rows that are supervised. So of the last layer all tokens are needed as
keys and values, and only those rows as queries, in the output matrix and in the MLP: exact, forward and backward. It
saves most of one layer of an align or preference step.
"""

from __future__ import annotations

import sys
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlavaOnevisionForConditionalGeneration

from lit_vlm.cost.shape import PRUNED
from lit_vlm.model.attention import flat_attention
from lit_vlm.model.segments import Segments

# Shapes: T tokens, D width, R rows, Q queries: the rows and what lies between them in their segments.


class LastLayer(nn.Module):
    """A decoder layer of transformers with one more way through: for `segments.last` it returns the rows alone.

    For families whose layer is norm, attention, norm, MLP, with or without norms behind the two and a factor on each
    residual.
    """

    def forward(self, hidden_states: Tensor, *args: Any, segments: Segments | None = None, **kwargs: Any) -> Tensor:
        """As transformers', or [1, R, D] of hidden_states [1, T, D]."""
        if segments is None:
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        if segments.last is None:
            return super().forward(hidden_states, *args, segments=segments, **kwargs)  # type: ignore[misc]
        asked, rows = segments.last
        layer: Any = self
        factor = getattr(layer, "residual_multiplier", 1.0)
        normed = layer.input_layernorm(hidden_states)
        attended = _attend(layer.self_attn, normed, asked, rows, *kwargs["position_embeddings"])
        residual = hidden_states.index_select(1, rows) + _behind(layer, "post_norm1", attended) * factor
        read = layer.mlp(layer.post_attention_layernorm(residual))
        return residual + _behind(layer, "post_norm2", read) * factor


def _attend(attention: Any, normed: Tensor, asked: Segments, rows: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[1, R, D] of normed [1, T, D]; cos and sin [1, T, head width]."""
    queries = asked.asked
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
    ].apply_rotary_pos_emb  # of two tensors; here they have other lengths
    q, _ = rotate(q, q[:, :0], cos.index_select(1, queries), sin.index_select(1, queries))
    k, _ = rotate(k, k[:, :0], cos, sin)
    out, _ = flat_attention(
        attention,
        q,
        k,
        v,
        None,
        scaling=attention.scaling,
        dropout=attention.attention_dropout if attention.training else 0.0,
        segments=asked,
        # Qwen's layers differ in it and have their own, Mistral's have the model's
        sliding_window=getattr(attention, "sliding_window", getattr(attention.config, "sliding_window", None)),
    )
    place = torch.searchsorted(queries, rows)
    return attention.o_proj(out.index_select(1, place).flatten(2))


def _behind(layer: Any, name: str, states: Tensor) -> Tensor:
    return getattr(layer, name)(states) if hasattr(layer, name) else states


def prune_last_layer(model: LlavaOnevisionForConditionalGeneration) -> bool:
    """Give the last layer of a known family its second way; whether it has one."""
    layer = model.model.language_model.layers[-1]
    if not isinstance(layer, LastLayer) and model.config.text_config.model_type in PRUNED:
        layer.__class__ = _with_second_way(type(layer))  # type: ignore[arg-type]
    return isinstance(layer, LastLayer)


@lru_cache
def _with_second_way(kind: Any) -> Any:
    return type(kind.__name__, (LastLayer, kind), {})  # the name stays: transformers looks layers up by it
