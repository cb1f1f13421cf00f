"""Report of the measurements: numbers and Markdown tables."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.compare.cases import OURS, Case, convert_to_gpu_recipe, count_lengths
from benchmarks.compare.clock import MAX_SPREAD, compute_spread
from benchmarks.compare.contender import StepTimes
from benchmarks.compare.counts import StepCounts
from benchmarks.flops_bound import Recipe, compute_ratio_bound, compute_step_flops

CLOCKS = {"cpu": "cpu_seconds", "wall": "wall_seconds"}
MAX_MEMORY_RATIO = 0.15
BOUND_SHARE = 0.85  # share of the bound that a ratio must reach if the bound is below the goal


def describe_data(case: Case) -> dict[str, Any]:
    """Describe the data of a repeat."""
    longest = [max(max(size.lengths) for size in step) for step in case.sizes]
    return count_lengths(case.sizes) | {"batch": case.batch, "steps": case.steps, "longest_of_each_step": longest}


def compute_flops(case: Case, recipe: Recipe) -> float:
    """Compute the FLOPs of a repeat."""
    return sum(compute_step_flops(case.model_size.shape, recipe, step) for step in case.sizes)


def make_row(case: Case, times: list[StepTimes], counts: StepCounts) -> dict[str, Any]:
    """Make the result row of a contender. Rates use CPU seconds; a repeat is all steps."""
    totals = count_lengths(case.sizes)
    walls, cpus = [repeat.wall for repeat in times], [repeat.cpu for repeat in times]
    seconds = statistics.median(cpus)
    return {
        "wall_seconds": walls,
        "cpu_seconds": cpus,
        "cpu_seconds_without_data": [repeat.cpu - repeat.data_cpu for repeat in times],
        "spread": {"cpu": compute_spread(cpus), "wall": compute_spread(walls)},
        "repeats": len(times),
        "samples_per_second": totals["records"] / seconds,
        "samples_per_wall_second": totals["records"] / statistics.median(walls),
        "supervised_tokens_per_second": totals["supervised"] / seconds,
        "tokens_per_second": totals["tokens"] / seconds,
        "slots_per_second": counts.slots / seconds,
        "padding": counts.padding,
        "tower_passes_per_tile": counts.tiles / totals["tiles"],
        "flops_per_sample": counts.flops / totals["records"],
        "executed_over_ideal": counts.flops / compute_flops(case, case.ideal_recipe),
        "flops_per_second": counts.flops / seconds,
        "data_share": statistics.median(repeat.data_cpu / repeat.cpu for repeat in times),
        "cpu_seconds_per_sample": seconds / totals["records"],
    }


def check_goals(case: Case, result: dict[str, Any]) -> list[dict[str, Any]]:
    """Check each goal against the measured ratio and the analytical bound. Of several peers the fastest counts."""
    rows, results = result["contenders"], []
    for bar in case.goals:
        peers = [peer for peer in bar.peers if peer in rows]
        if not peers or bar.ours not in rows:
            continue
        peer = min(peers, key=lambda name: statistics.median(rows[name]["cpu_seconds"]))
        shape, goal, recipe = case.model_size.shape, case.make_ideal_recipe(bar.ours), case.make_recipe(peer)
        bound = compute_ratio_bound(shape, recipe, goal, case.sizes)
        min_ratio = bar.min_ratio if bound >= bar.min_ratio else BOUND_SHARE * bound
        ratios = {clock: compute_ratio(rows, peer, bar.ours, clock) for clock in CLOCKS}
        ratio_without_data = _compute_median_ratio(rows, peer, bar.ours, "cpu_seconds_without_data")
        results.append(
            {
                "ours": bar.ours,
                "peer": peer,
                "asked": bar.min_ratio,
                "bound": bound,
                "executed": rows[peer]["executed_over_ideal"]
                * compute_flops(case, case.ideal_recipe)
                / compute_flops(case, goal),
                "bound_on_a_gpu": compute_ratio_bound(shape, convert_to_gpu_recipe(recipe, peer), goal, case.sizes),
                "bar": min_ratio,
                **ratios,
                "without_data": ratio_without_data if ratios["cpu"] else None,
                "reached": bool(ratios["cpu"] and ratios["cpu"] >= min_ratio),
            }
        )
    return results


def compute_ratio(rows: dict[str, Any], peer: str, ours: str, clock: str = "cpu") -> float | None:
    """Compute the ratio of median seconds, peer over ours; None if a spread is too large."""
    if max(rows[name]["spread"][clock] for name in (peer, ours)) > MAX_SPREAD:
        return None
    return _compute_median_ratio(rows, peer, ours, CLOCKS[clock])


def compare_ablations(case: Case, result: dict[str, Any], recipes: dict[str, Recipe]) -> list[dict[str, Any]]:
    """Compare the measured slow-down of each ablation with its prediction."""
    rows, shape = result["contenders"], case.model_size.shape
    return [
        {
            "off": name,
            "measured": compute_ratio(rows, name, OURS),
            "executed": rows[name]["flops_per_sample"] / rows[OURS]["flops_per_sample"],
            "predicted": compute_ratio_bound(shape, recipe, case.make_recipe(OURS), case.sizes),
        }
        for name, recipe in recipes.items()
    ]


def _compute_median_ratio(rows: dict[str, Any], peer: str, ours: str, field: str) -> float:
    return statistics.median(rows[peer][field]) / statistics.median(rows[ours][field])


# ---- tables


COLUMNS = {  # columns of the contender table: title, and function that formats the value of a row
    "CPU ms per sample": lambda row: f"{1e3 * row['cpu_seconds_per_sample']:.1f}",
    "samples/s": lambda row: f"{row['samples_per_second']:.2f}",
    "samples/s, wall clock": lambda row: f"{row['samples_per_wall_second']:.2f}",
    "supervised tokens/s": lambda row: f"{row['supervised_tokens_per_second']:,.0f}",
    "tokens/s": lambda row: f"{row['tokens_per_second']:,.0f}",
    "slots/s": lambda row: f"{row['slots_per_second']:,.0f}",
    "padding": lambda row: f"{row['padding']:.1%}",
    "vision tower passes per tile": lambda row: f"{row['tower_passes_per_tile']:.2g}",
    "GFLOP per sample": lambda row: f"{row['flops_per_sample'] / 1e9:.2f}",
    "FLOPs / minimum": lambda row: f"{row['executed_over_ideal']:.2f}",
    "GFLOP/s": lambda row: f"{row['flops_per_second'] / 1e9:.1f}",
    "peak memory, MB": lambda row: f"{row['peak_memory'] / 1e6:,.0f}" if "peak_memory" in row else "",
    "data": lambda row: f"{row['data_share']:.1%}",
    "spread": lambda row: f"{row['spread']['cpu']:.1%}, {row['spread']['wall']:.1%}",
    "repeats": lambda row: f"{row['repeats']}",
}


def render_text(result: dict[str, Any]) -> str:
    """Render the result for the terminal, with the same tables as on the page."""
    parts = [result["case"], *render_tables(result).values(), f"versions: {result['versions']}"]
    return "\n\n".join(parts)


def render_tables(result: dict[str, Any]) -> dict[str, str]:
    """Render the tables of a result as Markdown, by name."""
    tables_by_name = {}
    if "bars" in result:
        tables_by_name["ratios"] = _render_goal_table(result["bars"])
    if "contenders" in result and "ladder" not in result:
        tables_by_name["contenders"] = _render_contender_table(result["contenders"])
        tables_by_name["gate"] = _render_gate_table(result["gate"])
    if "ladder" in result:
        tables_by_name["ladder"] = _render_ablation_table(result["ladder"])
    if "ratio" in result:
        tables_by_name["memory"] = _render_memory_table(result)
    return tables_by_name


def _render_contender_table(rows: dict[str, Any]) -> str:
    body = [[title, *(write(row) for row in rows.values())] for title, write in COLUMNS.items()]
    return render_markdown(["", *rows], body)


def _render_goal_table(found: list[dict[str, Any]]) -> str:
    head = [
        "",
        "compared with",
        "CPU seconds",
        "wall clock",
        "without data",
        "bound",
        "executed",
        "bound on a GPU",
        "goal",
        "required",
        "reached",
    ]
    body = [
        [
            bar["ours"],
            bar["peer"],
            format_ratio(bar["cpu"]),
            format_ratio(bar["wall"]),
            format_ratio(bar["without_data"]),
            format_ratio(bar["bound"]),
            format_ratio(bar["executed"]),
            format_ratio(bar["bound_on_a_gpu"]),
            format_ratio(bar["asked"]),
            format_ratio(bar["bar"]) + (" (0.85 of the bound)" if bar["bar"] < bar["asked"] else ""),
            "yes" if bar["reached"] else "no",
        ]
        for bar in found
    ]
    return render_markdown(head, body)


def _render_gate_table(agreed: dict[str, Any]) -> str:
    head = ["", "loss", "later losses", "answers' log-probabilities", "gradients", "weights", "weight updates"]
    body = []
    for name, differences in agreed.items():
        if "gradients" in differences:
            cells = [f"{differences[key]:.0e}" for key in ("loss", "later_losses", "logps")]
            body.append([name, *cells, *(f"{differences[key]:.8f}" for key in ("gradients", "parameters", "updates"))])
    return render_markdown(head, body)


def _render_ablation_table(found: list[dict[str, Any]]) -> str:
    head = ["turned off", "relative time", "relative FLOPs", "predicted"]
    body = [
        [row["off"], format_ratio(row["measured"]), format_ratio(row["executed"]), format_ratio(row["predicted"])]
        for row in found
    ]
    return render_markdown(head, body)


def _render_memory_table(result: dict[str, Any]) -> str:
    tokens, long = result["data"]["tokens"], result["long"]
    rows = [
        *((f"{name}, {tokens:,} tokens", peak) for name, peak in result["peak_memory"].items()),
        (f"{OURS}, {long['data']['tokens']:,} tokens", long["peak_memory"]),
        ("all logits of that in float32, computed, not measured", long["computed_logits"]),
    ]
    body = [[name, f"{size / 1e9:.2f} GB"] for name, size in rows]
    body.insert(2, [f"ratio (required: at most {MAX_MEMORY_RATIO})", f"{result['ratio']:.3f}"])
    return render_markdown(["", "peak above the loaded model"], body)


def format_ratio(value: float | None) -> str:
    """Format a ratio for a table."""
    return "spread too wide" if value is None else f"{value:.2f}"


def render_markdown(head: list[str], body: list[list[str]]) -> str:
    """Render a Markdown table."""
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
