"""Benchmark: what task=curate is worth to training, on a source with duplicated and mismatched rows.

    python -m benchmarks.curation_helps --runs runs/helps [--rows 3000] [--steps 400] [--seeds 0 1 2] [--scorer-steps 1800]

Half of the rows are built-in captions, words and numbers in Korean and English. 30 % are copies of these (JPEG quality 60, the same
turns), 20 % have the picture of another row of their kind. The tiny model trains from scratch on all rows, on what
`curate.method=duplicates` keeps, on what `curate.method=prune` keeps of that, and, as a bound that no search reaches, on the rows that
were not changed, with the same steps; the exam judges. The scorer of prune is BLIP's matching, trained here as in benchmarks/capfilt.py
on other pictures of these kinds, mostly captions. Its threshold, `--min-score`, is read off the histogram of its scores. Finished
runs are only read, and `--columns` trains some of the four and takes the others from the result of before. The result goes to
benchmarks/results/curation_helps.json.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score

from benchmarks.capfilt import train_blip
from lit_vlm.config.schema import SourceConfig
from lit_vlm.curation.prune import score_captions
from lit_vlm.data.selection import identify_rows, read_selection, write_selection
from lit_vlm.data.sources import open_source
from lit_vlm.data.synthetic import BuiltinSource
from lit_vlm.evaluation.exam import EXAM_FILE
from lit_vlm.model.image_text import load_scorer
from lit_vlm.types import Language, Source

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks/results/curation_helps.json"
KINDS, SEED = ("caption", "word", "number"), 11
DUPLICATED, MISMATCHED = 0.3, 0.2  # of all rows
SCORER_SAMPLES = {"caption": 4000, "word": 1000, "number": 1000}  # of each language that the scorer learns from
EXAM_ITEMS, BATCH = 25, 32
COLUMNS = ("all rows", "without duplicates", "without mismatched rows too", "unchanged rows")
Row = tuple[Image.Image, list[str]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=3000)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--scorer-steps", type=int, default=1800)
    parser.add_argument("--min-score", type=float, default=0.3)
    parser.add_argument("--columns", nargs="+", choices=COLUMNS, default=COLUMNS)
    options = parser.parse_args()
    folder = options.runs.absolute()
    if not (folder / "rows.json").is_file():
        write_rows(folder, options.rows)
    facts = json.loads((folder / "facts.json").read_text())
    scorer = train_scorer(folder / "scorer", options.scorer_steps)
    selections = curate_rows(folder, facts, scorer, options.min_score)
    asked = {name: getattr(options, name) for name in ("rows", "steps", "scorer_steps", "min_score")}
    known = json.loads(RESULT.read_text()) if RESULT.is_file() else {}
    result: dict[str, Any] = asked | {"seeds": options.seeds, "scorer": measure_scorer(folder, facts, scorer)}
    result["sources"] = {name: count_rows(facts, path) for name, path in selections.items()}
    result["scores"] = {name: known["scores"][name] for name in COLUMNS if name not in options.columns}
    for name in options.columns:
        result["scores"][name] = [
            train_and_examine(folder, name, selections[name], seed, options.steps) for seed in options.seeds
        ]
        RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(render_table(result))


# ------------------------------------------------------------------------------------------------------------ rows


def write_rows(folder: Path, num_rows: int) -> None:
    """Write the rows in LLaVA's format in a drawn order, and for each what was done to it: "", duplicate or mismatch."""
    rng = random.Random(SEED)
    num_copies, num_wrong = round(DUPLICATED * num_rows), round(MISMATCHED * num_rows)
    right = list_samples(num_rows - num_copies - num_wrong, SEED)
    rows = [("", *row) for row in right]
    rows += [("duplicate", *rng.choice(right)) for _ in range(num_copies)]
    wrong = list_samples(num_wrong, SEED + 1)
    shift = len(KINDS) * 2  # the next row of the same kind and language
    rows += [("mismatch", wrong[(number + shift) % num_wrong][0], turns) for number, (_, turns) in enumerate(wrong)]
    rng.shuffle(rows)
    (folder / "images").mkdir(parents=True)
    lines = []
    for number, (change, image, turns) in enumerate(rows):
        image.save(folder / f"images/{number}.jpg", quality=60 if change == "duplicate" else 92)
        roles = ("human", "gpt")
        said = [{"from": roles[n % 2], "value": ("" if n else "<image>\n") + text} for n, text in enumerate(turns)]
        lines.append({"id": str(number), "image": f"images/{number}.jpg", "conversations": said})
    (folder / "facts.json").write_text(json.dumps([change for change, *_ in rows]))
    (folder / "rows.json").write_text(json.dumps(lines, ensure_ascii=False), encoding="utf-8")


