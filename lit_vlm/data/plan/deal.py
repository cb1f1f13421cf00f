"""Samples of optimizer steps are dealt into packs of equal work under two memory caps, many steps at once.

What is waited for is the slowest rank of each micro-step (FSDP, ZeRO-3) and of the whole step (DDP). So packs are made
as equal as can be; those that are not share a micro-step with packs of like work, and the ranks' sums are evened out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from functools import partial

import numpy as np

from lit_vlm.cost import Flops
from lit_vlm.data.index.columns import Index
from lit_vlm.data.plan.even_out import even_out
from lit_vlm.types import UserError, counted

ELEMENTS = 1 << 17  # of the largest matrix in work, steps x packs or steps x samples: about what a core's cache holds


@dataclass(frozen=True, slots=True)
class Caps:
    """The most that a pack may hold."""

    tokens: int
    tiles: int


@dataclass(slots=True)
class Hand:
    """Samples of several steps, a row per step; short rows are filled up with samples that weigh nothing."""

    places: np.ndarray  # [steps, samples] int64, in the draws of all steps
    samples: np.ndarray  # uint32, of the index
    there: np.ndarray  # bool; False: filled up
    work: np.ndarray  # float64, FLOPs
    tokens: np.ndarray  # int64
    tiles: np.ndarray

    def rows(self, rows: np.ndarray) -> Hand:
        return Hand(*(getattr(self, item.name)[rows] for item in fields(self)))


def deal_all(
    index: Index, flops: Flops, draws: np.ndarray, ends: np.ndarray, caps: Caps, world_size: int
) -> tuple[int, np.ndarray]:
    """Deal every step into `k * world_size` packs, with the smallest k that keeps the caps in all of them.

    Args:
        draws: [draws] uint32, the samples of all steps, one step after another.
        ends: [steps] int64, where each step ends in them.

    Returns:
        k, and [draws] the pack of each drawn sample: `micro * world_size + rank`.

    Raises:
        UserError: a sample alone is above a cap.
    """
    _require_room(index, caps)
    begins = np.concatenate([[0], ends[:-1]])
    tokens, tiles = (np.add.reduceat(c[draws], begins, dtype=np.int64) for c in (index.tokens, index.tiles))
    fullness = np.maximum(tokens / caps.tokens, tiles / caps.tiles) / world_size
    fullest_first = np.argsort(-fullness, kind="stable")  # where k is too small, it shows at once
    k = max(1, math.ceil(fullness.max()))
    pack = np.empty(len(draws), dtype=np.uint16)
    while True:
        num_packs = k * world_size
        if num_packs > np.iinfo(pack.dtype).max:
            pack = pack.astype(np.uint32)
        height = max(1, ELEMENTS // max(num_packs, int((ends - begins).max())))
        for start in range(0, len(ends), height):
            hand = hand_of(index, flops, draws, ends, fullest_first[start : start + height])
            dealt = deal(hand, caps, num_packs, world_size)
            if dealt is None:
                break
            pack[hand.places[hand.there]] = dealt[hand.there]
        else:
            return k, pack
        k += 1


def _require_room(index: Index, caps: Caps) -> None:
    for column, most, key in ((index.tokens, caps.tokens, "tokens"), (index.tiles, caps.tiles, "tiles")):
        above = np.flatnonzero(column > most)
        if len(above):
            raise UserError(
                f"{counted(len(above), 'sample has', 'samples have')} more than data.{key}_per_micro_batch={most} {key}, the largest "
                f"{column.max():,}. Raise data.{key}_per_micro_batch, or let data.on_overlong handle them."
            )


def hand_of(index: Index, flops: Flops, draws: np.ndarray, ends: np.ndarray, steps: np.ndarray) -> Hand:
    """The samples of some steps.

    Args:
        draws: the samples of all steps, one after another.
        ends: [steps] where each step ends in them.
    """
    begins = np.where(steps > 0, ends[steps - 1], 0)
    places = begins[:, None] + np.arange((ends[steps] - begins).max(initial=0))
    there = places < ends[steps][:, None]
    samples = draws[np.where(there, places, 0)]
    columns = (index.tokens[samples], index.squares[samples], index.tiles[samples], index.supervised[samples])
    tokens, squares, tiles, supervised = (np.where(there, column, 0).astype(np.int64) for column in columns)
    return Hand(places, samples, there, flops.of(tokens, squares, tiles, supervised), tokens, tiles)


def deal(hand: Hand, caps: Caps, num_packs: int, world_size: int) -> np.ndarray | None:
    """[steps, samples] int32, each sample's pack, `micro * world_size + rank`; None when a step breaks a cap.

    Longest work first onto the pack with least. Where that meets a cap: the same by what is scarce, then the fullest
    pack that has room, then what is scarce is spread evenly.
    """
    scarce = np.maximum(hand.tokens / caps.tokens, hand.tiles / caps.tiles)
    pack, dealt = _place(hand, hand.work, caps, num_packs)
    for way in (_place, partial(_place, fullest=True), _spread):
        left = np.flatnonzero(~dealt)
        if len(left):
            pack[left], dealt[left] = way(hand.rows(left), scarce[left], caps, num_packs)
    if not dealt.all():
        return None
    even_out(hand, pack, caps, num_packs)
    return _seat(hand, pack, num_packs, world_size)


def _spread(hand: Hand, weight: np.ndarray, caps: Caps, num_packs: int) -> tuple[np.ndarray, np.ndarray]:
    """As `_place`, by exchanges without regard to the caps: finds room in packs that must all be full to the brim."""
    hand, no_caps = replace(hand, work=weight), Caps(1 << 62, 1 << 62)
    pack, _ = _place(hand, weight, no_caps, num_packs)
    even_out(hand, pack, no_caps, num_packs, good=1.0)
    tokens, tiles = (loads(pack, column, num_packs).max(axis=1) for column in (hand.tokens, hand.tiles))
    return pack, (tokens <= caps.tokens) & (tiles <= caps.tiles)


def _place(
    hand: Hand, weight: np.ndarray, caps: Caps, num_packs: int, *, fullest: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Heaviest first, ties by sample number, each into the lightest pack (or the fullest) that has room for it.

    Returns:
        [steps, samples] int32 packs, and [steps] bool: whether all found room.
    """
    num_steps, num_samples = hand.samples.shape
    order = np.lexsort((hand.samples, -weight), axis=-1)
    columns = [np.take_along_axis(column, order, 1).T.copy() for column in (weight, hand.tokens, hand.tiles)]
    load = np.zeros((num_steps, num_packs))
    tokens, tiles = np.full(load.shape, caps.tokens), np.full(load.shape, caps.tiles)
    dealt, rows = np.ones(num_steps, dtype=bool), np.arange(num_steps)
    chosen = np.empty((num_samples, num_steps), dtype=np.int32)
    for number, (more, more_tokens, more_tiles) in enumerate(zip(*columns, strict=True)):
        choice = load.argmin(1)
        tight = (tokens[rows, choice] < more_tokens) | (tiles[rows, choice] < more_tiles)
        if fullest:
            tight[:] = True
        if tight.any():
            room = (tokens[tight] >= more_tokens[tight, None]) & (tiles[tight] >= more_tiles[tight, None])
            score = -load[tight] if fullest else load[tight]
            choice[tight] = np.where(room, score, np.inf).argmin(1)
            dealt[tight] &= room.any(1)
        load[rows, choice] += more
        tokens[rows, choice] -= more_tokens
        tiles[rows, choice] -= more_tiles
        chosen[number] = choice
    pack = np.empty((num_steps, num_samples), dtype=np.int32)
    np.put_along_axis(pack, order, chosen.T, 1)
    return pack, dealt


def _seat(hand: Hand, pack: np.ndarray, num_packs: int, world_size: int) -> np.ndarray:
    """Number the packs anew: like work shares a micro-step, in which the rank with most so far gets the least."""
    load = loads(pack, hand.work, num_packs)
    order = np.argsort(-load, axis=1, kind="stable").reshape(len(load), -1, world_size)
    seat = np.empty(load.shape, dtype=np.int32)
    totals = np.zeros((len(load), world_size))
    for micro in range(num_packs // world_size):
        ranks = np.argsort(totals, axis=1, kind="stable")
        np.put_along_axis(seat, order[:, micro], (micro * world_size + ranks).astype(np.int32), 1)
        more = np.take_along_axis(load, order[:, micro], 1)
        np.put_along_axis(totals, ranks, np.take_along_axis(totals, ranks, 1) + more, 1)
    return np.take_along_axis(seat, pack, 1)


def loads(pack: np.ndarray, weight: np.ndarray, num_packs: int) -> np.ndarray:
    """[steps, packs] float64, the sum of `weight` in each pack."""
    places = pack + np.arange(len(pack))[:, None] * num_packs
    return np.bincount(places.ravel(), weight.ravel(), len(pack) * num_packs).reshape(len(pack), num_packs)
