"""What each stage of the quickstart gains and loses in the exam, over several seeds.

    python -m benchmarks.stage_gains FOLDER [--seeds 0,1,2] [--items 150] [--equal-steps]

FOLDER becomes the run folder. For each seed the four stages train as in the quickstart. `sft` trains twice more from an
unaligned model: with the same steps, and with as many more as `align` costs in CPU seconds (not with `--equal-steps`). Each
model takes the exam with `--items` questions of each cell, and is compared in pairs with the one that it started from, `sft` with
its unaligned twins. A step that is there is only read, so the same command resumes. The result goes to
benchmarks/results/stage_gains.json, its tables are printed.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.learning_curve import run_command
from lit_vlm.evaluation.exam import ALL_CELL, EXAM_FILE, ExamAnswers, read_answers
from lit_vlm.evaluation.exam_comparison import CellDifference, Verdict, compare_exams

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks/results/stage_gains.json"
STAGES = ("1_align", "2_sft", "3_highres", "4_dpo")
UNALIGNED, UNALIGNED_LONGER = "sft_unaligned", "sft_unaligned_longer"
SFT, HIGHRES, DPO = "`sft`", "`highres`", "`dpo`"
COMPARISONS = {  # title: before, after
    SFT: ("1_align", "2_sft"),
    "`sft`, unaligned → aligned, equal steps": (UNALIGNED, "2_sft"),
    "`sft`, unaligned → aligned, equal CPU seconds": (UNALIGNED_LONGER, "2_sft"),
    HIGHRES: ("2_sft", "3_highres"),
    DPO: ("3_highres", "4_dpo"),
}
OBEDIENCE_TITLES = {
    "obeys_gro": "`<gro>` gives boxes",
    "obeys_ocr": "`<ocr>` gives lines",
    "obeys_plain": "no boxes unasked",
}
PREFERENCE_METRICS = {
    "reward accuracy": "rewards/accuracies",
    "ranking accuracy before": "reference_ranking_accuracy",
    "after": "ranking_accuracy",
    "KL": "kl",
    "drift": "drift",
}
MARKS = {Verdict.gained: "▲", Verdict.lost: "▼", Verdict.unchanged: ""}
NUM_ITEMS = 150
ONE_THREAD = "trainer.num_threads=1"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--items", type=int, default=NUM_ITEMS)
    parser.add_argument("--equal-steps", action="store_true")
    arguments = parser.parse_args()
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    measured = {
        seed: measure_seed(arguments.folder / str(seed), seed, arguments.items, arguments.equal_steps) for seed in seeds
    }
    manifest = json.loads((arguments.folder / str(seeds[0]) / "2_sft/manifest.json").read_text(encoding="utf-8"))
    result = {"versions": manifest["versions"], "items": arguments.items, "seeds": measured}
    RESULT.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    print(*(render(result) for render in RENDERERS.values()), sep="\n\n")


def measure_seed(folder: Path, seed: int, num_items: int, equal_steps: bool) -> dict[str, Any]:
    """Train the stages of one seed and the unaligned twins of `sft`, and compare their exams."""
    parent: Path | None = None
    for stage in STAGES:
        train(folder, seed, stage, stage, parent)
        parent = folder / stage / "hf"
    train(folder, seed, "2_sft", UNALIGNED, None)
    names = [*STAGES, UNALIGNED]
    if not equal_steps:
        recipe = yaml.safe_load((ROOT / "conf/experiment/tiny/2_sft.yaml").read_text(encoding="utf-8"))
        extra = read_seconds(folder, "1_align") / read_seconds(folder, "2_sft")
        longer = round(recipe["trainer"]["max_steps"] * (1 + extra))
        train(folder, seed, "2_sft", UNALIGNED_LONGER, None, f"trainer.max_steps={longer}")
        names.append(UNALIGNED_LONGER)
    exams = {name: take_exam(folder, seed, name, num_items) for name in names}
    return {
        "cpu_seconds": {name: read_seconds(folder, name) for name in names},
        "comparisons": {
            title: [describe(difference) for difference in compare_exams(exams[before], exams[after])]
            for title, (before, after) in COMPARISONS.items()
            if before in exams
        },
        "preferences": read_preference_metrics(folder / "4_dpo"),
    }


def train(folder: Path, seed: int, stage: str, name: str, parent: Path | None, *overrides: str) -> None:
    """Train a stage from `parent` or, without one, from the tiny parts; note its CPU seconds beside the run."""
    if (folder / name / "hf").is_dir():
        return
    start = f"init_from={parent}" if parent else "init_from=null"
    before = os.times()
    run_command(
        folder,
        f"seed={seed}",
        ONE_THREAD,
        f"experiment=tiny/{stage}",
        f"run_name={name}",
        start,
        "evaluate.exam_items=0",
        *overrides,
    )
    after = os.times()
    seconds = after.children_user - before.children_user + after.children_system - before.children_system
    (folder / f"{name}.seconds").write_text(f"{seconds:.1f}\n", encoding="utf-8")


def read_seconds(folder: Path, name: str) -> float:
    """Read the CPU seconds of a run's whole command."""
    return float((folder / f"{name}.seconds").read_text(encoding="utf-8"))


