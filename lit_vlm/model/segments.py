"""Where the segments of a flat row begin and end, what each token sees, and how kernels are told."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

# Shapes: T tokens in the row, B segments, Q queries (T, or those that a layer asks for), R rows that are scored, G members
# of one group, L its most queries, M its most keys.


@dataclass(frozen=True)
class Span:
    """One segment's part of the attention: its last queries, over all that it sees."""

    start: int  # of its queries in the row
    stop: int
    keys: tuple[tuple[int, int], ...]  # where they lie in the row: its prefix's, if it has one, and its own

    @property
    def num_queries(self) -> int:
        return self.stop - self.start

    @property
    def num_keys(self) -> int:
        return sum(stop - start for start, stop in self.keys)


@dataclass(frozen=True)
class Group:
    """Spans of like length, which share a kernel call. Behind a span's end its last position is repeated."""

    queries: Tensor  # [G, L] positions in the row
    keys: Tensor  # [G, M]
    mask: Tensor | None  # [G, 1, L, M] bool; None: query i sees the keys up to i, and there are as many


@dataclass(frozen=True)
class Call:
    """Spans whose keys do not overlap, as variable-length kernels take them. None: all of the row, as it lies."""

    queries: Tensor | None  # positions in the row
    keys: Tensor | None
    cu_queries: Tensor  # [spans + 1] int32
    cu_keys: Tensor
    most_queries: int
    most_keys: int


