"""Optimizer steps over the sample sequence of a mixture, independent of the number of devices."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from lit_vlm.cost import Flops
from lit_vlm.data.index.sample_index import SampleIndex
from lit_vlm.data.packing.array_cache import Arrays, hash_facts, load_or_build
from lit_vlm.data.packing.mixture import Mixture
from lit_vlm.data.packing.pack import MicroBatchLimits, StepSamples, gather_steps, pack_steps, sum_per_pack
from lit_vlm.data.quarantine import Ledger
from lit_vlm.formatting import format_count
from lit_vlm.types import UserError

SUMMED_COLUMNS = ("supervised", "tiles", "chosen")  # columns of the index that are summed for each step


@dataclass(frozen=True, slots=True)
class StageLength:
    """Length of an optimizer step and of the training stage."""

    batch_size: int | None  # samples per optimizer step
    batch_tokens: int | None  # alternatively: a step ends with the sample that brings it to this number of tokens
    max_steps: int | None
    max_epochs: float  # if max_steps is None: minimum number of passes over the mixture

    def __post_init__(self) -> None:
        if self.batch_tokens is None and self.batch_size is None:
            raise UserError("Give data.global_batch_size or data.global_batch_tokens.")
        for name in ("batch_size", "batch_tokens", "max_steps", "max_epochs"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                key = f"data.global_{name}" if name.startswith("batch") else f"trainer.{name}"
                raise UserError(f"{key}={value} must be above 0.")


def sample_steps(index: SampleIndex, mixture: Mixture, length: StageLength, seed: int) -> dict[str, np.ndarray]:
    """Sample all optimizer steps of a stage from the mixture.

    Returns:
        `samples` [total samples] uint32, index rows, step after step; `ends` [steps] int64, end of each step in
        `samples`; and for each column of SUMMED_COLUMNS its sum in each step, [steps] int64.
    """
    samples, ends = (
        _sample_by_tokens(index, mixture, length, seed)
        if length.batch_tokens
        else _sample_by_count(mixture, length, seed)
    )
    begins = np.concatenate([[0], ends[:-1]])
    totals = {name: np.add.reduceat(getattr(index, name)[samples], begins, dtype=np.int64) for name in SUMMED_COLUMNS}
    return {"samples": samples, "ends": ends, **totals}


def _sample_by_count(mixture: Mixture, length: StageLength, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Sample steps with a fixed number of samples; return (samples, step ends)."""
    assert length.batch_size is not None
    num_steps = length.max_steps or max(1, math.ceil(_compute_num_samples(mixture, length) / length.batch_size - 1e-9))
    ends = np.arange(1, num_steps + 1, dtype=np.int64) * length.batch_size
    return mixture.sample(int(ends[-1]), seed), ends


