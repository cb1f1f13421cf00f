"""One GPU: samples per second and their share of what the same GPU was just seen to do, beside TRL and HF Trainer.

    python -m benchmarks.gpu [size=twin7b] [rows=align,sft,dpo] [minutes=10] [steps=10]

First the ceilings: a product of large random matrices in bfloat16, and a copy within the device's memory. Then random
weights at released shapes: align at 0.5B and 7B, sft at 1.5B, dpo of a 7B model under LoRA. Micro-batches are collated and
on the device beforehand, as loaders do beside training; a step is forward, backward, clipping and AdamW. FLOPs are
those of the least work (benchmarks/flops_bound.py), so that nobody is paid for padding. Peers whose packages are there
run at the same weights and records, and a ratio needs an equal first loss. The result goes to benchmarks/results/gpu.json.
Without a GPU the same lines run on the CPU in the size that is given, to see that they do, and nothing is written.
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

from benchmarks.compare.cases import HF_TUNED, OURS, TRL_SHIPPED, TRL_TUNED, Case, make_case, smaller
from benchmarks.compare.contender import Contender, Place, make_ours
from benchmarks.compare.gate import BFLOAT16
from benchmarks.compare.report import markdown, times
from benchmarks.flops_bound import Recipe, step_flops

import torch  # isort: skip  # behind the package, which sets the environment
from lit_vlm.engine.run_folder import versions
from lit_vlm.engine.trainer import quiet
from lit_vlm.model.lora import Lora
from lit_vlm.types import UserError

OUT = Path(__file__).parent / "results" / "gpu.json"
WARM_UP = 3
LONGEST = 90.0  # seconds of one contender's timed steps
ROOMY = 100e9  # bytes of device memory from which two unshared pairs of 7B fit
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table.

    Attributes:
        mixed: float32 weights under autocast; else weights in bfloat16.
        goal: least share of the GEMM ceiling, or samples per second.
    """

    name: str
    stage: str
    size: str
    batch: int
    peers: tuple[str, ...]
    mixed: bool = False
    lora: Lora | None = None
    goal: dict[str, float] | None = None


FOR_NEXT_TOKEN = (HF_TUNED, TRL_TUNED, TRL_SHIPPED)
ROWS = (
    Row("align 0.5B", "align", "05b", 64, FOR_NEXT_TOKEN, goal={"samples_per_second": 170}),
    Row("align 7B", "align", "7b", 16, FOR_NEXT_TOKEN, goal={"of_gemm": 0.55}),
    Row("sft 1.5B", "sft", "1_5b", 8, FOR_NEXT_TOKEN, mixed=True, goal={"of_gemm": 0.55}),
    Row("dpo 7B, LoRA, 5 tiles", "dpo", "7b", 2, (TRL_TUNED, TRL_SHIPPED), lora=Lora(64, 16.0, 0.0, LINEAR)),
)


def main(words: list[str]) -> dict[str, Any]:
    warnings.filterwarnings("ignore")
    quiet()
    given = dict(word.partition("=")[::2] for word in words)
    unknown = given.keys() - {"size", "rows", "minutes", "steps"}
    if unknown:
        raise UserError(
            f"{', '.join(sorted(unknown))}: there is no such word; size, rows, minutes and steps are known."
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and "size" not in given:
        raise UserError("No GPU is here, and the released sizes need one. size=twin7b runs the same lines on the CPU.")
    rows = [row for row in ROWS if row.stage in given.get("rows", "align,sft,dpo").split(",")]
    deadline = time.perf_counter() + 60 * float(given.get("minutes", 10))
    result = run(rows, device, given.get("size"), int(given.get("steps", 10)), deadline)
    if device == "cuda" and "size" not in given:
        OUT.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))
    return result


def run(rows: list[Row], device: str, size: str | None, steps: int, deadline: float) -> dict[str, Any]:
    """Ours in all rows first, then the peers, until the time is up."""
    ceilings = {"gemm_flops_per_second": gemm_rate(device), "copy_bytes_per_second": copy_rate(device)}
    found: dict[str, dict[str, Any]] = {row.name: {} for row in rows}
    left_out = []
    turns = [(row, OURS) for row in rows] + [(row, peer) for row in rows for peer in row.peers]
    for row, name in turns:
        if time.perf_counter() > deadline:
            left_out.append(f"{row.name}, {name}: time was up")
            continue
        try:
            found[row.name][name] = measure(row, name, device, size, steps, ceilings)
        except (ImportError, torch.OutOfMemoryError) as error:
            left_out.append(f"{row.name}, {name}: {str(error).splitlines()[0]}")
        free(device)
    for row in rows:
        compare(found[row.name])
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    goals = {row.name: row.goal for row in rows if row.goal}
    return {"device": name, "ceilings": ceilings, "rows": found, "goals": goals, "left_out": left_out} | {
        "versions": versions()
    }


