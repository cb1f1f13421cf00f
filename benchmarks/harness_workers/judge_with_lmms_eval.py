"""Verdicts of lmms-eval 0.7.3 on answers, by its own functions: python judge_with_lmms_eval.py ITEMS.json VERDICTS.json

It runs in lmms-eval's environment and imports nothing of this project. K-MMBench is scored without a judge: the harness's
`static` rule reads answers that its first rule does not.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
from lmms_eval.tasks._task_utils.mcq_extract import extract_mcq_answer
from lmms_eval.tasks.dtcbench import utils as dtcbench
from lmms_eval.tasks.mmbench import ko_utils as mmbench
from lmms_eval.tasks.mmstar import utils as mmstar
from lmms_eval.tasks.seedbench import ko_utils as seedbench

Verdict = dict[str, Any]  # "letter": what the rule read, or ""; "hit": bool


def judge_first_character(items: list[dict[str, Any]], task: Any, prefix: str) -> list[Verdict]:
    """Judge the items of K-DTCBench or K-SEED."""
    verdicts = []
    for item in items:
        (result,) = getattr(task, f"{prefix}_process_result")(item["row"], [item["prediction"].strip()]).values()
        score = getattr(task, f"{prefix}_aggregation_result")([result])
        verdicts.append({"letter": result["pred"], "hit": score == 1})
    return verdicts


def judge_mmstar(items: list[dict[str, Any]]) -> list[Verdict]:
    """Judge the items of K-MMStar."""
    verdicts = []
    for item in items:
        answer = item["prediction"].strip()
        result = mmstar.mmstar_process_results_ko(item["row"], [answer])["average"]
        verdicts.append({"letter": extract_mcq_answer(answer, choices=list("ABCD")), "hit": result["score"] == 1})
    return verdicts


def judge_mmbench(items: list[dict[str, Any]]) -> list[Verdict]:
    """Judge the items of K-MMBench; the verdict of a group of rotations is that of each of its rows."""
    evaluator = mmbench.mmbench_evaluator
    table = pd.DataFrame([item["row"] | {"prediction": item["prediction"].strip()} for item in items])
    answers = dict(zip(table["index"], table["answer"], strict=True))
    hits = {
        group: bool(evaluator.eval_sub_data(rows, answers, static_only=True))
        for group, rows in table.groupby(table["index"] % 1_000_000)
    }
    verdicts = []
    for _, row in table.iterrows():
        letter = evaluator.prefetch_answer(row) or extract_mcq_answer(row["prediction"], choices=list("ABCD"))
        verdicts.append({"letter": letter, "hit": hits[row["index"] % 1_000_000]})
    return verdicts


JUDGES = {
    "k_dtcbench": lambda items: judge_first_character(items, dtcbench, "dtcbench"),
    "k_seed": lambda items: judge_first_character(items, seedbench, "seed"),
    "k_mmstar": judge_mmstar,
    "k_mmbench": judge_mmbench,
}

if __name__ == "__main__":
    sets = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    verdicts = {name: JUDGES[name](items) for name, items in sets.items()}
    found = {"version": f"lmms-eval {version('lmms-eval')}", "verdicts": verdicts}
    Path(sys.argv[2]).write_text(json.dumps(found, ensure_ascii=False), encoding="utf-8")
