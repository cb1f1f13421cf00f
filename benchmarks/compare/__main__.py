"""Benchmark of optimizer steps against TRL and HF Trainer: check for equal results first, then ratios of time.

    python -m benchmarks.compare stage=align|sft|anyres|dpo|memory [size=twin7b|twin05b] [tiles=5|1] [peer=trl,hf]
                                 [ladder=true] [steps=N] [repeats=5] [most=15] [minutes=15] [peaks=false]

Each contender runs one optimizer step on the same records: its own processing and collating, forward, backward, gradient
clipping, AdamW. On a CPU with one thread, in float32. The result goes to benchmarks/results/compare_*.json, tables and plots
to docs/compare.md. For a GPU, use `python -m benchmarks.gpu`.
"""

from __future__ import annotations

import difflib
import json
import os
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from benchmarks.compare import page, report
from benchmarks.compare.cases import HF_TUNED, LONG_BATCH, OURS, Case, make_case
from benchmarks.compare.clock import measure_interleaved
from benchmarks.compare.contender import Contender, Placement, make_ours, setup_process
from benchmarks.compare.counts import count_step
from benchmarks.compare.gate import check_equal, require_checkpointing
from benchmarks.compare.memory import measure_peak_memory, read_available_memory
from benchmarks.compare.peers import make_peers
from benchmarks.compare.sizes import save_model
from benchmarks.compare.switches import ABLATIONS
from lit_vlm.distributed.trainer import disable_library_warnings
from lit_vlm.runs.run_folder import get_package_versions
from lit_vlm.types import UserError

RESULTS = Path(__file__).parents[1] / "results"
STAGES = ("align", "sft", "anyres", "dpo", "memory")
CPU_SIZES = ("twin7b", "twin05b", "smallest", "wide")
GATE_STEPS = 3
REQUIRED_MEMORY = 14e9  # free bytes required for the large micro-batch


@dataclass(frozen=True, slots=True)
class Arguments:
    """Command-line arguments."""

    stage: str
    size: str = "twin7b"
    tiles: int = 5
    peer: str = "trl,hf"
    ladder: bool = False
    steps: int = 0  # steps per repeat; 0: the number of the case
    repeats: int = 5
    most: int = 15
    minutes: float = 15.0
    peaks: bool = True  # also measure peak memory, in a subprocess per contender

    @classmethod
    def parse(cls, argv: list[str]) -> Arguments:
        """Parse `key=value` arguments.

        Raises:
            UserError: an unknown key or an invalid value.
        """
        kinds: dict[str, Any] = {"tiles": int, "steps": int, "repeats": int, "most": int, "minutes": float}
        names = [field.name for field in fields(cls)]
        values: dict[str, Any] = {}
        for argument in argv:
            key, _, value = argument.partition("=")
            if key not in names:
                matches = difflib.get_close_matches(key, names, 1)
                raise UserError(
                    f"{argument}: there is no {key!r}{f'; did you mean {matches[0]}=?' if matches else ''}. Words: {', '.join(names)}."
                )
            values[key] = value.lower() == "true" if key in ("ladder", "peaks") else kinds.get(key, str)(value)
        parsed = cls(**({"stage": ""} | values))
        for key, known in (("stage", STAGES), ("size", CPU_SIZES), ("tiles", (1, 5))):
            if getattr(parsed, key) not in known:
                hint = " Released sizes need a GPU: python -m benchmarks.gpu." if key == "size" else ""
                raise UserError(f"{key}={getattr(parsed, key)}: give one of {', '.join(map(str, known))}.{hint}")
        return parsed


def main(argv: list[str]) -> None:
    warnings.filterwarnings("ignore")
    disable_library_warnings()
    arguments = Arguments.parse(argv)
    case = make_case(arguments.stage, "wide" if arguments.stage == "memory" else arguments.size, arguments.tiles)
    case = replace(case, steps=arguments.steps or case.steps)
    setup_process()
    with tempfile.TemporaryDirectory() as folder:
        placement = Placement(save_model(case.model_size, case.tiling, Path(folder) / "hf"))
        if case.stage == "memory":
            result = compare_peaks(case, placement)
        else:
            result = (measure_ablations if arguments.ladder else compare_peers)(case, placement, arguments)
    print(report.render_text(result))
    if case.size != "smallest":  # a smoke test
        name = f"compare_{case.name}{'_ladder' if arguments.ladder else ''}.json"
        (RESULTS / name).write_text(json.dumps(result, indent=1) + "\n")
        page.write_page(RESULTS)