def measure(
    row: Row, name: str, device: str, size: str | None, steps: int, ceilings: dict[str, float]
) -> dict[str, Any]:
    """Build one contender, warm up, time its steps."""
    case = case_of(row, device, size)
    contender = maker(case, place_of(row, name, device), name)()
    began = time.perf_counter()
    inputs = contender.prepare(case.batches[0])
    prepared = time.perf_counter() - began
    loss = contender.backward(inputs)
    contender.update()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = timed(contender, inputs, steps)
    median = statistics.median(seconds)
    flops = step_flops(case.model_size.shape, recipe_of(row, case), case.sizes[0])
    tokens = sum(sum(one.lengths) for one in case.sizes[0])
    return {
        "loss": loss,
        "step_seconds": seconds,
        "samples_per_second": case.batch / median,
        "tokens_per_second": tokens / median,
        "model_flops_per_second": flops / median,
        "of_gemm": flops / median / ceilings["gemm_flops_per_second"],
        "peak_memory": torch.cuda.max_memory_allocated() if device == "cuda" else None,
        "prepare_seconds_per_sample": prepared / case.batch,
        "batch": case.batch,
    }


def timed(contender: Contender, inputs: Any, steps: int) -> list[float]:
    """Seconds of each step behind the warm-up."""
    seconds: list[float] = []
    for number in range(WARM_UP - 1 + steps):
        contender.place.wait()
        began = time.perf_counter()
        contender.backward(inputs)
        contender.update()
        contender.place.wait()
        if number >= WARM_UP - 1:
            seconds.append(time.perf_counter() - began)
        if sum(seconds) > LONGEST:
            break
    return seconds


def case_of(row: Row, device: str, size: str | None) -> Case:
    batch = row.batch
    if row.stage == "dpo" and device == "cuda" and torch.cuda.get_device_properties(0).total_memory < ROOMY:
        batch = 1
    case = smaller(make_case(row.stage, size or row.size), batch if device == "cuda" else 4, 1)
    return replace(case, options={"dtype": "float32" if row.mixed else "bfloat16"})


def place_of(row: Row, name: str, device: str) -> Place:
    """TRL as shipped keeps float32 weights under autocast; the others compute as ours do."""
    mixed = row.mixed or name == TRL_SHIPPED
    return Place(device=device, dtype=torch.float32 if mixed else torch.bfloat16, mixed=mixed, lora=row.lora)


def maker(case: Case, place: Place, name: str) -> Callable[[], Contender]:
    if name == OURS:
        return make_ours(case, place)[OURS]
    from benchmarks.compare.peers import make_peers

    return make_peers(case, place)[name]


def recipe_of(row: Row, case: Case) -> Recipe:
    """Under LoRA the matrices are frozen and crossed; the adapters' own work, some percent, is left out."""
    return replace(case.ideal, trains_language_model=False) if row.lora else case.ideal


def compare(found: dict[str, dict[str, Any]]) -> None:
    """Puts into each peer how many times its time is ours; None where it computed something else."""
    if OURS not in found:
        return
    mine = found[OURS]
    for name, row in found.items():
        if name != OURS:
            apart = abs(row["loss"] - mine["loss"]) / abs(mine["loss"])
            ratio = statistics.median(row["step_seconds"]) / statistics.median(mine["step_seconds"])
            row |= {"loss_apart": apart, "ratio": ratio if apart <= BFLOAT16.loss else None}


def gemm_rate(device: str) -> float:
    """FLOP/s of the best of several products of square matrices; random, for a GPU is faster on zeros."""
    side, kind = (8192, torch.bfloat16) if device == "cuda" else (512, torch.float32)
    a, b = (torch.randn(side, side, device=device, dtype=kind) for _ in range(2))
    return 2.0 * side**3 / best(lambda: a @ b, device)


def copy_rate(device: str) -> float:
    """Bytes per second, read and written."""
    source = torch.ones((2**31 if device == "cuda" else 2**26) // 4, device=device)
    target = torch.empty_like(source)
    return 2.0 * source.numel() * 4 / best(lambda: target.copy_(source), device)


def best(function: Callable[[], Any], device: str, rounds: int = 5, inner: int = 10) -> float:
    """Seconds of one call, the best of some rounds."""
    found = []
    for _ in range(rounds):
        Place(device=device).wait()
        began = time.perf_counter()
        for _ in range(inner):
            function()
        Place(device=device).wait()
        found.append((time.perf_counter() - began) / inner)
    return min(found)


def free(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def table(result: dict[str, Any]) -> str:
    """Markdown, as on the page."""
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
            times(row.get("ratio", 1.0)),
        ]
        for name, rows in result["rows"].items()
        for contender, row in rows.items()
    ]
    told = f"{result['device']}: GEMM {gemm / 1e12:.3g} TFLOP/s, copy {copy / 1e12:.3g} TB/s"
    return "\n".join([told, "", markdown(head, body), *result["left_out"]])


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        raise SystemExit(str(error)) from None
