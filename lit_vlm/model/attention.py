"""Attention over a flat row of segments, registered with transformers under the name `flat`.

A decoder layer of transformers calls it like any other implementation. When the keyword `segments` comes with the call,
no token sees another segment; without it (generation, plain use) it is transformers' own SDPA, masks included.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "flat"

# Shapes: T tokens in the row, B segments, H heads, K key-value heads, D head width, G segments of one group, L its
# longest.


@dataclass
class Segments:
    """Where the segments of a flat row begin and end.

    Args:
        cu_seqlens: [B + 1] int32, on the row's device.
        lengths: the same on the host.
    """

    cu_seqlens: Tensor
    lengths: list[int]

    @property
    def longest(self) -> int:
        return max(self.lengths)

    @cached_property
    def groups(self) -> list[Tensor]:
        """Per group [G, L] positions in the row; behind a segment's end its last position is repeated.

        Segments of like length share a kernel call. Under a causal mask the repeated positions at the end are seen by
        no real token, so their results are merely dropped: the group is exact without any mask.
        """
        order = sorted(range(len(self.lengths)), key=lambda i: -self.lengths[i])
        starts = torch.tensor([0, *self.lengths]).cumsum(0)
        groups: list[Tensor] = []
        members: list[int] = []
        for i in order:
            if members and self.lengths[i] * 4 < self.lengths[members[0]] * 3:
                groups.append(self._positions(members, starts))
                members = []
            members.append(i)
        groups.append(self._positions(members, starts))
        return groups

    @cached_property
    def back(self) -> Tensor:
        """[T]: where each position of the row stands in the groups' results, laid end to end."""
        place = torch.empty(sum(self.lengths), dtype=torch.int64)
        offset = 0
        for group in self.groups:
            flat = group.flatten().cpu()
            # written backwards, so that the first of a repeated position wins
            place[flat.flip(0)] = torch.arange(offset, offset + len(flat)).flip(0)
            offset += len(flat)
        return place.to(self.cu_seqlens.device)

    def _positions(self, members: list[int], starts: Tensor) -> Tensor:
        lengths = torch.tensor([self.lengths[i] for i in members])
        within = torch.minimum(torch.arange(int(lengths.max()))[None], lengths[:, None] - 1)
        return (starts[members][:, None] + within).to(self.cu_seqlens.device)


def flat_attention(
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
    """Causal attention inside each segment.

    Args:
        query: [1, H, T, D]; `key` and `value` [1, K, T, D].

    Returns:
        [1, T, H, D] and no weights.
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
    if torch.is_autocast_enabled(
        device
    ):  # rotary embeddings leave queries and keys in float32; autocast casts for SDPA only
        dtype = torch.get_autocast_dtype(device)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    window = sliding_window if sliding_window and sliding_window < segments.longest else None
    computes = query.dtype in (torch.bfloat16, torch.float16)  # what FlashAttention knows
    if query.is_cuda and computes and not dropout:
        return _varlen(query, key, value, segments, scaling, window), None
    return _grouped(query, key, value, segments, scaling, dropout, window), None


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling: float | None, window: int | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn  # FlashAttention inside; torch >= 2.13 has this signature

    q, k, v = (tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value))
    cu, longest = segments.cu_seqlens, segments.longest
    left = -1 if window is None else window - 1
    out = varlen_attn(
        q, k, v, cu, cu, longest, longest, scale=scaling, window_size=(left, 0), enable_gqa=q.shape[1] != k.shape[1]
    )
    return out[None]


def _grouped(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    scaling: float | None,
    dropout: float,
    window: int | None,
) -> Tensor:
    gqa = query.shape[1] != key.shape[1]
    # [T, heads * D]: a token's heads lie together
    rows = [tensor[0].transpose(0, 1).flatten(1) for tensor in (query, key, value)]
    results = []
    for group in segments.groups:
        shape = (*group.shape, -1, query.shape[-1])
        q, k, v = (row.index_select(0, group.flatten()).view(shape).transpose(1, 2) for row in rows)  # [G, heads, L, D]
        mask = _band(group.shape[1], window, q.device) if window else None
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, dropout_p=dropout, enable_gqa=gqa
        )
        results.append(out.transpose(1, 2).flatten(0, 1).flatten(1))  # [G * L, H * D]
    return torch.cat(results).index_select(0, segments.back).unflatten(1, (query.shape[1], -1))[None]


def _band(length: int, window: int, device: torch.device) -> Tensor:
    """[L, L] bool: causal, and no further back than `window` tokens, the own one included."""
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None]
    return (distance >= 0) & (distance < window)


def _mask(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """No dense mask for a row that brings its own segments; transformers' SDPA mask everywhere else.

    transformers notices restarting positions and would build a [T, T] block mask; `flat_attention` needs none.
    """
    q_length = kwargs.get("q_length", args[1] if len(args) > 1 else None)
    kv_length = kwargs.get("kv_length", args[2] if len(args) > 2 else None)
    window = kwargs.get("local_size")
    unbounded = window is None or (isinstance(kv_length, int) and kv_length <= window)
    if attention_mask is None and unbounded and isinstance(q_length, int) and q_length > 1 and q_length == kv_length:
        return None
    return sdpa_mask(*args, attention_mask=attention_mask, **kwargs)


AttentionInterface.register(NAME, flat_attention)
AttentionMaskInterface.register(NAME, _mask)
