"""The plan: what each rank reads at each optimizer step, a pure function of (index, mixture, seed, step, world size).

Every step draws `global_batch_size` samples by mixture weight, the same ones whatever the world size, and deals them
into `k * world_size` packs of equal FLOPs, each under a token and a tile cap. `k` is one number for the whole stage:
the smallest with which every step keeps the caps. It becomes Lightning's `accumulate_grad_batches`.
"""

from __future__ import annotations

import hashlib
import heapq
import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from lit_vlm.data.index import Index
from lit_vlm.types import UserError

Pack = tuple[int, ...]  # samples of the index that share one forward pass


@dataclass(frozen=True, slots=True)
class Step:
    """One optimizer step. `packs[micro * world_size + rank]`; an empty pack is a blank one."""

    packs: tuple[Pack, ...]
    num_supervised: int  # over all ranks and micro-batches: the divisor of the loss
    num_samples: int
    num_tiles: int
    num_chosen: int  # preference: supervised tokens of the chosen answers


class Plan:
    """All optimizer steps of a stage.

    Args:
        weights: share of the samples drawn from each source, relative to each other; None: by their sizes.
        max_steps: optimizer steps; None: `max_epochs` passes over as many samples as the sources hold.

    Raises:
        UserError: no micro-batch count keeps the caps.
    """

    def __init__(
        self,
        index: Index,
        *,
        global_batch_size: int,
        most_tokens: int,
        most_tiles: int,
        weights: list[float] | None = None,
        seed: int = 0,
        max_steps: int | None = None,
        max_epochs: float = 1.0,
        world_size: int = 1,
    ) -> None:
        self.index, self.global_batch_size, self.world_size = index, global_batch_size, world_size
        self.most_tokens, self.most_tiles = most_tokens, most_tiles
        self.num_steps = max_steps or max(1, math.ceil(max_epochs * len(index) / global_batch_size))
        self._draws = _draw(index, weights, seed, self.num_steps * global_batch_size)
        self.k = self._smallest_k()
        self.step = lru_cache(maxsize=64)(self._step)

    def samples(self, step: int) -> np.ndarray:
        """The samples of an optimizer step, whatever the world size."""
        return self._draws[step * self.global_batch_size : (step + 1) * self.global_batch_size]

    def _step(self, step: int) -> Step:
        samples = self.samples(step)
        packs = self._deal(samples, self.k)
        assert packs is not None  # _smallest_k dealt every step
        return Step(
            packs=packs,
            num_supervised=int(self.index.supervised[samples].sum()),
            num_samples=len(samples),
            num_tiles=int(self.index.tiles[samples].sum()),
            num_chosen=int(self.index.chosen[samples].sum()),
        )

    def _smallest_k(self) -> int:
        per_step = self._draws.reshape(self.num_steps, -1)
        tokens = self.index.tokens[per_step].sum(axis=1).max() / self.most_tokens
        tiles = self.index.tiles[per_step].sum(axis=1).max() / self.most_tiles
        k = max(1, math.ceil(max(tokens, tiles) / self.world_size))
        while k <= self.global_batch_size:
            if all(self._deal(self.samples(step), k) is not None for step in range(self.num_steps)):
                return k
            k += 1
        raise UserError(  # unreachable while the index refuses samples above the caps
            f"No number of micro-batches keeps {self.most_tokens} tokens and {self.most_tiles} tiles; raise data.tokens_per_micro_batch."
        )

    def _deal(self, samples: np.ndarray, k: int) -> tuple[Pack, ...] | None:
        """Longest work first, onto the pack with least; None when a cap cannot be kept."""
        count = k * self.world_size
        if count == 1:
            return (tuple(int(i) for i in samples),) if self._fits(samples) else None
        order = sorted(samples.tolist(), key=lambda i: (-self.index.flops[i], i))
        packs: list[list[int]] = [[] for _ in range(count)]
        room = [(self.most_tokens, self.most_tiles)] * count
        loads = [(0.0, number) for number in range(count)]
        for sample in order:
            tokens, tiles = int(self.index.tokens[sample]), int(self.index.tiles[sample])
            passed = []
            while loads:
                load, number = heapq.heappop(loads)
                if room[number][0] >= tokens and room[number][1] >= tiles:
                    packs[number].append(sample)
                    room[number] = (room[number][0] - tokens, room[number][1] - tiles)
                    passed.append((load + float(self.index.flops[sample]), number))
                    break
                passed.append((load, number))
            else:
                return None
            for item in passed:
                heapq.heappush(loads, item)
        return tuple(tuple(pack) for pack in packs)

    def _fits(self, samples: np.ndarray) -> bool:
        index = self.index
        return index.tokens[samples].sum() <= self.most_tokens and index.tiles[samples].sum() <= self.most_tiles


def validation_packs(index: Index, *, most_tokens: int, most_tiles: int, world_size: int) -> list[Pack]:
    """All samples once, in order, under the caps; padded with blank packs to the same number for every rank."""
    packs: list[Pack] = []
    pack: list[int] = []
    tokens = tiles = 0
    for sample in range(len(index)):
        more_tokens, more_tiles = int(index.tokens[sample]), int(index.tiles[sample])
        if pack and (tokens + more_tokens > most_tokens or tiles + more_tiles > most_tiles):
            packs.append(tuple(pack))
            pack, tokens, tiles = [], 0, 0
        pack.append(sample)
        tokens, tiles = tokens + more_tokens, tiles + more_tiles
    if pack:
        packs.append(tuple(pack))
    packs += [()] * (-len(packs) % world_size)
    return packs


def _draw(index: Index, weights: list[float] | None, seed: int, count: int) -> np.ndarray:
    """The first `count` samples of an endless mixture: sources interleaved by weight, each in a new order every pass.

    Source s is drawn at the times (j + 1/2) / weight_s; sorting all times interleaves them as evenly as can be, so
    every prefix holds each source's share to within one sample.
    """
    members = [index.of_source(number) for number in range(len(index.sources))]
    shares = np.array([float(len(m)) for m in members] if weights is None else weights, dtype=np.float64)
    shares[[len(m) == 0 for m in members]] = 0.0
    shares /= shares.sum()
    times, owners = [], []
    for number, share in enumerate(shares):
        if share > 0:
            drawn = np.arange(math.ceil(count * share) + 2)
            times.append((drawn + 0.5) / share)
            owners.append(np.full(len(drawn), number))
    order = np.argsort(np.concatenate(times), kind="stable")[:count]
    owner = np.concatenate(owners)[order]
    drawn = np.empty(count, dtype=np.int64)
    for number, share in enumerate(shares):
        if share > 0:
            places = np.flatnonzero(owner == number)
            drawn[places] = _passes(members[number], index.sources[number].name, seed, len(places))
    return drawn


def _passes(members: np.ndarray, name: str, seed: int, count: int) -> np.ndarray:
    """`count` samples of one source: pass after pass, each in an order of its own."""
    parts = []
    for number in range(math.ceil(count / len(members))):
        key = hashlib.sha256(f"{seed}\0{name}\0{number}".encode()).digest()[:8]
        parts.append(np.random.default_rng(int.from_bytes(key, "big")).permutation(members))
    return np.concatenate(parts)[:count] if parts else np.empty(0, dtype=np.int64)