def list_samples(count: int, seed: int) -> list[Row]:
    """List pictures with their turns: kinds and languages in turn."""
    sources = [
        BuiltinSource(f"{kind}_{language}", kind, language=Language(language), num_samples=count, seed=seed)
        for kind in KINDS
        for language in ("ko", "en")
    ]
    samples = [sources[number % len(sources)][number // len(sources)] for number in range(count)]
    return [(sample.images[0].load(), [message.text for message in sample.messages]) for sample in samples]


# ------------------------------------------------------------------------------------------------ scorer and selections


def train_scorer(folder: Path, steps: int) -> Path:
    """Train a small BLIP on pictures of the kinds of the rows, made with another seed. Returns the folder of its matching part."""
    if not (folder / "retrieval").is_dir():
        sources = [
            BuiltinSource(f"{kind}_{language}", kind, language=language, num_samples=count, seed=SEED + 2)
            for kind, count in SCORER_SAMPLES.items()
            for language in (Language.ko, Language.en)
        ]
        torch.set_num_threads(1)
        train_blip(folder, sources, steps, SEED)
    return folder / "retrieval"


def measure_scorer(folder: Path, facts: list[str], scorer: Path) -> dict[str, float]:
    """Measure the area under the ROC curve of the scores, right against mismatched rows: of all, and of each kind and language."""
    source = open_rows(folder)
    texts = [source[number].messages[-1].text for number in range(len(source))]
    places, index_dir = [(0, number) for number in range(len(source))], folder / "runs/index"
    model = load_scorer(scorer, "scorer")
    scores, _ = score_captions([source], places, texts, model, index_dir, batch_size=32, workers=1)
    cells: dict[str, list[int]] = {"all": list(range(len(source)))}
    for number, text in enumerate(texts):
        cells.setdefault(describe_text(text), []).append(number)
    return {
        cell: float(roc_auc_score([facts[n] != "mismatch" for n in numbers], [scores[n] for n in numbers]))
        for cell, numbers in sorted(cells.items())
    }


def describe_text(text: str) -> str:
    """Describe the kind and language of a text; those of numbers are the same."""
    language = "en" if text.isascii() else "ko"
    return "number" if text.isdigit() else f"{'caption' if ' ' in text else 'word'}_{language}"


def curate_rows(folder: Path, facts: list[str], scorer: Path, min_score: float) -> dict[str, Path | None]:
    """Curate the rows. Returns the selection of each source that is trained on; None: all rows."""
    arguments = ["task=curate", *describe_source(folder, None), "trainer.num_threads=1", "overwrite=true"]
    start(folder, *arguments)
    unique = folder / "runs/curate/duplicates/mine.selection.json"
    kinds = "curate.prune.kinds=[instruction]"  # as which rows of this format are read
    asked = ["curate.method=prune", f"curate.model={scorer}", f"curate.prune.min_score={min_score}", kinds]
    start(folder, *arguments, f"data.sources.mine.selection={unique}", *asked, "curate.prune.rules=[]")
    pruned = folder / "runs/curate/prune/mine.selection.json"
    bound, source = folder / "unchanged.selection.json", open_rows(folder)
    changed = [number for number, change in enumerate(facts) if change]
    write_selection(bound, source, identify_rows(source), np.array(changed, np.int64), ("known",))
    return dict(zip(COLUMNS, (None, unique, pruned, bound), strict=True))


def open_rows(folder: Path) -> Source:
    config = SourceConfig(path=str(folder / "rows.json"), format="llava")
    return open_source("mine", config, max_image_pixels=10**8)


def describe_source(folder: Path, selection: Path | None) -> list[str]:
    chosen = [f"data.sources.mine.selection={selection}"] if selection else []
    return ["data=llava_json", f"data.sources.mine.path={folder / 'rows.json'}", *chosen]


def count_rows(facts: list[str], selection: Path | None) -> dict[str, int]:
    """Count the rows that stay, by what was done to them."""
    kept = range(len(facts)) if selection is None else read_selection(selection, "selection").list_kept().tolist()
    changes = [facts[number] or "unchanged" for number in kept]
    return {change: changes.count(change) for change in ("unchanged", "duplicate", "mismatch")}


def train_and_examine(folder: Path, name: str, selection: Path | None, seed: int, steps: int) -> dict[str, float]:
    """Train and take the exam. Returns the mean score of each kind and language of easy questions that the rows teach."""
    run_name = f"{name.replace(' ', '_')}_{seed}"
    model = folder / "runs" / run_name / "hf"
    asked = ["experiment=tiny/2_sft", *describe_source(folder, selection), "init_from=null", f"seed={seed}"]
    asked += [f"data.global_batch_size={BATCH}"]
    asked += [f"trainer.max_steps={steps}", "trainer.num_threads=1", f"run_name={run_name}", "data.num_workers=0"]
    start(folder, *asked, "data.validation.max_samples=0")
    start(folder, "task=exam", f"init_from={model}", f"evaluate.exam_items={EXAM_ITEMS}", "trainer.num_threads=1")
    lines = (model.parent / EXAM_FILE).read_text("utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row.get("kind") in KINDS and not row["hard"]]
    cells: dict[str, list[float]] = {}
    for row in rows:
        cells.setdefault(f"{row['kind']}_{row['language']}", []).append(row["score"])
    return {cell: statistics.mean(values) for cell, values in sorted(cells.items())}


def start(folder: Path, *overrides: str) -> None:
    command = [sys.executable, str(ROOT / "run.py"), f"run_dir={folder / 'runs'}", *overrides]
    print(" ".join(command[1:]), flush=True)
    subprocess.run(command, check=True, cwd=ROOT)


def render_table(result: dict[str, Any]) -> str:
    """Render the scores as Markdown: mean over the seeds and standard deviation."""
    names = [name for name in COLUMNS if name in result["scores"]]
    lines = [f"| exam, easy | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|"]
    cells = list(result["scores"][names[0]][0])
    for cell in [*cells, "mean"]:
        columns = [
            [statistics.mean(one.values()) if cell == "mean" else one[cell] for one in result["scores"][name]]
            for name in names
        ]
        lines.append(f"| {cell} | {' | '.join(map(format_mean, columns))} |")
    return "\n".join(lines)


def format_mean(values: list[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{deviation}"


if __name__ == "__main__":
    main()
