"""Verdicts of lmms-eval and VLMEvalKit on the same answers: python -m benchmarks.harnesses [FOLDER [--files FILES]]

FOLDER is a run of task=evaluate, and FILES its evaluate.files: the folder of the published files. Without FILES, FOLDER holds
`<set>.jsonl` for one or more of k_dtcbench, k_seed, k_mmstar and k_mmbench: in each line the published columns without the picture,
and the answer as `prediction`. Without FOLDER, made answers (`harness_answers.py`) are scored. Each harness runs in its own
environment (`make test-outside` makes both), by its own code, without a judge and without a network.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.harness_answers import FORMS, LETTERS, MAKERS, make_answers
from lit_vlm.evaluation.benchmark_files import open_rows
from lit_vlm.evaluation.benchmarks import BENCHMARKS
from lit_vlm.evaluation.task_pack.choice_letters import read_choice_letter
from lit_vlm.files import read_json_lines, write_json
from lit_vlm.redaction import is_secret_name
from lit_vlm.types import UserError

ROOT = Path(__file__).resolve().parents[1]
WORKERS = Path(__file__).parent / "harness_workers"
RESULTS = Path(__file__).parent / "results/harnesses.json"
HARNESSES = {"lmms_eval": "judge_with_lmms_eval.py", "vlmevalkit": "judge_with_vlmevalkit.py"}
ENVIRONMENTS = {"lmms_eval": "lmms_eval", "vlmevalkit": "vlmeval"}
WITHOUT_CUDA = ROOT / "tests/outside/without_cuda"  # torchvision with a CPU build of torch
TITLES = {"k_dtcbench": "K-DTCBench", "k_seed": "K-SEED", "k_mmstar": "K-MMStar", "k_mmbench": "K-MMBench"}
ROTATION = 1_000_000  # added to the index of a question for each rotation of its options
_INLINE_OPTION = re.compile(r"\b([A-D]): (.*?)(?=,? [A-D]: |\s*$)", re.DOTALL)

Item = dict[str, Any]  # index, question, options, answer, category, prediction, and the published row


def read_items(path: Path) -> list[Item]:
    """Read the answers of one set, named by the file.

    Raises:
        UserError: a line is no row of the set, or two lines have one index.
    """
    items = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            with name_bad_row(path.stem, f"{path}:{number}"):
                items.append(make_item(path.stem, json.loads(line), number))
    return check_items(items, path)


def read_run(name: str, run: Path, files: Path) -> list[Item]:
    """Read the answers of one set from a run of task=evaluate, and their rows from the published files.

    Raises:
        UserError: a row of the run is not in the files, or it is no row of the set.
    """
    samples, items = run / "samples" / f"{name}.jsonl", []
    with tempfile.TemporaryDirectory() as cache:
        rows, _ = open_rows(name, BENCHMARKS[name], files, Path(cache))
        for sample in read_json_lines(samples):
            number = sample["id"]
            if number >= len(rows):
                raise UserError(f"{samples}: has an answer to row {number}, but {files / name} has {len(rows)} rows.")
            with name_bad_row(name, f"{files / name}, row {number}"):
                items.append(make_item(name, {**rows[number], "prediction": sample["answer"]}, number))
    return check_items(items, samples)


@contextmanager
def name_bad_row(name: str, place: str) -> Iterator[None]:
    """Raise a UserError with the place of a row that cannot be used."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(
            f"{place}: no row of {TITLES[name]} with an answer: {reason}. It needs the published columns and 'prediction'."
        ) from None


def check_items(items: list[Item], path: Path) -> list[Item]:
    """Check that there are items, and one of each index."""
    repeated = [index for index, count in Counter(item["index"] for item in items).items() if count > 1]
    if repeated or not items:
        reason = f"index {repeated[0]} is there more than once" if repeated else "no rows"
        raise UserError(f"{path}: {reason}. Each row of the set needs one line.")
    return items


