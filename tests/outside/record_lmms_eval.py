"""Record what lmms-eval itself gives on made rows: `python tests/outside/record_lmms_eval.py OUT.json [ENVIRONMENT]`.

tests/evaluation/lmms_eval_runs.json is such a file. `make test` reads it in place of lmms-eval.
"""

import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/evaluation")]

import datasets
from made_benchmarks import make_rows, write_parquet
from scripted_endpoint import ScriptedModel

from lit_vlm.config.parse import parse
from lit_vlm.evaluation.benchmarks import BENCHMARKS
from lit_vlm.evaluation.harness_environment import VERSION, get_default_folder
from lit_vlm.files import read_json_lines
from lit_vlm.tasks.evaluate import evaluate

NUM_ROWS = {
    **{"k_dtcbench": 24, "k_mmbench": 16, "k_seed": 8, "k_mmstar": 8, "mmbench": 16, "seed_image": 9, "mmstar": 8},
    **{"ocrbench": 8, "pope": 8, "kreta": 8, "k_viscuit": 8},
}


def record(environment: Path) -> dict:
    """Evaluate made rows of each benchmark. Returns the results and samples of each, and the requests of one."""
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder, ScriptedModel().run() as url:
        files = Path(folder) / "files"
        for name, number in NUM_ROWS.items():
            write_parquet(make_rows(name, number), files / name / "test.parquet")
        names = ",".join(NUM_ROWS)
        arguments = ["task=evaluate", f"init_from={url}", f"benchmarks=[{names}]", f"evaluate.files={files}"]
        run = parse([*arguments, f"evaluate.environment={environment}", f"run_dir={folder}/runs", "run_name=made"])
        evaluate(run)
        found = {name: read_run(run.dir / "harness" / name, name) for name in NUM_ROWS}
    return {"version": VERSION, "runs": found}


def read_run(folder: Path, name: str) -> dict:
    """Read the scores of a run, and the answers with the main score of each."""
    (results,) = folder.glob("model/*_results.json")
    (samples,) = folder.glob("model/*_samples_*.jsonl")
    task = f"lit_vlm_{name}"
    metric = BENCHMARKS[name].metric
    names = ("doc_id", "input", "target", "filtered_resps", metric)
    rows = [{key: row[key] for key in names if key in row} for row in read_json_lines(samples)]
    return {
        "results": {task: json.loads(results.read_text(encoding="utf-8"))["results"][task]},
        "samples": sorted(rows, key=lambda row: row["doc_id"]),
    }


def write(found: dict, path: Path) -> None:
    path.write_text(json.dumps(found, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write(record(Path(sys.argv[2]) if sys.argv[2:] else get_default_folder()), Path(sys.argv[1]))
