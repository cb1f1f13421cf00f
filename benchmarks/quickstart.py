"""Benchmark of the quickstart over several seeds: mean results and their spread.

    python -m benchmarks.quickstart --runs runs/seeds [--seeds 0,1,2,3,4] [--stages 3_highres,4_dpo] [--readme]

Each seed is a run of all four stages in a separate folder; a finished one is only read. The result goes to
benchmarks/results/quickstart.json with versions; `--readme` writes its tables into both READMEs. With `--stages` only the
figures of these stages are replaced, after a change of their recipe. Another processor rounds differently, which has the same
effect as another seed. So the tables show mean and standard deviation over seeds.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lit_vlm.formatting import format_short
from lit_vlm.reports.run_record import RunRecord, read_run

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks/results/quickstart.json"
READMES = [ROOT / "README.md", ROOT / "README.ko.md"]
STAGES = ("1_align", "2_sft", "3_highres", "4_dpo")
TABLE_PATTERN = re.compile(r"(?<=<!-- quickstart-table -->\n).*?(?=<!-- /quickstart-table -->)", re.DOTALL)
KIND_TITLES = {
    "caption": "captions",
    "word": "rendered words",
    "number": "two-digit numbers",
    "grounding": "boxes right to a tenth",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--stages", default=",".join(STAGES), help="stages whose figures are replaced")
    parser.add_argument("--readme", action="store_true")
    arguments = parser.parse_args()
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    for seed in seeds:
        command = [sys.executable, str(ROOT / "run.py"), f"run_dir={arguments.runs / str(seed)}"]
        subprocess.run(command + ([f"seed={seed}"] if seed else []), check=True)
    result = collect_results([arguments.runs / str(seed) for seed in seeds], seeds, arguments.stages.split(","))
    RESULT.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(render_tables(result))
    if arguments.readme:
        for path in READMES:
            text = path.read_text(encoding="utf-8")
            path.write_text(TABLE_PATTERN.sub(lambda _: render_tables(result), text), encoding="utf-8")


def read_stage(run_dir: Path, stage: str) -> RunRecord:
    """Read the record of a stage, whose folder name may have a suffix for its settings."""
    (folder,) = [path for path in (run_dir / "tiny").iterdir() if re.fullmatch(rf"{stage}(-\w+)?", path.name)]
    return read_run(folder)


def collect_results(run_dirs: list[Path], seeds: list[int], stages: Sequence[str] = STAGES) -> dict[str, Any]:
    """Collect the figures of `stages`, each as a list over seeds; the other stages keep their measured figures."""
    kept = {} if set(stages) == {*STAGES} else json.loads(RESULT.read_text(encoding="utf-8"))["stages"]
    measured = {}
    for stage in stages:
        records = [read_stage(run_dir, stage) for run_dir in run_dirs]
        origin = {"seeds": seeds, "versions": records[0].manifest["versions"], "processor": _read_processor_name()}
        measured[stage] = origin | _collect_figures(records)
    return {"stages": {stage: (kept | measured)[stage] for stage in STAGES}}


def _read_processor_name() -> str:
    info = Path("/proc/cpuinfo")
    match = re.search(r"model name\s*: (.+)", info.read_text()) if info.is_file() else None
    return match[1] if match else platform.machine()


def _collect_figures(records: list[RunRecord]) -> dict[str, Any]:
    names = ("seconds", "samples", "tokens", "loss_first", "loss_last", "peak_memory_bytes", "val/rewards/accuracies")
    figures = {name: [record.figures[name] for record in records] for name in names if name in records[0].figures}
    scores = {
        phase: {kind: [record.get_scores(phase)[kind] for record in records] for kind in records[0].get_scores(phase)}
        for phase in ("before", "after")
    }
    means = {phase: [record.compute_mean_score(phase) for record in records] for phase in ("before", "after")}
    trained = [f"{part['part']} {format_short(part['trainable'])} ({part['how']})" for part in records[0].trained_parts]
    return {"trained": trained, **figures, "mean_score": means, "scores": scores}


def compute_threshold(figures: dict[str, Any], kind: str) -> float:
    """Compute the minimum score of another machine for a kind of questions: three standard deviations below the mean.

    The deviation is over seeds and both languages, because a few seeds alone estimate it poorly.
    """
    values = [value for language in ("ko", "en") for value in figures["scores"]["after"][f"{kind}_{language}"]]
    return statistics.mean(values) - 3 * statistics.stdev(values)


def render_tables(result: dict[str, Any]) -> str:
    """Render both tables of the README as Markdown."""
    lines = ["| stage | trained | seeds | samples | tokens | loss | held-out score |", "|---|---|---|---|---|---|---|"]
    for stage, figures in result["stages"].items():
        scores = figures["mean_score"]
        score = f"{statistics.mean(scores['before']):.2f} → {_format_mean(scores['after'])}"
        if rewards := figures.get("val/rewards/accuracies"):
            score = f"reward accuracy {_format_mean(rewards)}"
        cells = (
            f"tiny/{stage}",
            ", ".join(figures["trained"]).replace(" (all)", ""),
            str(len(figures["seeds"])),
            format_short(statistics.mean(figures["samples"])),
            format_short(statistics.mean(figures["tokens"])),
            f"{statistics.mean(figures['loss_first']):.2f} → {_format_mean(figures['loss_last'])}",
            score,
        )
        lines.append(f"| {' | '.join(cells)} |")
    after = result["stages"]["2_sft"]["scores"]["after"]
    lines += ["", "| after `sft` | Korean | English |", "|---|---|---|"]
    lines += [
        f"| {name} | {_format_mean(after[f'{kind}_ko'])} | {_format_mean(after[f'{kind}_en'])} |"
        for kind, name in KIND_TITLES.items()
    ]
    return "\n".join(lines) + "\n"


def _format_mean(values: list[float]) -> str:
    """Format mean and standard deviation; a single seed has no deviation."""
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation}"


if __name__ == "__main__":
    main()