def make_item(name: str, row: dict[str, Any], number: int = 0) -> Item:
    """Make the item of a published row with its `prediction`; K-SEED's question_id may be a text, then `number` is its index."""
    if name == "k_mmstar" and "A" not in row:
        options = dict(_INLINE_OPTION.findall(row["question"].rpartition("Options:")[2]))
    elif name == "k_mmbench" or "A" in row:
        options = {letter: row[letter] for letter in LETTERS if row.get(letter) not in (None, "nan")}
    else:
        options = {letter: row[f"choice_{letter.lower()}"] for letter in LETTERS}
    answer = str(row["answer"]).strip()
    if answer not in options:
        raise ValueError(f"the right answer {answer!r} is none of {', '.join(options) or 'no options'}")
    identifier = row["question_id" if name == "k_seed" and "question_id" in row else "index"]
    index = number if name == "k_seed" and not str(identifier).isdigit() else int(identifier)
    # Columns that lmms-eval's functions read and VLMEvalKit's files do not have
    added = {
        "index": index,
        "question_id": str(index),
        "data_type": "image",
        "l2_category": row.get("l2-category", "none"),
    }
    added |= {"category": "none"} | ({letter: options.get(letter) for letter in LETTERS} if name == "k_mmbench" else {})
    return {
        "index": index,
        "question": str(row["question"]),
        "options": {letter: str(text) for letter, text in options.items()},
        "answer": answer,
        "category": str(row.get("category", "none")),
        "prediction": str(row["prediction"]),
        "row": added | {key: value for key, value in row.items() if key not in ("prediction", "image")},
    }


def run_worker(harness: str, sets: dict[str, list[Item]], python: Path) -> dict[str, Any]:
    """Run a harness on all sets: its version, and the verdicts of each set.

    Raises:
        UserError: its environment is not there, or the harness failed.
    """
    if not python.is_file():
        raise UserError(
            f"{python} is not there. `make test-outside` makes the environments; --{harness} names another one."
        )
    command = [str(python), str(WORKERS / HARNESSES[harness])]
    has_torchvision = subprocess.run([python, "-c", "import torchvision"], capture_output=True).returncode == 0
    environment = make_environment() | ({} if has_torchvision else {"PYTHONPATH": str(WITHOUT_CUDA)})
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "items.json", Path(folder) / "verdicts.json"
        source.write_text(json.dumps(sets, ensure_ascii=False), encoding="utf-8")
        done = subprocess.run(
            [*command, str(source), str(target)], capture_output=True, text=True, env=environment, cwd=folder
        )
        if done.returncode != 0:
            raise UserError(f"{harness} failed:\n{(done.stdout + done.stderr)[-3000:]}")
        return json.loads(target.read_text(encoding="utf-8"))


def make_environment() -> dict[str, str]:
    """Make the environment variables of a harness: those of this process without keys."""
    kept = {name: value for name, value in os.environ.items() if not is_secret_name(name, value)}
    kept.pop("PYTHONPATH", None)
    return kept | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "WANDB_MODE": "disabled"}


def compare(sets: dict[str, list[Item]], pythons: dict[str, Path]) -> dict[str, Any]:
    """Score the answers with both harnesses.

    Returns:
        "versions", and "sets": for each set, one entry per row with its answer and the letter and verdict of each harness.
    """
    found = {harness: run_worker(harness, sets, pythons[harness]) for harness in HARNESSES}
    for name, score in found["vlmevalkit"]["scores"].items():
        own = compute_score(name, list(zip(sets[name], found["vlmevalkit"]["verdicts"][name], strict=True)))
        assert abs(score - own) < 1e-9, f"VLMEvalKit's score of {name} is {score}, the mean of its verdicts {own}"
    compared = {
        name: [
            {
                "index": item["index"],
                **({"form": item["row"]["form"]} if "form" in item["row"] else {}),
                "right": item["answer"],
                "answer": item["prediction"],
                **{harness: found[harness]["verdicts"][name][i] for harness in HARNESSES},
            }
            for i, item in enumerate(items)
        ]
        for name, items in sets.items()
    }
    return {"versions": {harness: found[harness]["version"] for harness in HARNESSES}, "sets": compared}


def compute_score(name: str, judged: list[tuple[Item, dict[str, Any]]]) -> float:
    """Compute the share of hits, 0 to 1; of K-MMBench's rotations the first one stands for the group."""
    hits = [verdict["hit"] for item, verdict in judged if name != "k_mmbench" or item["index"] < ROTATION]
    return sum(hits) / len(hits)


def summarize(compared: dict[str, Any]) -> list[str]:
    """List the lines of a table: rows, scores in percent, and rows on which the harnesses differ. Groups count once."""
    lines = [f"{'set':<12}{'items':>6}{'lmms-eval':>11}{'VLMEvalKit':>12}{'only lmms-eval':>16}{'only VLMEvalKit':>17}"]
    for name, rows in compared["sets"].items():
        counted = [row for row in rows if name != "k_mmbench" or row["index"] < ROTATION]
        hits = [(row["lmms_eval"]["hit"], row["vlmevalkit"]["hit"]) for row in counted]
        scores = [100 * compute_score(name, [(row, row[harness]) for row in rows]) for harness in HARNESSES]
        only = [hits.count((True, False)), hits.count((False, True))]
        lines.append(f"{TITLES[name]:<12}{len(hits):>6}{scores[0]:>11.1f}{scores[1]:>12.1f}{only[0]:>16}{only[1]:>17}")
    return lines


