"""Benchmark of load balance: packing of this plan against padding, length grouping, next-fit and best-fit packing.

    python -m benchmarks.balance [--steps 200] [--plans 100000 1000000 10000000]
    python -m benchmarks.balance --bounds      few samples on a rank, beside what no packing can exceed

It uses three data shapes, three models, and 8, 64 and 256 simulated ranks. All contenders get the same samples and the
same token and tile limits. Balance is the mean over the maximum of FLOPs. It is computed for each micro-step over the ranks
(what FSDP and ZeRO-3 wait for), and for the sums of the ranks in an optimizer step (what DDP waits for). Then the time and
memory to build a plan are measured, in one process with one thread each. The result goes to
benchmarks/results/balance.json with versions, or to balance_bounds.json.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np

from lit_vlm.cost import Flops
from lit_vlm.data.index.sample_index import COLUMNS, KINDS, LANGUAGES, LENGTH_POLICY_COLUMNS, SampleIndex
from lit_vlm.data.packing.plan import Plan
from lit_vlm.types import Language, SampleKind

SHAPES = ("lcs", "mix665k", "anyres")
# token and tile limits of a micro-batch
LIMITS = {"lcs": (16384, 64), "mix665k": (16384, 64), "anyres": (32768, 96)}
# about four samples fill a micro-batch
TIGHT_LIMITS = {"lcs": (4096, 16), "mix665k": (8192, 32), "anyres": (16384, 48)}
RANKS = (8, 64, 256)
SAMPLES_PER_RANK = (2, 4, 8, 16, 32)  # samples per rank and step
MEGA_BATCH = 50  # batches in a mega-batch of the length grouping of LLaVA and transformers
WINDOW = 2048  # samples that best-fit packs at a time
GRID_TILES = np.repeat(
    np.arange(1, 10), [2, 6, 3, 8, 1, 5, 1, 2, 4]
)  # tiles without the base view, repeated by their frequency
VISION = {  # SigLIP so400m with 384 pixels; the last of its 27 layers is not run
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 26,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
}
TEXT = {  # Qwen2.5
    "0.5B": (896, 24, 4864, 14, 2, 151936),
    "7B": (3584, 28, 18944, 28, 4, 152064),
    "14B": (5120, 48, 13824, 40, 8, 152064),
}
TEXT_CONFIG_KEYS = (
    "hidden_size",
    "num_hidden_layers",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--plans", type=int, nargs="*", default=[10**5, 10**6, 10**7])
    parser.add_argument("--bounds", action="store_true")
    parser.add_argument("--build", type=int, help=argparse.SUPPRESS)  # in a separate process
    arguments = parser.parse_args()
    if arguments.build:
        print(json.dumps(measure_build(arguments.build)))
        return
    if arguments.bounds:
        write_bounds([measure_bound(shape, ranks) for shape in SHAPES for ranks in RANKS])
        return
    rows = [row for shape in SHAPES for model in TEXT for row in compare_balance(shape, model, arguments.steps)]
    plans = [measure_build_in_subprocess(count) for count in arguments.plans]
    result = {"balance": rows, "plans": plans, "versions": get_versions()}
    path = Path(__file__).parent / "results" / "balance.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print_result(result)


def compare_balance(shape: str, model: str, max_steps: int) -> Iterator[dict[str, Any]]:
    """Yield the rows of one data shape and model: all contenders at each number of ranks.

    Our plan is also measured with few and many samples per rank, and with tight limits.
    """
    flops = make_flops(model)
    for ranks in RANKS:
        for per_rank, limits in [
            *((number, LIMITS[shape]) for number in SAMPLES_PER_RANK),
            (8, TIGHT_LIMITS[shape]),
            (16, TIGHT_LIMITS[shape]),
        ]:
            batch = ranks * per_rank
            steps = max(8, min(max_steps, 200_000 // batch))
            index = make_index(shape, batch * steps)
            plan_options: dict[str, Any] = {
                "flops": flops,
                "global_batch_size": batch,
                "world_size": ranks,
                "max_steps": steps,
            }
            plan = Plan(index, max_tokens=limits[0], max_tiles=limits[1], **plan_options)
            base = {"shape": shape, "model": model, "ranks": ranks, "samples_per_rank": per_rank, "steps": steps}
            base |= {"most_tokens": limits[0], "most_tiles": limits[1]}
            yield base | {"way": "lit_vlm"} | measure_plan(plan)
            if per_rank == 8 and limits == LIMITS[shape]:
                for method, batches in make_baselines(index, plan, np.random.default_rng(0)).items():
                    yield (
                        base
                        | {"way": method}
                        | measure_baseline(index, flops, batches, plan, padded="padded" in method)
                    )


def measure_bound(shape: str, ranks: int, per_rank: int = 2, max_samples: int = 10_000) -> dict[str, Any]:
    """Measure the balance of steps with few samples beside the bound of each step, for the 7B model."""
    batch = ranks * per_rank
    steps = min(200, max_samples // batch)
    max_tokens, max_tiles = LIMITS[shape]
    plan = Plan(
        make_index(shape, batch * steps),
        flops=make_flops("7B"),
        global_batch_size=batch,
        max_tokens=max_tokens,
        max_tiles=max_tiles,
        max_steps=steps,
        world_size=ranks,
    )
    flops, ends = plan.index.compute_flops(plan.flops)[plan.get_sample_sequence()], plan.step_ends
    bounds = [compute_balance_bound(step, ranks) for step in np.split(flops, ends[:-1])]
    reached = plan.measure_balance()["micro_steps"]["mean"]
    return {
        "shape": shape,
        "ranks": ranks,
        "samples_per_rank": per_rank,
        "steps": steps,
        "k": plan.accumulate_grad_batches,
        "micro_step": reached,
        "bound": float(np.mean(bounds)),
        "of_bound": reached / float(np.mean(bounds)),
    }


def compute_balance_bound(flops: np.ndarray, ranks: int) -> float:
    """Compute a balance that no packing of a step's samples on this number of ranks exceeds.

    The slowest rank cannot be faster than the smallest capacity that passes a test of bin packing: with dual feasible
    functions (Fekete, Schepers 2001) the samples must not need more than `ranks` bins. Bisection finds it to 0.1 %.
    """
    work = np.sort(flops / flops.sum() * ranks)  # 1: the mean of the ranks
    low, high = max(1.0, float(work[-1])), 2 * max(1.0, float(work[-1]))
    if count_required_bins(work / low) <= ranks:
        return 1 / low
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (low, middle) if count_required_bins(work / middle) <= ranks else (middle, high)
    return 1 / low


def count_required_bins(sizes: np.ndarray) -> int:
    """Return a lower bound of the number of bins of size 1 for sizes in ascending order, at most 1 each."""
    required = 0.0
    small = np.unique(np.concatenate([[0.0], sizes[sizes <= 0.5]]))
    first, last = np.searchsorted(sizes, small), np.searchsorted(sizes, 1 - small, side="right")
    for k in range(8):
        scaled = (k + 1) * sizes
        # k = 0: the size itself; else a size counts as the k-th part below it, unless it is a (k + 1)-th part exactly
        rounded = sizes if k == 0 else np.where(scaled == np.floor(scaled), sizes, np.floor(scaled) / k)
        sums = np.concatenate([[0.0], np.cumsum(rounded)])
        # sizes below `small` count as nothing, those above 1 - small as a whole bin
        required = max(required, float((len(sizes) - last + sums[last] - sums[np.minimum(first, last)]).max()))
    return int(np.ceil(required - 1e-6))


def write_bounds(rows: list[dict[str, Any]]) -> None:
    """Write the rows to benchmarks/results/balance_bounds.json and print their table."""
    path = Path(__file__).parent / "results" / "balance_bounds.json"
    path.write_text(json.dumps({"bounds": rows, "versions": get_versions()}, indent=2) + "\n")
    print("| data | ranks | k | this plan | bound | of the bound |\n|---|---|---|---|---|---|")
    for row in rows:
        reached, bound, share = (f"{row[key] * 100:.1f}" for key in ("micro_step", "bound", "of_bound"))
        print(f"| {row['shape']} | {row['ranks']} | {row['k']} | {reached} | {bound} | {share} |")


def measure_plan(plan: Plan) -> dict[str, Any]:
    """Measure the balance of a plan."""
    stats = plan.measure_balance()
    return {
        "k": plan.accumulate_grad_batches,
        "micro_step": stats["micro_steps"]["mean"],
        "micro_step_worst": stats["micro_steps"]["min"],
        "rank": stats["ranks"]["mean"],
        "rank_worst": stats["ranks"]["min"],
        "padding": stats["padding"],
        "above_a_cap": int(stats["tokens"]["largest"] > plan.max_tokens or stats["tiles"]["largest"] > plan.max_tiles),
        "fill": stats["tokens"]["mean"] / plan.max_tokens,
    }


def make_baselines(index: SampleIndex, plan: Plan, generator: np.random.Generator) -> dict[str, list[np.ndarray]]:
    """Make the baselines: for each method, the batches of samples in the order in which the ranks take them.

    Batches of fixed size hold as many samples as the micro-batches of this plan on average. The packing baselines fill up
    to the token limit and have no tile limit.
    """
    draws = plan.get_sample_sequence().astype(np.int64)
    size = max(1, round(len(draws) / (plan.num_steps * plan.accumulate_grad_batches * plan.world_size)))
    grouped = group_by_length(index, draws, size, plan.world_size, generator)
    packings: dict[str, Callable[[np.ndarray, np.ndarray, int], list[np.ndarray]]] = {
        "next-fit packing": pack_next_fit,
        "best-fit packing": pack_best_fit,
    }
    baselines = {"random batches, padded": split(draws, size), "length-grouped, padded": split(grouped, size)}
    for name, pack in packings.items():
        packs = pack(draws, index.tokens[draws].astype(np.int64), plan.max_tokens)
        baselines[name] = [packs[i] for i in generator.permutation(len(packs))]
    return baselines


def split(samples: np.ndarray, size: int) -> list[np.ndarray]:
    """Split samples into batches of a fixed size, without the incomplete last one."""
    return list(samples[: len(samples) // size * size].reshape(-1, size))


def group_by_length(
    index: SampleIndex, draws: np.ndarray, size: int, ranks: int, generator: np.random.Generator
) -> np.ndarray:
    """Group samples by length as LLaVA's `group_by_modality_length`.

    Samples with and without images are kept separate. Each group is split into mega-batches sorted by length, so that the
    ranks of a step get samples of similar length. Then the steps are shuffled.
    """
    step, step_batches = size * ranks, []
    for part in (draws[index.images[draws] > 0], draws[index.images[draws] == 0]):
        for start in range(0, len(part), step * MEGA_BATCH):
            mega_batch = part[start : start + step * MEGA_BATCH]
            mega_batch = mega_batch[np.argsort(-index.tokens[mega_batch], kind="stable")]
            step_batches += [mega_batch[i : i + step] for i in range(0, len(mega_batch) - step + 1, step)]
    return np.concatenate([step_batches[i] for i in generator.permutation(len(step_batches))] or [draws[:0]])


def pack_next_fit(samples: np.ndarray, tokens: np.ndarray, max_tokens: int) -> list[np.ndarray]:
    """Pack samples in order by next-fit: open a new pack when the current one is full."""
    bounds, num_tokens = [0], 0
    for i, length in enumerate(tokens.tolist()):
        if num_tokens + length > max_tokens:
            bounds.append(i)
            num_tokens = 0
        num_tokens += length
    return [samples[begin:end] for begin, end in zip(bounds, [*bounds[1:], len(samples)], strict=True)]


def pack_best_fit(samples: np.ndarray, tokens: np.ndarray, max_tokens: int) -> list[np.ndarray]:
    """Pack samples by best-fit decreasing within a window: longest first, into the fullest pack with room."""
    packs = []
    for start in range(0, len(samples), WINDOW):
        part, lengths = samples[start : start + WINDOW], tokens[start : start + WINDOW]
        room, pack_members = np.full(len(part), max_tokens), [list[int]() for _ in part]
        for i in np.argsort(-lengths, kind="stable").tolist():
            fits = np.where(room >= lengths[i], room, max_tokens + 1)
            best = int(fits.argmin())  # an empty pack has the most room, so it is chosen last
            pack_members[best].append(i)
            room[best] -= lengths[i]
        packs += [part[members] for members in pack_members if members]
    return packs


def measure_baseline(
    index: SampleIndex, flops: Flops, batches: list[np.ndarray], plan: Plan, *, padded: bool
) -> dict[str, Any]:
    """Measure the balance of a baseline, whose batches go to the ranks in turn.

    Ranks wait for each other in each micro-step, and after `k` micro-steps.
    """
    ranks, k = plan.world_size, plan.accumulate_grad_batches
    steps = len(batches) // (ranks * k)
    batches = batches[: steps * ranks * k]
    tokens = [index.tokens[batch].astype(np.int64) for batch in batches]
    slots = [np.full(len(t), t.max()) if padded else t for t in tokens]
    batch_flops = [
        flops.compute(t, t**2, index.tiles[batch], index.supervised[batch]).sum()
        for t, batch in zip(slots, batches, strict=True)
    ]
    flops_by_step = np.array(batch_flops).reshape(steps, k, ranks)
    micro = flops_by_step.sum(axis=(1, 2)) / ranks / flops_by_step.max(axis=2).sum(axis=1)
    rank = flops_by_step.sum(axis=(1, 2)) / ranks / flops_by_step.sum(axis=1).max(axis=1)
    real_tokens, padded_tokens = sum(int(t.sum()) for t in tokens), sum(int(t.sum()) for t in slots)
    above = [
        s.sum() > plan.max_tokens or index.tiles[batch].sum() > plan.max_tiles
        for s, batch in zip(slots, batches, strict=True)
    ]
    return {
        "k": k,
        "micro_step": float(micro.mean()),
        "micro_step_worst": float(micro.min()),
        "rank": float(rank.mean()),
        "rank_worst": float(rank.min()),
        "padding": 1 - real_tokens / padded_tokens,
        "above_a_cap": float(np.mean(above)),
        "fill": padded_tokens / len(batches) / plan.max_tokens,
    }


def measure_build_in_subprocess(count: int) -> dict[str, Any]:
    """Run `measure_build` in a subprocess, whose memory holds only the plan and the index."""
    command = [sys.executable, "-m", "benchmarks.balance", "--build", str(count)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure_build(count: int) -> dict[str, Any]:
    """Measure time and memory to build, re-pack, open and read a plan of `count` samples."""
    index = make_index("anyres", count)
    index.columns["digest"] = np.random.default_rng(0).integers(0, 1 << 63, count).astype(np.uint64)
    options: dict[str, Any] = {
        "flops": make_flops("7B"),
        "global_batch_size": 512,
        "max_tokens": 32768,
        "max_tiles": 96,
    }
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder)
        start = time.perf_counter()
        Plan(index, world_size=64, store=store, **options)
        build_seconds, start = time.perf_counter() - start, time.perf_counter()
        Plan(index, world_size=8, store=store, **options)
        repack_seconds, peak, start = time.perf_counter() - start, get_peak_memory(), time.perf_counter()
        plan = Plan(index, world_size=64, store=store, digest=index.compute_digest(), **options)
        open_seconds = time.perf_counter() - start
        size = sum(path.stat().st_size for path in store.glob("*.arrow"))
        times = sorted(
            measure_step(plan, step) for step in np.random.default_rng(0).integers(0, plan.num_steps, 1000).tolist()
        )
    return {
        "samples": count,
        "steps": plan.num_steps,
        "build_seconds": build_seconds,
        "deal_again_seconds": repack_seconds,
        "open_seconds": open_seconds,
        "index_gib": sum(column.nbytes for column in index.columns.values()) / 2**30,
        "peak_gib": peak / 2**30,
        "stored_mib": size / 2**20,
        "step_ms_median": times[len(times) // 2] * 1e3,
        "step_ms_p99": times[len(times) * 99 // 100] * 1e3,
    }


def measure_step(plan: Plan, step: int) -> float:
    """Measure the seconds to read one step of a plan."""
    start = time.perf_counter()
    plan.get_step(step)
    return time.perf_counter() - start


def get_peak_memory() -> int:
    """Return the peak resident bytes of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def make_flops(model: str) -> Flops:
    """Make the FLOP model of a Qwen2.5 size with SigLIP, both trained."""
    config = {"text_config": dict(zip(TEXT_CONFIG_KEYS, TEXT[model], strict=True)), "vision_config": VISION}
    return Flops.from_config(config, trains_tower=True, trains_language_model=True)


