"""Benchmark on one GPU: samples per second and share of the measured GEMM rate, against TRL and HF Trainer.

    python -m benchmarks.gpu [size=twin7b] [rows=align,sft,dpo] [minutes=10] [steps=10]

First the upper limits are measured: a product of large random matrices in bfloat16, and a copy within device memory. Then
models with random weights in released shapes: align at 0.5B and 7B, sft at 1.5B, dpo of a 7B model with LoRA. Micro-batches
are collated and moved to the device beforehand, as loaders do during training. A step is forward, backward, gradient clipping
and AdamW. FLOPs are those of the minimum work (benchmarks/flops_bound.py), so padding earns no FLOP/s. Peers whose
packages are installed run with the same weights and records, and a ratio requires an equal first loss. The result goes to
benchmarks/results/gpu.json. Without a GPU the same rows run on the CPU in the given size as a smoke test, and nothing is
written.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.compare.cases import HF_TUNED, OURS, TRL_SHIPPED, TRL_TUNED, Case, make_case, resize_case
from benchmarks.compare.contender import Contender, Placement, make_ours
from benchmarks.compare.gate import BFLOAT16
from benchmarks.compare.report import format_ratio, render_markdown
from benchmarks.flops_bound import Recipe, compute_step_flops

import torch  # isort: skip  # after the package, which sets the environment
from lit_vlm.config.schema import LoraConfig
from lit_vlm.distributed.trainer import disable_library_warnings
from lit_vlm.runs.run_folder import get_package_versions
from lit_vlm.types import UserError

OUT = Path(__file__).parent / "results" / "gpu.json"
WARM_UP = 3
MAX_SECONDS = 90.0  # maximum seconds for the measured steps of one contender
LARGE_MEMORY = 100e9  # device memory in bytes that fits two 7B pairs with unshared prompts
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True, slots=True)
class Row:
    """Row of the result table.

    Attributes:
        mixed: float32 weights under autocast; else bfloat16 weights.
        goal: minimum share of the GEMM rate, or minimum samples per second.
    """

    name: str
    stage: str
    size: str
    batch: int
    peers: tuple[str, ...]
    mixed: bool = False
    lora: LoraConfig | None = None
    goal: dict[str, float] | None = None


NEXT_TOKEN_PEERS = (HF_TUNED, TRL_TUNED, TRL_SHIPPED)
ROWS = (
    Row("align 0.5B", "align", "05b", 64, NEXT_TOKEN_PEERS, goal={"samples_per_second": 170}),
    Row("align 7B", "align", "7b", 16, NEXT_TOKEN_PEERS, goal={"of_gemm": 0.55}),
    Row("sft 1.5B", "sft", "1_5b", 8, NEXT_TOKEN_PEERS, mixed=True, goal={"of_gemm": 0.55}),
    Row("dpo 7B, LoRA, 5 tiles", "dpo", "7b", 2, (TRL_TUNED, TRL_SHIPPED), lora=LoraConfig(rank=64, targets=LINEAR)),
)


def main(argv: list[str]) -> dict[str, Any]:
    warnings.filterwarnings("ignore")
    disable_library_warnings()
    options = dict(text.partition("=")[::2] for text in argv)
    unknown = options.keys() - {"size", "rows", "minutes", "steps"}
    if unknown:
        raise UserError(
            f"{', '.join(sorted(unknown))}: there is no such word; size, rows, minutes and steps are known."
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and "size" not in options:
        raise UserError("No GPU is here, and the released sizes need one. size=twin7b runs the same lines on the CPU.")
    rows = [row for row in ROWS if row.stage in options.get("rows", "align,sft,dpo").split(",")]
    deadline = time.perf_counter() + 60 * float(options.get("minutes", 10))
    result = run(rows, device, options.get("size"), int(options.get("steps", 10)), deadline)
    if device == "cuda" and "size" not in options:
        OUT.write_text(json.dumps(result, indent=1) + "\n")
    print(render_table(result))
    return result


def run(rows: list[Row], device: str, size: str | None, steps: int, deadline: float) -> dict[str, Any]:
    """Run all rows with this library first, then the peers, until the deadline."""
    ceilings = {"gemm_flops_per_second": measure_gemm_rate(device), "copy_bytes_per_second": measure_copy_rate(device)}
    results: dict[str, dict[str, Any]] = {row.name: {} for row in rows}
    skipped = []
    jobs = [(row, OURS) for row in rows] + [(row, peer) for row in rows for peer in row.peers]
    for row, name in jobs:
        if time.perf_counter() > deadline:
            skipped.append(f"{row.name}, {name}: time was up")
            continue
        try:
            results[row.name][name] = measure(row, name, device, size, steps, ceilings)
        except (ImportError, torch.OutOfMemoryError) as error:
            skipped.append(f"{row.name}, {name}: {str(error).splitlines()[0]}")
        free_memory(device)
    for row in rows:
        add_ratios(results[row.name])
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    goals = {row.name: row.goal for row in rows if row.goal}
    return {"device": name, "ceilings": ceilings, "rows": results, "goals": goals, "left_out": skipped} | {
        "versions": get_package_versions()
    }


def measure(
    row: Row, name: str, device: str, size: str | None, steps: int, ceilings: dict[str, float]
) -> dict[str, Any]:
    """Build a contender, warm up and measure its steps."""
    case = make_gpu_case(row, device, size)
    contender = get_factory(case, make_placement(row, name, device), name)()
    start = time.perf_counter()
    inputs = contender.prepare(case.batches[0])
    prepare_seconds = time.perf_counter() - start
    loss = contender.backward(inputs)
    contender.update()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = measure_steps(contender, inputs, steps)
    median = statistics.median(seconds)
    flops = compute_step_flops(case.model_size.shape, make_recipe(row, case), case.sizes[0])
    tokens = sum(sum(record_size.lengths) for record_size in case.sizes[0])
    return {
        "loss": loss,
        "step_seconds": seconds,
        "samples_per_second": case.batch / median,
        "tokens_per_second": tokens / median,
        "model_flops_per_second": flops / median,
        "of_gemm": flops / median / ceilings["gemm_flops_per_second"],
        "peak_memory": torch.cuda.max_memory_allocated() if device == "cuda" else None,
        "prepare_seconds_per_sample": prepare_seconds / case.batch,
        "batch": case.batch,
    }


def measure_steps(contender: Contender, inputs: Any, steps: int) -> list[float]:
    """Measure the seconds of each step after the warm-up."""
    seconds: list[float] = []
    for i in range(WARM_UP - 1 + steps):
        contender.placement.wait()
        start = time.perf_counter()
        contender.backward(inputs)
        contender.update()
        contender.placement.wait()
        if i >= WARM_UP - 1:
            seconds.append(time.perf_counter() - start)
        if sum(seconds) > MAX_SECONDS:
            break
    return seconds


def make_gpu_case(row: Row, device: str, size: str | None) -> Case:
    """Make the case of a row; with little device memory, dpo has one pair per batch."""
    batch = row.batch
    if row.stage == "dpo" and device == "cuda" and torch.cuda.get_device_properties(0).total_memory < LARGE_MEMORY:
        batch = 1
    case = resize_case(make_case(row.stage, size or row.size), batch if device == "cuda" else 4, 1)
    return replace(case, options={"dtype": "float32" if row.mixed else "bfloat16"})


def make_placement(row: Row, name: str, device: str) -> Placement:
    """Make the placement of a contender. TRL as shipped keeps float32 weights under autocast; others compute as ours."""
    mixed = row.mixed or name == TRL_SHIPPED
    return Placement(device=device, dtype=torch.float32 if mixed else torch.bfloat16, mixed=mixed, lora=row.lora)


def get_factory(case: Case, placement: Placement, name: str) -> Callable[[], Contender]:
    """Get the factory of a contender by name."""
    if name == OURS:
        return make_ours(case, placement)[OURS]
    from benchmarks.compare.peers import make_peers

    return make_peers(case, placement)[name]


def make_recipe(row: Row, case: Case) -> Recipe:
    """Make the minimum-work recipe. With LoRA, gradients pass through frozen matrices; adapter FLOPs (a few %) are omitted."""
    return replace(case.ideal_recipe, trains_language_model=False) if row.lora else case.ideal_recipe


def add_ratios(rows: dict[str, dict[str, Any]]) -> None:
    """Add to each peer the ratio of its time to ours; None if its loss differs."""
    if OURS not in rows:
        return
    own_row = rows[OURS]
    for name, row in rows.items():
        if name != OURS:
            difference = abs(row["loss"] - own_row["loss"]) / abs(own_row["loss"])
            ratio = statistics.median(row["step_seconds"]) / statistics.median(own_row["step_seconds"])
            row |= {"loss_apart": difference, "ratio": ratio if difference <= BFLOAT16.loss else None}


def measure_gemm_rate(device: str) -> float:
    """Measure the maximum FLOP/s over several products of square random matrices. A GPU would be faster on zeros."""
    side, kind = (8192, torch.bfloat16) if device == "cuda" else (512, torch.float32)
    a, b = (torch.randn(side, side, device=device, dtype=kind) for _ in range(2))
    return 2.0 * side**3 / measure_best_seconds(lambda: a @ b, device)


def measure_copy_rate(device: str) -> float:
    """Measure the bytes per second of a copy, reads plus writes."""
    source = torch.ones((2**31 if device == "cuda" else 2**26) // 4, device=device)
    target = torch.empty_like(source)
    return 2.0 * source.numel() * 4 / measure_best_seconds(lambda: target.copy_(source), device)


def measure_best_seconds(function: Callable[[], Any], device: str, rounds: int = 5, inner: int = 10) -> float:
    """Measure the seconds of one call: the minimum over some rounds."""
    seconds = []
    for _ in range(rounds):
        Placement(device=device).wait()
        start = time.perf_counter()
        for _ in range(inner):
            function()
        Placement(device=device).wait()
        seconds.append((time.perf_counter() - start) / inner)
    return min(seconds)


def free_memory(device: str) -> None:
    """Free cached device memory."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def render_table(result: dict[str, Any]) -> str:
    """Render the result as a Markdown table."""
    gemm, copy = (result["ceilings"][key] for key in ("gemm_flops_per_second", "copy_bytes_per_second"))
    head = [
        "",
        "contender",
        "samples/s",
        "tokens/s",
        "TFLOP/s",
        "of the GEMM ceiling",
        "peak memory, GB",
        "time over ours",
    ]
    body = [
        [
            name,
            contender,
            f"{row['samples_per_second']:.1f}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['model_flops_per_second'] / 1e12:.3g}",
            f"{row['of_gemm']:.0%}",
            f"{row['peak_memory'] / 1e9:.1f}" if row["peak_memory"] else "",
            format_ratio(row.get("ratio", 1.0)),
        ]
        for name, rows in result["rows"].items()
        for contender, row in rows.items()
    ]
    title = f"{result['device']}: GEMM {gemm / 1e12:.3g} TFLOP/s, copy {copy / 1e12:.3g} TB/s"
    return "\n".join([title, "", render_markdown(head, body), *result["left_out"]])


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        raise SystemExit(str(error)) from None