def list_differences(compared: dict[str, Any], limit: int = 20) -> list[str]:
    """List the answers on which the harnesses differ, with the letter that each one read."""
    lines = []
    for name, rows in compared["sets"].items():
        for row in rows:
            if row["lmms_eval"]["hit"] != row["vlmevalkit"]["hit"]:
                read = [f"{harness} {row[harness]['letter'] or 'nothing'!r}" for harness in HARNESSES]
                lines.append(
                    f"{TITLES[name]} {row['index']}: {row['answer'][:60]!r}, right {row['right']}, read {', '.join(read)}"
                )
    return lines[:limit] + ([f"... {len(lines) - limit} more"] if len(lines) > limit else [])


COLUMNS = {  # heading -> harness, and the sets that it scores by the same rule
    "lmms-eval: K-DTCBench, K-SEED": ("lmms_eval", ("k_dtcbench", "k_seed")),
    "lmms-eval: K-MMStar": ("lmms_eval", ("k_mmstar",)),
    "lmms-eval: K-MMBench": ("lmms_eval", ("k_mmbench",)),
    "VLMEvalKit: all four": ("vlmevalkit", tuple(MAKERS)),
}


def make_table(compared: dict[str, Any]) -> str:
    """Make the Markdown table of the made answers: one row of each form, one column of each rule, and the task pack's reader."""
    lines = [f"| answer, right option A | right? | {' | '.join(COLUMNS)} | task pack's reader |"]
    lines += ["|---" * (len(COLUMNS) + 3) + "|"]
    for form in FORMS:
        cells = ["yes" if form.is_right else "no"]
        for harness, names in COLUMNS.values():
            rows = [[row for row in compared["sets"][name] if row["form"] == form.name] for name in names]
            marks = {mark_hits([row[harness]["hit"] for row in found]) for found in rows}
            assert len(marks) == 1, f"{harness} has different verdicts on {form.name} in {names}"
            cells += marks
        items = [make_item(name, row) for name in MAKERS for row in make_answers(name) if row["form"] == form.name]
        read = [read_choice_letter(item["prediction"], item["options"]) == item["answer"] for item in items]
        lines.append(f"| `{form.name}` | {' | '.join([*cells, mark_hits(read)])} |")
    return "\n".join(lines)


def mark_hits(hits: list[bool]) -> str:
    """Mark the verdicts of one form: counted as right in all rows, in none, or in some."""
    return "✓" if all(hits) else "–" if not any(hits) else f"{sum(hits)} of {len(hits)}"


def read_sets(folder: Path | None, files: Path | None) -> dict[str, list[Item]]:
    """Read the answers of all sets in a folder, or make some if there is no folder.

    Raises:
        UserError: the folder has no set.
    """
    if folder is None:
        return {name: [make_item(name, row) for row in make_answers(name)] for name in MAKERS}
    place = folder if files is None else folder / "samples"
    found = [name for name in MAKERS if (place / f"{name}.jsonl").is_file()]
    if not found:
        wanted = ", ".join(f"{name}.jsonl" for name in MAKERS)
        hint = " Is it a run of task=evaluate? Then name its evaluate.files with --files." if files is None else ""
        raise UserError(f"{place}: none of {wanted} is there.{hint}")
    return {
        name: read_items(place / f"{name}.jsonl") if files is None else read_run(name, folder, files) for name in found
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "folder", type=Path, nargs="?", help="run of task=evaluate or folder of <set>.jsonl; else made answers"
    )
    parser.add_argument("--files", type=Path, help="evaluate.files of the run: the folder of the published files")
    for harness, folder in ENVIRONMENTS.items():
        python = ROOT / ".venv-outside" / folder / "bin/python"
        parser.add_argument(f"--{harness}", type=Path, default=python, help=f"Python of its environment ({python})")
    arguments = parser.parse_args()
    sets = read_sets(arguments.folder, arguments.files)
    compared = compare(sets, {harness: getattr(arguments, harness) for harness in HARNESSES})
    target = RESULTS if arguments.folder is None else arguments.folder / "harnesses.json"
    write_json(target, compared, indent=1)
    print("\n".join([" and ".join(compared["versions"].values()), *summarize(compared), *list_differences(compared)]))
    print(f"Verdicts of each answer: {target}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
