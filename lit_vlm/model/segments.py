"""Segments of a flat packed row: boundaries, attention spans, and the arguments of attention kernels."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

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
