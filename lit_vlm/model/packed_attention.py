"""Segments of a flat packed row: boundaries, attention spans, and the arguments of attention kernels."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lit_vlm.types import UserError

# mean tokens of a segment from which a kernel call of its own is cheaper than a place in a padded group
MIN_UNPADDED_TOKENS = 64

# Shapes: T tokens in the row, B segments, Q queries (T, or those that a layer needs), R scored positions, G spans of one
# group, L the maximum number of queries in it, M the maximum number of keys.


@dataclass(frozen=True)
class AttentionSpan:
    """Attention of one segment: its last queries, over all keys that they may attend to."""

    start: int  # first query, position in the row
    stop: int
    keys: tuple[tuple[int, int], ...]  # ranges in the row: of the prefix, if any, and its own

    @property
    def num_queries(self) -> int:
        return self.stop - self.start

    @property
    def num_keys(self) -> int:
        return sum(stop - start for start, stop in self.keys)


@dataclass(frozen=True)
class PaddedGroup:
    """Padded batch of spans of similar length, for one SDPA call. Padding repeats the last position of a span."""

    queries: Tensor  # [G, L] positions in the row
    keys: Tensor  # [G, M]
    mask: Tensor | None  # [G, 1, L, M] bool; None: plain causal, as many keys as queries


@dataclass(frozen=True)
class VarlenCall:
    """Arguments of one variable-length kernel call, for spans without common keys. None: the whole row, in order."""

    queries: Tensor | None  # positions in the row
    keys: Tensor | None
    cu_seqlens_q: Tensor  # [spans + 1] int32
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int


class Segments:
    """Boundaries of the packed segments of a flat row, and the prefix that each of them continues.

    A token attends to the tokens of its segment up to itself and, when the segment has a prefix, to the whole prefix.
    The kernels share one rule for this: query i of n attends to all keys of the span except the last n - 1 - i
    (bottom-right causal).

    Args:
        lengths: tokens of each of the B segments.
        device: of the row.
        prefixes: index of the segment that each of the B segments continues, or -1. None: no segment has a prefix.
        query_lengths: the last `query_lengths[b]` positions of segment b are queries. None: all positions are.

    Attributes:
        last_layer: segments with the queries that the model's last layer needs, and [R] the positions whose results are
            read; None: all positions.
    """

    last_layer: tuple[Segments, Tensor] | None = None

    def __init__(
        self,
        lengths: list[int],
        device: torch.device,
        prefixes: list[int] | None = None,
        query_lengths: list[int] | None = None,
    ) -> None:
        self.lengths, self.device = lengths, device
        self._prefixes, self._query_lengths = prefixes or [-1] * len(lengths), query_lengths or lengths
        self._groups_by_window: dict[int | None, list[PaddedGroup]] = {}

    @cached_property
    def spans(self) -> list[AttentionSpan]:
        """Attention spans, one for each segment that has queries."""
        starts = torch.tensor([0, *self.lengths]).cumsum(0).tolist()
        ranges = list(zip(starts, starts[1:], strict=False))
        return [
            AttentionSpan(stop - tail, stop, ((start, stop),) if prefix < 0 else (ranges[prefix], (start, stop)))
            for (start, stop), prefix, tail in zip(ranges, self._prefixes, self._query_lengths, strict=True)
            if tail
        ]

    @cached_property
    def query_positions(self) -> Tensor:
        """[Q] positions of the queries, in the order of the row."""
        return _concat_ranges([(span.start, span.stop) for span in self.spans], self.device)

    @property
    def max_num_keys(self) -> int:
        """Maximum number of keys that a query may attend to."""
        return max(span.num_keys for span in self.spans)

    @cached_property
    def is_cheaper_unpadded(self) -> bool:
        """True when a kernel call for each segment costs less than padding and gathering: long segments, all positions."""
        is_whole_row = self._query_lengths == self.lengths and max(self._prefixes) < 0
        return is_whole_row and sum(self.lengths) >= MIN_UNPADDED_TOKENS * len(self.lengths)

    def get_groups(self, window: int | None = None) -> list[PaddedGroup]:
        """Group spans of similar length, padded to the longest; `window` is the sliding window in tokens."""
        if window not in self._groups_by_window:
            spans = self.spans
            order = sorted(range(len(spans)), key=lambda i: (-spans[i].num_queries, -spans[i].num_keys))
            groups: list[PaddedGroup] = []
            members: list[AttentionSpan] = []
            for span in (spans[i] for i in order):
                if members and not _should_share_group(span, members[0]):
                    groups.append(self._make_group(members, window))
                    members = []
                members.append(span)
            groups.append(self._make_group(members, window))
            self._groups_by_window[window] = groups
        return self._groups_by_window[window]

    @cached_property
    def group_output_index(self) -> Tensor:
        """[Q] index of each query in the concatenated results of the groups."""
        index = torch.empty(sum(self.lengths), dtype=torch.int64)
        offset = 0
        for group in self.get_groups():
            flat = group.queries.flatten().cpu()
            # written in reverse order, so that the first copy of a repeated (padded) position wins
            index[flat.flip(0)] = torch.arange(offset, offset + len(flat)).flip(0)
            offset += len(flat)
        return index.to(self.device)[self.query_positions]

    @cached_property
    def varlen_calls(self) -> list[VarlenCall]:
        """Kernel calls: spans without a prefix, then the first continuation of each prefix, then the second ones.

        No call contains a key twice, so that the gradients of the keys are summed in one order.
        """
        rounds: list[list[AttentionSpan]] = []
        num_continuations: dict[tuple[int, int], int] = {}
        for span in self.spans:
            number = 0
            if len(span.keys) > 1:
                number = num_continuations[span.keys[0]] = num_continuations.get(span.keys[0], 0) + 1
            while len(rounds) <= number:
                rounds.append([])
            rounds[number].append(span)
        return [self._make_varlen_call(spans) for spans in rounds if spans]

    @cached_property
    def varlen_output_index(self) -> Tensor | None:
        """[Q] index of each query in the concatenated results of the calls; None: they are in order already."""
        if len(self.varlen_calls) == 1:
            return None
        positions = torch.cat([call.queries for call in self.varlen_calls if call.queries is not None])
        return positions.argsort()

    def _make_group(self, members: list[AttentionSpan], window: int | None) -> PaddedGroup:
        queries = [torch.arange(span.start, span.stop) for span in members]
        keys = [torch.cat([torch.arange(*part) for part in span.keys]) for span in members]
        square = all(span.num_queries == span.num_keys for span in members)  # no real query attends to padding
        mask = None if square and not window else _make_causal_mask(members, window).to(self.device)
        return PaddedGroup(_pad_rows(queries).to(self.device), _pad_rows(keys).to(self.device), mask)

    def _make_varlen_call(self, spans: list[AttentionSpan]) -> VarlenCall:
        queries = _concat_ranges([(span.start, span.stop) for span in spans], self.device)
        keys = _concat_ranges([part for span in spans for part in span.keys], self.device)
        total = sum(self.lengths)
        is_whole_row = len(spans) == len(self.lengths)  # then only positions that no span needs are left out
        return VarlenCall(
            queries=None if is_whole_row and len(queries) == total else queries,
            keys=None if is_whole_row and len(keys) == total else keys,
            cu_seqlens_q=self._compute_cu_seqlens([span.num_queries for span in spans]),
            cu_seqlens_k=self._compute_cu_seqlens([span.num_keys for span in spans]),
            max_seqlen_q=max(span.num_queries for span in spans),
            max_seqlen_k=max(span.num_keys for span in spans),
        )

    def _compute_cu_seqlens(self, lengths: list[int]) -> Tensor:
        """Compute cumulative sequence lengths, [spans + 1] int32."""
        return torch.tensor([0, *lengths]).cumsum(0).to(self.device, torch.int32, non_blocking=True)


def _should_share_group(span: AttentionSpan, longest: AttentionSpan) -> bool:
    """Return True when padding `span` to the longest is cheaper than a kernel call of its own."""
    queries, keys = span.num_queries * 4 >= longest.num_queries * 3, span.num_keys * 4 >= longest.num_keys * 3
    square = (span.num_queries == span.num_keys) == (longest.num_queries == longest.num_keys)
    return queries and keys and square


def _concat_ranges(ranges: list[tuple[int, int]], device: torch.device) -> Tensor:
    """Concatenate the positions of all ranges (start, stop) into one tensor."""
    return torch.cat([torch.arange(*part) for part in ranges]).to(device)


def _pad_rows(rows: list[Tensor]) -> Tensor:
    """Pad rows to [G, longest] by repeating the last number of each."""
    longest = max(map(len, rows))
    return torch.stack([torch.cat([row, row[-1:].expand(longest - len(row))]) for row in rows])


def _make_causal_mask(members: list[AttentionSpan], window: int | None) -> Tensor:
    """Make the [G, 1, L, M] bool mask: bottom-right causal, and at most `window` keys back, the own one included."""
    queries, keys = max(span.num_queries for span in members), max(span.num_keys for span in members)
    offset = torch.tensor([span.num_keys - span.num_queries for span in members])[:, None, None, None]
    distance = offset + torch.arange(queries)[:, None] - torch.arange(keys)
    return (distance >= 0) & (distance < window) if window else distance >= 0


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
        query: [1, H, Q, D]; `key` [1, K, T, D]; `value` the same, or narrower.
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
    if kwargs.get("s_aux") is not None or kwargs.get("softcap") is not None:
        raise UserError(
            "The packed attention computes no attention sinks and no soft caps; this model's layers ask for them."
        )
    window = sliding_window if sliding_window and sliding_window < segments.max_num_keys else None
    width = value.shape[-1]
    if width < key.shape[-1]:  # latent attention: the kernels want one width of heads
        value = F.pad(value, (0, key.shape[-1] - width))
    is_half = query.dtype in (torch.bfloat16, torch.float16)  # types that FlashAttention supports
    if query.is_cuda and is_half and not dropout:
        return _run_varlen_attention(query, key, value, segments, scaling, window)[..., :width], None
    return _run_grouped_attention(query, key, value, segments, scaling, dropout, window)[..., :width], None


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
    """Run one SDPA call for each long segment, or for each padded group of spans; return [1, Q, H, D]."""
    options: dict[str, Any] = {"scale": scaling, "dropout_p": dropout, "enable_gqa": query.shape[1] != key.shape[1]}
    if segments.is_cheaper_unpadded and not window and query.device.type == "cpu":
        # views of one split: its backward pass is one concatenation, not a sum of tensors as long as the row
        parts = (tensor.split(segments.lengths, dim=2) for tensor in (query, key, value))
        outs = [
            F.scaled_dot_product_attention(q, k, v, is_causal=True, **options) for q, k, v in zip(*parts, strict=True)
        ]
        return torch.cat([out.transpose(1, 2) for out in outs], dim=1)
    # [Q, heads * D]: the heads of a token are contiguous
    q_row, *kv_rows = (tensor[0].transpose(0, 1).flatten(1) for tensor in (query, key, value))
    index = None if len(q_row) == len(kv_rows[0]) else _index_positions(segments.query_positions, len(kv_rows[0]))
    results = []
    for group in segments.get_groups(window):
        queries = group.queries if index is None else index[group.queries]
        q = _gather_heads(q_row, queries, query.shape[-1])
        k, v = (_gather_heads(row, group.keys, query.shape[-1]) for row in kv_rows)
        is_causal = group.mask is None
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=group.mask, is_causal=is_causal, **options)
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