def compare_peers(case: Case, placement: Placement, arguments: Arguments, say=print) -> dict[str, Any]:
    """Compare this library with the requested peers.

    Raises:
        UserError: the contenders compute different results.
    """
    requested = tuple(arguments.peer.lower().split(","))
    names = [name for name in case.contenders if name.startswith(OURS) or name.lower().startswith(requested)]
    factories = make_ours(case, placement) | make_peers(case, placement)
    contenders = [factories[name]() for name in names]
    start = time.perf_counter()
    result = measure(case, contenders, arguments, say)
    for name in names:
        row = result["contenders"][name]
        if arguments.peaks:
            row["peak_memory"] = measure_peak(case, name, placement)
        row["arithmetic_flops"] = report.compute_flops(case, case.make_recipe(name))
    return result | {"bars": report.check_goals(case, result), "seconds": time.perf_counter() - start}


def measure_ablations(case: Case, placement: Placement, arguments: Arguments, say=print) -> dict[str, Any]:
    """Measure the ablations: this library against itself with each optimisation off."""
    switches = {name: switch for name, switch in ABLATIONS.items() if case.stage in switch.stages}
    contenders: list[Contender] = [make_ours(case, placement)[OURS]()]
    contenders += [switch.make_contender(name, case, placement) for name, switch in switches.items()]
    result = measure(case, contenders, arguments, say)
    return result | {
        "ladder": report.compare_ablations(case, result, {n: s.make_recipe(case) for n, s in switches.items()})
    }


def measure(case: Case, contenders: list[Contender], arguments: Arguments, say) -> dict[str, Any]:
    """Check for equal results, then count FLOPs and measure times."""
    differences = check_equal(contenders, case.batches[:GATE_STEPS])
    for contender in contenders:
        require_checkpointing(contender, should_recompute(case, contender.name))
    say(f"{case.name}: losses, gradients and weights agree")
    counts = {contender.name: count_step(contender, case.batches) for contender in contenders}
    limits = {"repeats": arguments.repeats, "most": arguments.most, "budget": 60 * arguments.minutes}
    times = measure_interleaved(contenders, case.batches, say=say, **limits)
    return {
        "case": case.name,
        "data": report.describe_data(case),
        "gate": differences,
        "contenders": {name: report.make_row(case, times[name], counts[name]) for name in times},
        "machine": {"load": os.getloadavg(), "cores": os.cpu_count()},
        "versions": get_package_versions(),
    }


def should_recompute(case: Case, name: str) -> bool:
    """Return whether a contender should recompute activations."""
    return (ABLATIONS[name].make_recipe(case) if name in ABLATIONS else case.make_recipe(name)).recomputes


def measure_peak(case: Case, name: str, placement: Placement) -> int:
    """Measure the peak memory of a contender in a subprocess, in bytes."""
    assert placement.folder is not None
    return measure_peak_memory(case.stage, case.size, case.tiles or 5, name, placement.folder, case.batch, case.steps)


def compare_peaks(case: Case, placement: Placement) -> dict[str, Any]:
    """Compare the peak memory of a large micro-batch with a real vocabulary against HF Trainer.

    Also measure this library alone on a longer micro-batch, and compute the size of all logits that HF Trainer would make.

    Raises:
        UserError: too little memory is free.
    """
    if read_available_memory() < REQUIRED_MEMORY:
        raise UserError(
            f"stage=memory: {read_available_memory() / 1e9:.1f} GB of memory are free and "
            f"{REQUIRED_MEMORY / 1e9:.0f} GB are needed. Try again when there are."
        )
    small = replace(case, batch=2, steps=1)
    contenders = [(make_ours(small, placement) | make_peers(small, placement))[name]() for name in (OURS, HF_TUNED)]
    differences = check_equal(contenders, small.batches)
    del contenders
    peaks = {name: measure_peak(case, name, placement) for name in (OURS, HF_TUNED)}
    ratio = peaks[OURS] / peaks[HF_TUNED]
    long = replace(case, batch=LONG_BATCH)
    long_data = report.describe_data(long)
    return {
        "case": case.name,
        "data": report.describe_data(case),
        "gate": differences,
        "peak_memory": peaks,
        "ratio": ratio,
        "long": {
            "data": long_data,
            "peak_memory": measure_peak(long, OURS, placement),
            "computed_logits": 4 * long_data["tokens"] * case.model_size.vocab,  # float32
        },
    } | {"versions": get_package_versions()}


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        raise SystemExit(str(error)) from None
