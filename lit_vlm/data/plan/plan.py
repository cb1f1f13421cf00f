"""The plan: what each rank reads at each optimizer step, a pure function of (index, mixture, seed, step, world size).

Every step draws its samples from the mixture, the same ones whatever the world size, and deals them into
`k * world_size` packs of equal FLOPs, each under a token and a tile cap. `k` is one number for the whole stage: the
smallest with which every step keeps the caps. It becomes Lightning's `accumulate_grad_batches`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from lit_vlm.cost import Flops
from lit_vlm.data.index.columns import Index
from lit_vlm.data.plan.deal import Caps, Hand, deal_all, hand_of, loads
from lit_vlm.data.plan.ledger import Ledger
from lit_vlm.data.plan.mixture import Mixture
from lit_vlm.data.plan.steps import Length, draw_steps
from lit_vlm.data.plan.store import Arrays, kept, key_of
from lit_vlm.types import counted

PLAN_VERSION = 2  # raise it when the same settings draw or deal differently
BLOCK = 1 << 16  # held-out samples that are dealt together, and entries of a matrix in work

Pack = tuple[int, ...]  # samples of the index that share one forward pass


@dataclass(frozen=True, slots=True)
class Step:
    """One optimizer step. `packs[micro * world_size + rank]`; an empty pack is a blank one."""

    packs: tuple[Pack, ...]
    num_supervised: int  # over all ranks and micro-batches: the divisor of the loss; 0 when all samples were left out
    num_samples: int
    num_tiles: int
    num_chosen: int  # preference: supervised tokens of the chosen answers


class Plan:
    """All optimizer steps of a stage, by number.

    Args:
        index: what is trained on.
        mixture: of that index; None: each source by its size.
        flops: cost model that makes packs equal.
        most_tokens: cap of a pack; a preference pair counts with both its answers.
        most_tiles: cap of a pack.
        global_batch_size: samples of a step.
        global_batch_tokens: instead of them: a step ends with the sample that brings it to so many tokens.
        max_steps: optimizer steps; None: as many as `max_epochs` passes over the mixture fill.
        ledger: samples that turned bad while training. They are left out of the steps that drew them, which have fewer
            samples then; every other sample stays where it was. A step whose samples are all gone is blank.
        store: folder where the plan is kept; None: in memory. With another world size or other caps it is only dealt
            anew.
        digest: of the index; None: worked out, which reads all of it.

    Raises:
        UserError: a sample alone is above a cap, or the mixture cannot be had.
    """

    def __init__(
        self,
        index: Index,
        mixture: Mixture | None = None,
        *,
        flops: Flops,
        most_tokens: int,
        most_tiles: int,
        global_batch_size: int | None = None,
        global_batch_tokens: int | None = None,
        seed: int = 0,
        max_steps: int | None = None,
        max_epochs: float = 1.0,
        world_size: int = 1,
        ledger: Ledger | None = None,
        store: Path | None = None,
        digest: str | None = None,
    ) -> None:
        self.index, self.mixture, self.flops, self.world_size = index, mixture or Mixture(index), flops, world_size
        self.global_batch_size = None if global_batch_tokens else global_batch_size
        self.global_batch_tokens = global_batch_tokens
        self.most_tokens, self.most_tiles = most_tokens, most_tiles
        length = Length(self.global_batch_size, global_batch_tokens, max_steps, max_epochs)
        facts: dict[str, Any] = {"version": PLAN_VERSION, "length": asdict(length), "seed": seed}
        if store is not None:
            facts |= {"settings": asdict(self.mixture.settings), "index": digest or index.digest()}
        self._steps = kept(store, "steps", key_of(facts), lambda: draw_steps(index, self.mixture, length, seed))
        facts |= {"caps": [most_tokens, most_tiles], "flops": asdict(flops), "world_size": world_size}
        dealt = kept(store, "packs", key_of(facts), self._deal)
        self._pack, self.k = dealt["pack"], int(dealt["k"][0])
        self.num_steps = len(self._steps["ends"])
        self.left_out = np.empty(0, dtype=np.int64) if ledger is None else ledger.samples(index)
        self._last: tuple[int, Step] | None = None  # micro-steps of one step follow each other

    def samples(self, step: int) -> np.ndarray:
        """The samples of an optimizer step as they are drawn, whatever the world size, without those left out."""
        drawn, _ = self._drawn(step)
        return drawn[~np.isin(drawn, self.left_out)]

    def step(self, step: int) -> Step:
        if self._last is None or self._last[0] != step:
            self._last = step, self._step(step)
        return self._last[1]

    def draws(self) -> np.ndarray:
        """All samples that are drawn, step after step, for `Mixture.rows`; the ledger's are among them."""
        return self._steps["samples"]

    @property
    def batch(self) -> str:
        """What a step holds, in words."""
        if self.global_batch_size is None:
            return counted(self.global_batch_tokens, "token")
        return counted(self.global_batch_size, "sample")

    @property
    def ends(self) -> np.ndarray:
        """[steps]: step i's draws are `draws()[ends[i - 1]:ends[i]]`, from 0 on for the first."""
        return self._steps["ends"]

    def balance(self) -> dict[str, Any]:
        """How equal the packs are, and how large.

        `micro_steps` is the share of the time that ranks compute when each micro-step waits for its slowest rank (FSDP,
        ZeRO-3), `ranks` when only the step's end waits (DDP): mean over largest FLOPs, the mean over the steps and the
        worst step. `tokens` and `tiles` are those of a pack.
        """
        num_packs, micro, ranks, sizes = self.k * self.world_size, [], [], []
        height = max(1, BLOCK // max(num_packs, len(self._pack) // self.num_steps))
        for start in range(0, self.num_steps, height):
            hand, pack = self._hand(np.arange(start, min(start + height, self.num_steps)))
            work = loads(pack, hand.work, num_packs).reshape(len(pack), self.k, self.world_size)
            mean = work.sum(axis=(1, 2)) / self.world_size
            micro.append(mean / work.max(axis=2).sum(axis=1))
            ranks.append(mean / work.sum(axis=1).max(axis=1))
            sizes.append(np.stack([loads(pack, c, num_packs).ravel() for c in (hand.there, hand.tokens, hand.tiles)]))
        samples, tokens, tiles = np.concatenate(sizes, axis=1, dtype=np.float32)
        return {
            "k": self.k,
            "world_size": self.world_size,
            "samples_per_rank_and_step": len(self._pack) / self.num_steps / self.world_size,
            "micro_steps": _of_steps(np.concatenate(micro)),
            "ranks": _of_steps(np.concatenate(ranks)),
            "tokens": _of_packs(tokens, self.most_tokens),
            "tiles": _of_packs(tiles, self.most_tiles),
            "blank_packs": int((samples == 0).sum()),
            "num_packs": len(samples),
            "padding": 0.0,  # a flat batch has none
        }

    def _step(self, step: int) -> Step:
        drawn, pack = self._drawn(step)
        gone = np.isin(drawn, self.left_out)
        lost, drawn, pack = drawn[gone], drawn[~gone], pack[~gone]
        order = np.argsort(pack, kind="stable")
        samples = drawn[order].tolist()
        bounds = np.searchsorted(pack[order], np.arange(self.k * self.world_size + 1)).tolist()
        totals = {
            name: int(self._steps[name][step]) - (int(getattr(self.index, name)[lost].sum()) if len(lost) else 0)
            for name in ("supervised", "tiles", "chosen")
        }
        return Step(
            packs=tuple(tuple(samples[begin:end]) for begin, end in pairwise(bounds)),
            num_supervised=totals["supervised"],
            num_samples=len(samples),
            num_tiles=totals["tiles"],
            num_chosen=totals["chosen"],
        )

    def _drawn(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """A step's samples and their packs."""
        if not 0 <= step < self.num_steps:
            raise IndexError(f"step {step} of {self.num_steps}")
        ends = self._steps["ends"]
        part = slice(int(ends[step - 1]) if step else 0, int(ends[step]))
        return self._steps["samples"][part], self._pack[part]

    def _deal(self) -> Arrays:
        caps = Caps(self.most_tokens, self.most_tiles)
        samples, ends = self._steps["samples"], self._steps["ends"]
        k, pack = deal_all(self.index, self.flops, samples, ends, caps, self.world_size)
        return {"pack": pack, "k": np.array([k])}

    def _hand(self, steps: np.ndarray) -> tuple[Hand, np.ndarray]:
        hand = hand_of(self.index, self.flops, self._steps["samples"], self._steps["ends"], steps)
        return hand, self._pack[np.where(hand.there, hand.places, 0)].astype(np.int64)


def validation_packs(index: Index, *, most_tokens: int, most_tiles: int, world_size: int, flops: Flops) -> list[Pack]:
    """All samples once, in the fewest packs of equal work that keep the caps, as many for each rank; empty ones are blank.

    Pack `i` belongs to rank `i % world_size`. More than 65,536 samples are dealt in parts.
    """
    packs: list[Pack] = []
    for start in range(0, len(index), BLOCK):
        samples = np.arange(start, min(start + BLOCK, len(index)))
        caps, ends = Caps(most_tokens, most_tiles), np.array([len(samples)])
        k, pack = deal_all(index, flops, samples, ends, caps, world_size)
        order = np.argsort(pack, kind="stable")
        bounds = np.searchsorted(pack[order], np.arange(k * world_size + 1))
        packs += [tuple(samples[order[begin:end]].tolist()) for begin, end in pairwise(bounds)]
    return packs


def _of_steps(values: np.ndarray) -> dict[str, float]:
    return {"mean": float(values.mean()), "min": float(values.min())}


def _of_packs(sizes: np.ndarray, cap: int) -> dict[str, float]:
    low, middle, high = (float(value) for value in np.percentile(sizes, (5, 50, 95)))
    mean, largest = float(sizes.mean()), float(sizes.max())
    return {"mean": mean, "p5": low, "median": middle, "p95": high, "largest": largest, "cap": cap}
