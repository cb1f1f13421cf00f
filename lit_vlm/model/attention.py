"""Attention over packed segments of a flat row, registered with transformers under the name `flat`.

A decoder layer of transformers calls it like any other attention implementation. With the keyword `segments`, no token
attends to another segment. Without it (generation, plain use) the call goes to transformers' own SDPA, masks included.
"""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lit_vlm.model.segments import Segments, VarlenCall
from lit_vlm.types import UserError

FLAT_ATTENTION = "flat"

# Shapes: T tokens in the row, H heads, K key-value heads, D head width, Q queries (T, or those that a layer needs), G
# spans of one group, L the maximum number of queries in it.


def flat_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    segments: Segments | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute causal attention inside each segment, and from a segment to its whole prefix.

    Args:
        query: [1, H, Q, D]; `key` and `value` [1, K, T, D].
        segments: the packed segments of the row; None: transformers' SDPA.
        sliding_window: a token attends to at most this many tokens, itself included.

    Returns:
        [1, Q, H, D], and None for the attention weights.
    """
    if segments is None:
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            scaling=scaling,
            dropout=dropout,
            sliding_window=sliding_window,
            **kwargs,
        )
    device = query.device.type
    # rotary embeddings leave queries and keys in float32; autocast casts only for SDPA
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    window = sliding_window if sliding_window and sliding_window < segments.max_num_keys else None
    is_half = query.dtype in (torch.bfloat16, torch.float16)  # types that FlashAttention supports
    if query.is_cuda and is_half and not dropout:
        return _run_varlen_attention(query, key, value, segments, scaling, window), None
    return _run_grouped_attention(query, key, value, segments, scaling, dropout, window), None


def _run_varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling: float | None, window: int | None
) -> Tensor:
    """Run one variable-length FlashAttention call for each set of spans; return [1, Q, H, D]."""
    q, k, v = (tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value))
    index = None if len(segments.query_positions) == len(k) else _index_positions(segments.query_positions, len(k))
    results = []
    for call in segments.varlen_calls:
        queries = call.queries if call.queries is None or index is None else index[call.queries]
        q_part = q if queries is None or len(queries) == len(q) else q.index_select(0, queries)
        kv_part = (k, v) if call.keys is None else (k.index_select(0, call.keys), v.index_select(0, call.keys))
        results.append(run_varlen_kernel(q_part, *kv_part, call, scaling, window))
    if segments.varlen_output_index is None:
        return results[0][None]
    return torch.cat(results).index_select(0, segments.varlen_output_index)[None]


def _index_positions(query_positions: Tensor, length: int) -> Tensor:
    """Compute [T]: the index of each row position within `query_positions`."""
    index = query_positions.new_zeros(length)
    index[query_positions] = torch.arange(len(query_positions), device=query_positions.device)
    return index


def run_varlen_kernel(
    q: Tensor, k: Tensor, v: Tensor, call: VarlenCall, scaling: float | None, window: int | None
) -> Tensor:
    """Run torch's variable-length FlashAttention; return [queries, H, D].

    The arguments differ between torch releases. Causal attention is `is_causal` in torch 2.10 and `window_size` in
    later releases. Without `enable_gqa`, key-value heads are repeated.
    """
    from torch.nn.attention.varlen import varlen_attn

    parameters = signature(varlen_attn).parameters
    left = -1 if window is None else window - 1
    options: dict[str, Any] = {"window_size": (left, 0)} if "window_size" in parameters else {"is_causal": True}
    if window is not None and "window_size" not in parameters:
        raise UserError("Sliding windows need a newer torch than this one: 2.12 has them for variable lengths.")
    if "scale" in parameters:
        options["scale"] = scaling
    elif scaling is not None:
        q = q * (scaling * q.shape[-1] ** 0.5)
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in parameters:
            options["enable_gqa"] = True
        else:
            k, v = (tensor.repeat_interleave(q.shape[1] // tensor.shape[1], dim=1) for tensor in (k, v))
    return varlen_attn(  # type: ignore[no-any-return,return-value]
        q, k, v, call.cu_seqlens_q, call.cu_seqlens_k, call.max_seqlen_q, call.max_seqlen_k, **options
    )


def _run_grouped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    scaling: float | None,
    dropout: float,
    window: int | None,
) -> Tensor:
    """Run one SDPA call for each padded group of spans; return [1, Q, H, D]."""
    gqa = query.shape[1] != key.shape[1]
    # [Q, heads * D]: the heads of a token are contiguous
    q_row, *kv_rows = (tensor[0].transpose(0, 1).flatten(1) for tensor in (query, key, value))
    index = None if len(q_row) == len(kv_rows[0]) else _index_positions(segments.query_positions, len(kv_rows[0]))
    results = []
    for group in segments.get_groups(window):
        queries = group.queries if index is None else index[group.queries]
        q = _gather_heads(q_row, queries, query.shape[-1])
        k, v = (_gather_heads(row, group.keys, query.shape[-1]) for row in kv_rows)
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=group.mask,
            is_causal=group.mask is None,
            scale=scaling,
            dropout_p=dropout,
            enable_gqa=gqa,
        )
        results.append(out.transpose(1, 2).flatten(0, 1).flatten(1))  # [G * L, H * D]
    return torch.cat(results).index_select(0, segments.group_output_index).unflatten(1, (query.shape[1], -1))[None]


def _gather_heads(row: Tensor, positions: Tensor, width: int) -> Tensor:
    """Gather the row's positions [G, L] as [G, heads, L, D]."""
    return row.index_select(0, positions.flatten()).view(*positions.shape, -1, width).transpose(1, 2)


def _make_attention_mask(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """Return no dense mask for a row with its own segments; else transformers' SDPA mask.

    transformers notices that position ids restart and would build a [T, T] block mask. `flat_attention_forward` needs
    none.
    """
    q_length = kwargs.get("q_length", args[1] if len(args) > 1 else None)
    kv_length = kwargs.get("kv_length", args[2] if len(args) > 2 else None)
    window = kwargs.get("local_size")
    covers_all = window is None or (isinstance(kv_length, int) and kv_length <= window)
    if attention_mask is None and covers_all and isinstance(q_length, int) and q_length > 1 and q_length == kv_length:
        return None
    return sdpa_mask(*args, attention_mask=attention_mask, **kwargs)


AttentionInterface.register(FLAT_ATTENTION, flat_attention_forward)
AttentionMaskInterface.register(FLAT_ATTENTION, _make_attention_mask)