class Segments:
    """Where the segments of a flat row begin and end, and which of them continue another.

    A token sees its segment's tokens up to itself and, when the segment has a prefix, all of that one. The kernels agree
    on one rule for it: of a span's keys, query i of n sees all but the last n - 1 - i (bottom-right causal).

    Args:
        lengths: B tokens of each segment.
        device: of the row.
        prefixes: B; the segment that each one continues, or -1. None: none does.
        tails: B; the last so many positions of each segment are asked for. None: all.

    Attributes:
        last: what the model's last layer is asked for, and [R] the positions whose results anybody reads; None: all.
    """

    last: tuple[Segments, Tensor] | None = None

    def __init__(
        self,
        lengths: list[int],
        device: torch.device,
        prefixes: list[int] | None = None,
        tails: list[int] | None = None,
    ) -> None:
        self.lengths, self.device = lengths, device
        self._prefixes, self._tails = prefixes or [-1] * len(lengths), tails or lengths
        self._made: dict[int | None, list[Group]] = {}

    @cached_property
    def spans(self) -> list[Span]:
        starts = torch.tensor([0, *self.lengths]).cumsum(0).tolist()
        own = list(zip(starts, starts[1:], strict=False))
        return [
            Span(stop - tail, stop, ((start, stop),) if prefix < 0 else (own[prefix], (start, stop)))
            for (start, stop), prefix, tail in zip(own, self._prefixes, self._tails, strict=True)
            if tail
        ]

    @cached_property
    def asked(self) -> Tensor:
        """[Q]: the positions that are asked for, in the order of the row."""
        return _positions([(span.start, span.stop) for span in self.spans], self.device)

    @property
    def longest(self) -> int:
        """Most keys that a query may see."""
        return max(span.num_keys for span in self.spans)

    def groups(self, window: int | None = None) -> list[Group]:
        """Spans of like length together, padded to the longest; `window` as in `flat_attention`."""
        if window not in self._made:
            spans = self.spans
            order = sorted(range(len(spans)), key=lambda i: (-spans[i].num_queries, -spans[i].num_keys))
            made: list[Group] = []
            members: list[Span] = []
            for span in (spans[i] for i in order):
                if members and not _alike(span, members[0]):
                    made.append(self._group(members, window))
                    members = []
                members.append(span)
            made.append(self._group(members, window))
            self._made[window] = made
        return self._made[window]

    @cached_property
    def back(self) -> Tensor:
        """[Q]: where each position that is asked for stands in the groups' results, laid end to end."""
        place = torch.empty(sum(self.lengths), dtype=torch.int64)
        offset = 0
        for group in self.groups():
            flat = group.queries.flatten().cpu()
            # written backwards, so that the first of a repeated position wins
            place[flat.flip(0)] = torch.arange(offset, offset + len(flat)).flip(0)
            offset += len(flat)
        return place.to(self.device)[self.asked]

    @cached_property
    def calls(self) -> list[Call]:
        """First the spans without a prefix, then each prefix's first continuation, then the second ones: no call has a key
        twice, so that the keys' gradients are summed in one order."""
        rounds: list[list[Span]] = []
        seen: dict[tuple[int, int], int] = {}
        for span in self.spans:
            number = 0
            if len(span.keys) > 1:
                number = seen[span.keys[0]] = seen.get(span.keys[0], 0) + 1
            while len(rounds) <= number:
                rounds.append([])
            rounds[number].append(span)
        return [self._call(spans) for spans in rounds if spans]

    @cached_property
    def order(self) -> Tensor | None:
        """[Q]: where each position that is asked for stands in the calls' results, laid end to end; None: as asked."""
        if len(self.calls) == 1:
            return None
        laid = torch.cat([call.queries for call in self.calls if call.queries is not None])
        return laid.argsort()

    def _group(self, members: list[Span], window: int | None) -> Group:
        queries = [torch.arange(span.start, span.stop) for span in members]
        keys = [torch.cat([torch.arange(*part) for part in span.keys]) for span in members]
        square = all(span.num_queries == span.num_keys for span in members)  # padding behind is seen by no real query
        mask = None if square and not window else _mask_of(members, window).to(self.device)
        return Group(_padded(queries).to(self.device), _padded(keys).to(self.device), mask)

    def _call(self, spans: list[Span]) -> Call:
        queries = _positions([(span.start, span.stop) for span in spans], self.device)
        keys = _positions([part for span in spans for part in span.keys], self.device)
        whole = sum(self.lengths)
        one = len(spans) == len(self.lengths)  # then nothing is left out but what no span asks for
        return Call(
            queries=None if one and len(queries) == whole else queries,
            keys=None if one and len(keys) == whole else keys,
            cu_queries=self._ends([span.num_queries for span in spans]),
            cu_keys=self._ends([span.num_keys for span in spans]),
            most_queries=max(span.num_queries for span in spans),
            most_keys=max(span.num_keys for span in spans),
        )

    def _ends(self, lengths: list[int]) -> Tensor:
        return torch.tensor([0, *lengths]).cumsum(0).to(self.device, torch.int32, non_blocking=True)


def _alike(span: Span, longest: Span) -> bool:
    """Whether padding it to the longest is cheaper than a kernel call of its own."""
    queries, keys = span.num_queries * 4 >= longest.num_queries * 3, span.num_keys * 4 >= longest.num_keys * 3
    square = (span.num_queries == span.num_keys) == (longest.num_queries == longest.num_keys)
    return queries and keys and square


def _positions(parts: list[tuple[int, int]], device: torch.device) -> Tensor:
    return torch.cat([torch.arange(*part) for part in parts]).to(device)


def _padded(rows: list[Tensor]) -> Tensor:
    """[G, longest]: each row's last number repeated behind its end."""
    longest = max(map(len, rows))
    return torch.stack([torch.cat([row, row[-1:].expand(longest - len(row))]) for row in rows])


def _mask_of(members: list[Span], window: int | None) -> Tensor:
    """[G, 1, L, M] bool: bottom-right causal, and no further back than `window` tokens, the own one included."""
    queries, keys = max(span.num_queries for span in members), max(span.num_keys for span in members)
    before = torch.tensor([span.num_keys - span.num_queries for span in members])[:, None, None, None]
    distance = before + torch.arange(queries)[:, None] - torch.arange(keys)
    return (distance >= 0) & (distance < window) if window else distance >= 0