def make_index(shape: str, count: int) -> SampleIndex:
    """Make an index of synthetic samples with the length distribution of a data set.

    `lcs`: one tile and a short caption. `mix665k`: one tile and a dialogue, 6 % text only. `anyres`: up to ten tiles, 15 %
    text only.
    """
    generator = np.random.default_rng(0)

    def sample_lognormal(median: float, sigma: float, low: int, high: int) -> np.ndarray:
        return np.clip(np.round(median * np.exp(sigma * generator.standard_normal(count))), low, high).astype(np.int32)

    if shape == "lcs":
        answer, tiles = sample_lognormal(13, 0.4, 5, 77), np.ones(count, dtype=np.int32)
        tokens = 735 + answer
    else:
        answer, anyres = sample_lognormal(150, 0.8, 20, 1300), shape == "anyres"
        is_text = generator.random(count) < (0.15 if anyres else 0.06)
        has_one_tile = generator.random(count) < 0.15 / 0.85
        extra = (
            np.where(has_one_tile, 0, generator.choice(GRID_TILES, count)).astype(np.int32)
            if anyres
            else np.zeros(count, np.int32)
        )
        tiles = np.where(is_text, 0, 1 + extra).astype(np.int32)
        tokens = np.where(
            is_text, sample_lognormal(700, 0.8, 40, 4096 if anyres else 2048), 729 * (1 + extra) + 27 * extra + answer
        )
    values = {"tokens": tokens, "tiles": tiles, "images": tiles > 0, "supervised": np.minimum(answer, tokens // 2)}
    values |= {"squares": tokens.astype(np.int64) ** 2, "position": np.arange(count)}
    defaults = {
        "kind": KINDS.index(SampleKind.instruction),
        "language": LANGUAGES.index(Language.en),
        "most_tiles": -1,
        "turns": -1,
    }
    columns = {
        name: values[name].astype(dtype) if name in values else np.full(count, defaults.get(name, 0), dtype)
        for name, dtype in {**COLUMNS, **LENGTH_POLICY_COLUMNS}.items()
    }
    return SampleIndex([_SyntheticSource(shape)], np.zeros(count, dtype=np.int16), columns)


class _SyntheticSource:
    """Source of synthetic samples."""

    digest = ""

    def __init__(self, name: str) -> None:
        self.name = name


def get_versions() -> dict[str, str]:
    import pyarrow

    return {"python": sys.version.split()[0], "numpy": np.__version__, "pyarrow": pyarrow.__version__}


def print_result(result: dict[str, Any]) -> None:
    """Print the rows of the 7B model; the file holds all rows."""
    print("shape    ranks  per    cap  k  way                      micro   rank  worst  padding  > cap")
    for row in result["balance"]:
        if row["model"] == "7B":
            print(
                f"{row['shape']:8} {row['ranks']:5} {row['samples_per_rank']:4} {row['most_tokens']:6} {row['k']:2}  {row['way']:23} "
                f"{row['micro_step']:6.1%} {row['rank']:6.1%} {row['micro_step_worst']:6.1%} {row['padding']:8.1%} {row['above_a_cap']:6.1%}"
            )
    for plan in result["plans"]:
        print(
            f"{plan['samples']:>11,} samples: built in {plan['build_seconds']:.1f} s, dealt again in {plan['deal_again_seconds']:.1f} s, "
            f"opened in {plan['open_seconds']:.2f} s, peak {plan['peak_gib']:.2f} GiB (index {plan['index_gib']:.2f}), "
            f"stored {plan['stored_mib']:.0f} MiB, step in {plan['step_ms_median']:.3f} ms (p99 {plan['step_ms_p99']:.3f})"
        )


if __name__ == "__main__":
    main()