def take_exam(folder: Path, seed: int, name: str, num_items: int) -> ExamAnswers:
    """Let a run's model take the exam, and read its answers; an exam that is there asks nothing."""
    run_command(
        folder,
        f"seed={seed}",
        "task=exam",
        f"init_from={folder / name / 'hf'}",
        "trainer=tiny",
        f"evaluate.exam_items={num_items}",
    )
    answers = read_answers(folder / name / EXAM_FILE)
    assert answers is not None, folder / name / EXAM_FILE
    return answers


def read_preference_metrics(run_dir: Path) -> dict[str, float]:
    """Read the last metrics over the held-out pairs of a preference stage."""
    with (run_dir / "metrics.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    last = {key: value for row in rows for key, value in row.items() if value}
    return {title: round(float(last[f"val/{name}"]), 4) for title, name in PREFERENCE_METRICS.items()}


def describe(difference: CellDifference) -> dict[str, Any]:
    """Turn the difference in one cell into an entry of the result file."""
    numbers = {field: round(getattr(difference, field), 4) for field in ("before", "after", "low", "high")}
    return {"cell": difference.cell, "verdict": difference.verdict.value, **numbers}


def list_titles(result: dict[str, Any]) -> list[str]:
    """List the comparisons that were made."""
    return list(next(iter(result["seeds"].values()))["comparisons"])


def render_comparisons(result: dict[str, Any]) -> str:
    """Render the number of cells that gained and lost, and the mean of all, per comparison and seed, as Markdown."""
    lines = ["| | seed | gained | lost | mean of all |", "|---|---|---|---|---|"]
    for title in list_titles(result):
        for seed, measured in result["seeds"].items():
            cells = measured["comparisons"][title]
            overall = next(cell for cell in cells if cell["cell"] == ALL_CELL)
            gained, lost = (sum(cell["verdict"] == one for cell in cells) for one in (Verdict.gained, Verdict.lost))
            mean = f"{overall['before']:.3f} → {overall['after']:.3f} ({overall['verdict']})"
            lines.append(f"| {title} | {seed} | {gained} | {lost} | {mean} |")
    return "\n".join(lines)


def render_cells(result: dict[str, Any]) -> str:
    """Render each cell that gained or lost with any seed, its change with each seed, as Markdown."""
    seeds: Sequence[str] = list(result["seeds"])
    lines = ["| | cell | " + " | ".join(f"seed {seed}" for seed in seeds) + " |", "|---|---|" + "---|" * len(seeds)]
    for title in list_titles(result):
        if title == SFT:  # it gains nearly everywhere: see render_scores
            continue
        rows = [{cell["cell"]: cell for cell in result["seeds"][seed]["comparisons"][title]} for seed in seeds]
        for name in rows[0]:
            cells = [row[name] for row in rows]
            if any(cell["verdict"] != Verdict.unchanged for cell in cells):
                changes = [
                    f"{cell['before']:.2f} → {cell['after']:.2f}{MARKS[Verdict(cell['verdict'])]}" for cell in cells
                ]
                lines.append(f"| {title} | {name.replace('_', ' ')} | " + " | ".join(changes) + " |")
    return "\n".join(lines)


def render_scores(result: dict[str, Any]) -> str:
    """Render the scores of the first seed's stages in each cell as Markdown, marked where a stage gained or lost."""
    comparisons = next(iter(result["seeds"].values()))["comparisons"]
    steps = [{cell["cell"]: cell for cell in comparisons[title]} for title in (SFT, HIGHRES, DPO)]
    names = [name.removesuffix("_ko_easy") for name in steps[0] if name.endswith("_ko_easy")]

    def list_stages(name: str) -> list[str]:
        scores = [f"{step[name]['after']:.2f}{MARKS[Verdict(step[name]['verdict'])]}" for step in steps]
        return [f"{steps[0][name]['before']:.2f}", *scores]

    lines = [
        "| kind | | align easy | hard | sft easy | hard | highres easy | hard | dpo easy | hard |",
        "|---" * 10 + "|",
    ]
    for name in names:
        for language in ("ko", "en"):
            easy, hard = (list_stages(f"{name}_{language}_{level}") for level in ("easy", "hard"))
            title = OBEDIENCE_TITLES.get(name, name.replace("_", " ")) if language == "ko" else ""
            cells = [cell for pair in zip(easy, hard, strict=True) for cell in pair]
            lines.append(f"| {title} | {language} | {' | '.join(cells)} |")
    lines.append(f"| mean |  | {' |  | '.join(list_stages(ALL_CELL))} |  |")
    return "\n".join(lines)


def render_preferences(result: dict[str, Any]) -> str:
    """Render the metrics of `dpo` over its held-out pairs as Markdown."""
    lines = [f"| seed | {' | '.join(PREFERENCE_METRICS)} |", "|---" * (1 + len(PREFERENCE_METRICS)) + "|"]
    for seed, measured in result["seeds"].items():
        lines.append(f"| {seed} | {' | '.join(f'{value:.3f}' for value in measured['preferences'].values())} |")
    return "\n".join(lines)


RENDERERS = {  # name of the block in docs/exam.md: its table
    "stage-gains-scores": render_scores,
    "stage-gains": render_comparisons,
    "stage-gains-cells": render_cells,
    "stage-gains-preferences": render_preferences,
}


if __name__ == "__main__":
    main()
