"""Learning curve of the quickstart's `sft`, trained longer: where the exam's score of each kind of questions starts to rise.

    python -m benchmarks.learning_curve FOLDER [--times 10] [--points 15]

FOLDER becomes the run folder. `align` runs as in the quickstart, then `sft` with `--times` as many steps, on more generated
samples. Checkpoints of it are exported and take the exam with 25 questions of each cell, the last one with 50. A step that is there is only read, so
the same command resumes. Scores go to benchmarks/results/learning_curve.json, the curve to docs/images/learning_curve.svg.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from lit_vlm.evaluation.exam import EXAM_FILE, read_answers
from lit_vlm.reports.charts import LINE_FRAME, ChartLine, draw_line_chart

ROOT = Path(__file__).resolve().parents[1]
RESULT, CHART = (ROOT / name for name in ("benchmarks/results/learning_curve.json", "docs/images/learning_curve.svg"))
ITEMS, LAST_ITEMS = 25, 50  # questions of each cell, for the checkpoints and for the finished model
MAX_SAMPLES = 24_000  # of a source: more make the index slow and are no less alike
LINES = {  # name in the chart: kinds
    "captions, words, numbers": ("caption", "word", "number"),
    "boxes": ("grounding",),
    "referring": ("referring",),
    "charts": ("chart",),
    "tables": ("table",),
    "documents": ("document",),
    "OCR with boxes": ("ocr",),
}
LEGEND_LEFT = (0, 170, 245, 345)  # left edges of the legend's columns, in pixels
COLOURS = ("#2563eb", "#0d9488", "#d97706", "#9333ea", "#dc2626", "#64748b", "#65a30d")
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#6b7280}.end{text-anchor:end}.middle{text-anchor:middle}.grid{stroke:#8884}"
    ".axis{stroke:#888}polyline{fill:none;stroke-width:2}"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--points", type=int, default=15)
    arguments = parser.parse_args()
    recipe = yaml.safe_load((ROOT / "conf/experiment/tiny/2_sft.yaml").read_text(encoding="utf-8"))
    run_dir = arguments.folder / "curve"
    if not (run_dir / EXAM_FILE).is_file():
        train(arguments.folder, arguments.times * recipe["trainer"]["max_steps"], arguments.times, arguments.points)
        take_exams(arguments.folder, run_dir)
    result = collect_result(run_dir, recipe["data"]["global_batch_size"])
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    CHART.write_text(draw_curve(result), encoding="utf-8")
    print(render_table(result))


def run_command(folder: Path, *overrides: str) -> None:
    """Run `python run.py` with the run folder and overrides."""
    subprocess.run([sys.executable, str(ROOT / "run.py"), f"run_dir={folder}", *overrides], check=True)


def train(folder: Path, steps: int, times: int, points: int) -> None:
    """Train `align`, and `sft` for `steps` steps with `points` checkpoints."""
    run_command(folder, "experiment=tiny/1_align", "run_name=align")
    sources = yaml.safe_load((ROOT / "conf/data/builtin_sft.yaml").read_text(encoding="utf-8"))["sources"]
    run_command(
        folder,
        "experiment=tiny/2_sft",
        "run_name=curve",
        f"init_from={folder / 'align/hf'}",
        f"trainer.max_steps={steps}",
        "export=false",  # a finished run with a model keeps no checkpoints
        f"checkpoint.every_steps={max(1, steps // points)}",
        f"checkpoint.keep_last={points + 1}",
        *(
            f"data.sources.{name}.num_samples={min(MAX_SAMPLES, times * source['num_samples'])}"
            for name, source in sources.items()
        ),
    )


def take_exams(folder: Path, run_dir: Path) -> None:
    """Export each checkpoint and let it take the exam; the last one last, whose answers say that all are there."""
    checkpoints = sorted((run_dir / "checkpoints").glob("step-*"))
    for checkpoint in checkpoints:
        is_last = checkpoint == checkpoints[-1]
        model = run_dir / ("hf" if is_last else f"hf-{checkpoint.name}")
        if not model.is_dir():
            run_command(folder, "task=export", f"init_from={run_dir}", f"resume_from={checkpoint}")
        run_command(
            folder,
            "task=exam",
            f"init_from={model}",
            "trainer=tiny",
            f"evaluate.exam_items={LAST_ITEMS if is_last else ITEMS}",
        )


def collect_result(run_dir: Path, batch_size: int) -> dict[str, Any]:
    """Collect the mean score of each cell after each number of samples."""
    manifest = json.loads((run_dir / "manifest.json").read_text(encoding="utf-8"))
    files = {int(path.parent.name.rsplit("-", 1)[1]): path for path in run_dir.glob(f"exam/hf-step-*/{EXAM_FILE}")}
    files[manifest["plan"]["steps"]] = run_dir / EXAM_FILE
    points = []
    for step, path in sorted(files.items()):
        answers = read_answers(path)
        assert answers is not None, path
        scores = {name: round(statistics.mean(values), 3) for name, values in answers.collect_cells().items()}
        points.append({"step": step, "samples": step * batch_size, "scores": scores})
    return {"versions": manifest["versions"], "points": points}


def get_easy_score(point: dict[str, Any], kinds: tuple[str, ...]) -> float:
    """Return the mean score of the easy questions of some kinds, over both languages."""
    return statistics.mean(point["scores"][f"{kind}_{language}_easy"] for kind in kinds for language in ("ko", "en"))


def draw_curve(result: dict[str, Any]) -> str:
    """Draw the scores over optimizer steps as a standalone SVG."""
    names = [f"line{number}" for number in range(len(LINES))]
    lines = [
        ChartLine(title, [(p["step"], get_easy_score(p, kinds)) for p in result["points"]], name)
        for (title, kinds), name in zip(LINES.items(), names, strict=True)
    ]
    drawing = draw_line_chart(lines, label="Score of easy questions over the optimizer steps of sft", low=0.0, high=1.0)
    style = STYLE + "".join(
        f"polyline.{name}{{stroke:{colour}}}text.{name}{{fill:{colour}}}"
        for name, colour in zip(names, COLOURS, strict=True)
    )
    legend = "".join(
        f'<text class="{name}" x="{44 + LEGEND_LEFT[number % 4]}" y="{LINE_FRAME.height + 14 + 18 * (number // 4)}">{title}</text>'
        for number, (name, title) in enumerate(zip(names, LINES, strict=True))
    )
    drawing = (
        re.sub(r"^<svg|</svg>$", "", drawing)
        .strip()
        .replace(f' {LINE_FRAME.height}"', f' {LINE_FRAME.height + 44}"', 1)
    )
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {drawing}'
    position = head.index(">") + 1
    return f"{head[:position]}<style>{style}</style>{head[position:]}{legend}</svg>\n"


def render_table(result: dict[str, Any]) -> str:
    """Render the scores of the easy questions, Korean and English, as Markdown."""
    kinds = [kind for group in LINES.values() for kind in group]
    lines = ["| samples | " + " | ".join(kinds) + " |", "|---|" + "---|" * len(kinds)]
    for point in result["points"]:
        scores = [
            ", ".join(f"{point['scores'][f'{kind}_{language}_easy']:.2f}" for language in ("ko", "en"))
            for kind in kinds
        ]
        lines.append(f"| {round(point['samples'] / 1000)} k | " + " | ".join(scores) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