def _sample_by_tokens(
    index: SampleIndex, mixture: Mixture, length: StageLength, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Sample steps with a minimum number of tokens; return (samples, step ends)."""
    assert length.batch_tokens is not None
    min_samples = 0 if length.max_steps else math.ceil(_compute_num_samples(mixture, length) - 1e-9)
    samples_per_step = math.ceil(length.batch_tokens / index.tokens.mean())
    count = (
        math.ceil(1.02 * (length.max_steps * samples_per_step if length.max_steps else min_samples))
        + 2 * samples_per_step
    )
    while True:  # the number of samples needed for these tokens is not known in advance
        samples = mixture.sample(count, seed)
        ends = _find_step_ends(
            np.cumsum(index.tokens[samples], dtype=np.int64), length.batch_tokens, length.max_steps, min_samples
        )
        if ends is not None:
            return samples[: ends[-1]], ends
        count += count // 2


def _find_step_ends(
    cumulative_tokens: np.ndarray, tokens_per_step: int, max_steps: int | None, min_samples: int
) -> np.ndarray | None:
    """Find the end of each step, [steps] int64; None if there are too few samples.

    Args:
        cumulative_tokens: [samples] int64, running sum of the tokens.
        tokens_per_step: a step ends with the sample that reaches this number of tokens.
        min_samples: number of samples that the steps must cover, if max_steps is None.
    """
    ends: list[int] = []
    reached = 0
    while len(ends) < max_steps if max_steps else (not ends or ends[-1] < min_samples):
        last = int(np.searchsorted(cumulative_tokens, reached + tokens_per_step))
        if last == len(cumulative_tokens):
            return None
        ends.append(last + 1)
        reached = int(cumulative_tokens[last])
    return np.array(ends, dtype=np.int64)


def _compute_num_samples(mixture: Mixture, length: StageLength) -> float:
    return length.max_epochs * mixture.epoch_length


PLAN_VERSION = 2  # increase it when the same settings give other samples of a step
PACKING_VERSION = 2  # increase it when the same samples of a step give other packs
BLOCK_SIZE = 1 << 16  # held-out samples that are packed together, and entries of an intermediate matrix

Pack = tuple[int, ...]  # index rows of the samples of one micro-batch


@dataclass(frozen=True, slots=True)
class PlanStep:
    """One optimizer step: `packs[micro_batch * world_size + rank]`; an empty pack becomes a dummy micro-batch."""

    packs: tuple[Pack, ...]
    num_supervised: int  # over all ranks and micro-batches: divisor of the loss; 0 if all samples are excluded
    num_samples: int
    num_tiles: int
    num_chosen: int  # preference pairs: supervised tokens of the chosen answers


class Plan:
    """Training plan: all optimizer steps of a stage, by number, packed into micro-batches.

    Args:
        index: training samples.
        mixture: mixture over that index; None: each source by its size.
        flops: cost model by which packs are balanced.
        max_tokens: token limit of a pack; a preference pair counts with both its answers.
        max_tiles: tile limit of a pack.
        global_batch_size: samples of a step.
        global_batch_tokens: alternatively: a step ends with the sample that brings it to this number of tokens.
        max_steps: optimizer steps; None: as many as `max_epochs` passes over the mixture require.
        ledger: samples that became corrupt during training. They are excluded from their steps, which then have fewer
            samples; all other samples keep their places. A step without remaining samples consists of dummy
            micro-batches.
        store: cache folder of the plan; None: in memory. If only the world size or the limits change, the cached steps
            are used and only the packing is repeated.
        digest: digest of the index; None: computed, which reads the whole index.

    Raises:
        UserError: a single sample exceeds a limit, or the mixture cannot be met.
    """

    def __init__(
        self,
        index: SampleIndex,
        mixture: Mixture | None = None,
        *,
        flops: Flops,
        max_tokens: int,
        max_tiles: int,
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
        self.max_tokens, self.max_tiles = max_tokens, max_tiles
        length = StageLength(self.global_batch_size, global_batch_tokens, max_steps, max_epochs)
        facts: dict[str, Any] = {"version": PLAN_VERSION, "length": asdict(length), "seed": seed}
        if store is not None:
            facts |= {"settings": asdict(self.mixture.settings), "index": digest or index.compute_digest()}
        self._step_arrays = load_or_build(
            store, "steps", hash_facts(facts), lambda: sample_steps(index, self.mixture, length, seed)
        )
        facts |= {"caps": [max_tokens, max_tiles], "flops": asdict(flops), "world_size": world_size}
        facts["packing"] = PACKING_VERSION
        packed = load_or_build(store, "packs", hash_facts(facts), self._pack_steps)
        self._pack_ids, self.accumulate_grad_batches = packed["pack"], int(packed["k"][0])
        self.num_steps = len(self._step_arrays["ends"])
        self.excluded_samples = np.empty(0, dtype=np.int64) if ledger is None else ledger.find_samples(index)
        self._cached_step: tuple[int, PlanStep] | None = (
            None  # the micro-batches of one step are read one after another
        )

    def get_samples(self, step: int) -> np.ndarray:
        """Return the samples of a step in the order of the mixture, without excluded ones; independent of the world size."""
        samples, _ = self._get_samples_and_pack_ids(step)
        return samples[~np.isin(samples, self.excluded_samples)]

    def get_step(self, step: int) -> PlanStep:
        """Return an optimizer step with its packs."""
        if self._cached_step is None or self._cached_step[0] != step:
            self._cached_step = step, self._build_step(step)
        return self._cached_step[1]

    def get_sample_sequence(self) -> np.ndarray:
        """Return the samples of all steps, step after step, for `Mixture.summarize`; it includes those of the ledger."""
        return self._step_arrays["samples"]

    @property
    def batch_description(self) -> str:
        """Size of a step as text, such as "128 samples"."""
        if self.global_batch_tokens is not None:
            return format_count(self.global_batch_tokens, "token")
        assert self.global_batch_size is not None
        return format_count(self.global_batch_size, "sample")

    @property
    def step_ends(self) -> np.ndarray:
        """End of each step in `get_sample_sequence()`, [steps]. Step i begins at `step_ends[i - 1]`, the first at 0."""
        return self._step_arrays["ends"]

    def measure_balance(self) -> dict[str, Any]:
        """Measure the balance and the sizes of the packs.

        `micro_steps` is the share of the time in which ranks compute, if each micro-batch waits for its slowest rank
        (FSDP, ZeRO-3); `ranks` is that share if ranks wait only at the end of a step (DDP). Both are mean over maximum
        FLOPs, given as the mean over the steps and as the worst step. `tokens` and `tiles` are the sizes of the packs.
        """
        num_packs, micro_batch_balance, rank_balance, sizes = self.accumulate_grad_batches * self.world_size, [], [], []
        steps_per_block = max(1, BLOCK_SIZE // max(num_packs, len(self._pack_ids) // self.num_steps))
        for start in range(0, self.num_steps, steps_per_block):
            step_samples, pack_ids = self._gather_steps(np.arange(start, min(start + steps_per_block, self.num_steps)))
            pack_flops = sum_per_pack(pack_ids, step_samples.flops, num_packs).reshape(
                len(pack_ids), self.accumulate_grad_batches, self.world_size
            )
            mean_flops = pack_flops.sum(axis=(1, 2)) / self.world_size
            micro_batch_balance.append(mean_flops / pack_flops.max(axis=2).sum(axis=1))
            rank_balance.append(mean_flops / pack_flops.sum(axis=1).max(axis=1))
            sizes.append(
                np.stack(
                    [
                        sum_per_pack(pack_ids, c, num_packs).ravel()
                        for c in (step_samples.valid, step_samples.tokens, step_samples.tiles)
                    ]
                )
            )
        samples, tokens, tiles = np.concatenate(sizes, axis=1, dtype=np.float32)
        return {
            "k": self.accumulate_grad_batches,
            "world_size": self.world_size,
            "samples_per_rank_and_step": len(self._pack_ids) / self.num_steps / self.world_size,
            "micro_steps": _summarize_balance(np.concatenate(micro_batch_balance)),
            "ranks": _summarize_balance(np.concatenate(rank_balance)),
            "tokens": _summarize_sizes(tokens, self.max_tokens),
            "tiles": _summarize_sizes(tiles, self.max_tiles),
            "blank_packs": int((samples == 0).sum()),
            "num_packs": len(samples),
            "padding": 0.0,  # a flat batch has no padding
        }

    def _build_step(self, step: int) -> PlanStep:
        """Build a step: group its samples by pack, without excluded samples."""
        samples_in_step, pack_ids = self._get_samples_and_pack_ids(step)
        is_excluded = np.isin(samples_in_step, self.excluded_samples)
        excluded, samples_in_step, pack_ids = (
            samples_in_step[is_excluded],
            samples_in_step[~is_excluded],
            pack_ids[~is_excluded],
        )
        order = np.argsort(pack_ids, kind="stable")
        samples = samples_in_step[order].tolist()
        bounds = np.searchsorted(
            pack_ids[order], np.arange(self.accumulate_grad_batches * self.world_size + 1)
        ).tolist()
        totals = {
            name: int(self._step_arrays[name][step])
            - (int(getattr(self.index, name)[excluded].sum()) if len(excluded) else 0)
            for name in ("supervised", "tiles", "chosen")
        }
        return PlanStep(
            packs=tuple(tuple(samples[begin:end]) for begin, end in pairwise(bounds)),
            num_supervised=totals["supervised"],
            num_samples=len(samples),
            num_tiles=totals["tiles"],
            num_chosen=totals["chosen"],
        )

    def _get_samples_and_pack_ids(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the samples of a step and their pack ids."""
        if not 0 <= step < self.num_steps:
            raise IndexError(f"step {step} of {self.num_steps}")
        ends = self._step_arrays["ends"]
        step_slice = slice(int(ends[step - 1]) if step else 0, int(ends[step]))
        return self._step_arrays["samples"][step_slice], self._pack_ids[step_slice]

    def _pack_steps(self) -> Arrays:
        """Pack all steps; the arrays that are cached."""
        limits = MicroBatchLimits(self.max_tokens, self.max_tiles)
        samples, ends = self._step_arrays["samples"], self._step_arrays["ends"]
        accumulate_grad_batches, pack_ids = pack_steps(self.index, self.flops, samples, ends, limits, self.world_size)
        return {"pack": pack_ids, "k": np.array([accumulate_grad_batches])}

    def _gather_steps(self, steps: np.ndarray) -> tuple[StepSamples, np.ndarray]:
        """Gather the samples of some steps, and their pack ids [steps, samples]."""
        step_samples = gather_steps(
            self.index, self.flops, self._step_arrays["samples"], self._step_arrays["ends"], steps
        )
        return step_samples, self._pack_ids[np.where(step_samples.valid, step_samples.positions, 0)].astype(np.int64)


def pack_validation(
    index: SampleIndex, *, max_tokens: int, max_tiles: int, world_size: int, flops: Flops
) -> list[Pack]:
    """Pack all validation samples, each once, into the fewest packs of equal FLOPs within the limits.

    Each rank has the same number of packs; pack `i` belongs to rank `i % world_size`. An empty pack becomes a dummy
    micro-batch. More than 65,536 samples are packed in blocks.
    """
    packs: list[Pack] = []
    for start in range(0, len(index), BLOCK_SIZE):
        samples = np.arange(start, min(start + BLOCK_SIZE, len(index)))
        limits, ends = MicroBatchLimits(max_tokens, max_tiles), np.array([len(samples)])
        num_micro_batches, pack_ids = pack_steps(index, flops, samples, ends, limits, world_size)
        order = np.argsort(pack_ids, kind="stable")
        bounds = np.searchsorted(pack_ids[order], np.arange(num_micro_batches * world_size + 1))
        packs += [tuple(samples[order[begin:end]].tolist()) for begin, end in pairwise(bounds)]
    return packs


def _summarize_balance(values: np.ndarray) -> dict[str, float]:
    return {"mean": float(values.mean()), "min": float(values.min())}


def _summarize_sizes(sizes: np.ndarray, limit: int) -> dict[str, float]:
    low, middle, high = (float(value) for value in np.percentile(sizes, (5, 50, 95)))
    mean, largest = float(sizes.mean()), float(sizes.max())
    return {"mean": mean, "p5": low, "median": middle, "p95": high, "largest": largest, "cap": limit}
