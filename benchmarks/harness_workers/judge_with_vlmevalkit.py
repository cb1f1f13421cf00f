"""Verdicts of VLMEvalKit (ms-vlmeval 0.0.20) on answers: python judge_with_vlmevalkit.py ITEMS.json VERDICTS.json

It runs in VLMEvalKit's environment and imports nothing of this project. The answers are written as a file of predictions, which
`--mode eval --judge exact_matching` scores: no judge, no network. A set has its official name with `_answers` behind it, since
a file of another content under an official name is downloaded again; its class and its rules are the same.
"""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image

NAMES = {
    "k_dtcbench": "K-DTCBench",
    "k_mmbench": "MMBench_DEV_KO",
    "k_seed": "SEEDBench_IMG_KO",
    "k_mmstar": "MMStar_KO",
}
MODEL = "stored"


def write_set(name: str, items: list[dict[str, Any]], folder: Path) -> None:
    """Write the set as TSV and its predictions as xlsx, as the harness itself would."""
    memory = io.BytesIO()
    Image.new("RGB", (32, 32), "white").save(memory, "PNG")  # no rule looks at it
    rows = [
        {
            "index": item["index"],
            "image": base64.b64encode(memory.getvalue()).decode(),
            "question": item["question"],
            **item["options"],
            "answer": item["answer"],
            "category": item["category"],
        }
        for item in items
    ]
    table = pd.DataFrame(rows)
    table.to_csv(folder / f"data/{name}.tsv", sep="\t", index=False)
    table = table.drop(columns="image").assign(prediction=[item["prediction"] for item in items])
    (folder / f"work/{MODEL}").mkdir(parents=True, exist_ok=True)
    table.to_excel(folder / f"work/{MODEL}/{MODEL}_{name}.xlsx", index=False)


def run_harness(names: list[str], folder: Path) -> None:
    """Run VLMEvalKit on the written predictions."""
    command = [sys.executable, "-m", "vlmeval", "--mode", "eval", "--model", MODEL, "--data", *names]
    command += ["--judge", "exact_matching", "--work-dir", str(folder / "work")]
    environment = os.environ | {"LMUData": str(folder / "data"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)
    if done.returncode != 0:
        raise SystemExit(f"VLMEvalKit failed:\n{(done.stdout + done.stderr)[-4000:]}")


def read_verdicts(name: str, items: list[dict[str, Any]], folder: Path) -> tuple[list[dict[str, Any]], float]:
    """Read the verdict of each item and the harness's own score; a group of rotations has one verdict."""
    from vlmeval.utils.matching_util import can_infer

    (path,) = (folder / "work").rglob(f"{MODEL}_{name}_exact_matching_result.xlsx")
    (scores,) = (folder / "work").rglob(f"{MODEL}_{name}_acc.csv")
    hits = {int(row["index"]): bool(row["hit"]) for _, row in pd.read_excel(path).iterrows()}
    predictions = pd.read_excel(next((folder / "work").rglob(f"{MODEL}_{name}.xlsx")))
    texts = {int(row["index"]): str(row["prediction"]) for _, row in predictions.iterrows()}
    verdicts = [
        {
            "letter": can_infer(texts[item["index"]], dict(item["options"])) or "",
            "hit": hits.get(item["index"], hits.get(item["index"] % 1_000_000)),
        }
        for item in items
    ]
    return verdicts, float(pd.read_csv(scores)["Overall"][0])


def main(source: Path, target: Path) -> None:
    """Judge all sets of a file."""
    sets = json.loads(source.read_text(encoding="utf-8"))
    names = {name: f"{NAMES[name]}_answers" for name in sets}
    verdicts, scores = {}, {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "data").mkdir()
        for name, items in sets.items():
            write_set(names[name], items, folder)
        run_harness(list(names.values()), folder)
        for name, items in sets.items():
            verdicts[name], scores[name] = read_verdicts(names[name], items, folder)
    found = {"version": f"ms-vlmeval {version('ms-vlmeval')}", "verdicts": verdicts, "scores": scores}
    target.write_text(json.dumps(found, ensure_ascii=False), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
