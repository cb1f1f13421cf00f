#!/usr/bin/env bash
# lmms-eval reads a multiple-choice answer with `extract_mcq_answer`, which many of its tasks share (MMStar, Video-MME, LVBench,
# RealWorldQA and others). After a phrase such as "the answer is" each capital letter A to D is a candidate, also within a word,
# and the last one wins: "The answer is B. Dogs have four legs." is read as D, and "정답은 B입니다. A는 아닙니다." ("The answer
# is B. It is not A.") as A.
# Exits 0 when it is as described and 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
# The rule is one file of the standard library alone, so the packages that lmms-eval needs are left out.
"$folder/env/bin/pip" install --quiet --disable-pip-version-check --no-deps lmms-eval==0.7.3 2>/dev/null
"$folder/env/bin/python" - <<'END'
import importlib.util
import sys
from importlib.metadata import distribution, version

path = distribution("lmms-eval").locate_file("lmms_eval/tasks/_task_utils/mcq_extract.py")
spec = importlib.util.spec_from_file_location("mcq_extract", path)
rule = importlib.util.module_from_spec(spec)
spec.loader.exec_module(rule)
print("lmms-eval", version("lmms-eval"))

cases = [
    ("The answer is B.", "B", "B"),
    ("The answer is B. Dogs have four legs.", "B", "D"),
    ("The answer is B, because Cats are smaller.", "B", "C"),
    ("The answer is B: DNA.", "B", "A"),
    ("정답은 B입니다.", "B", "B"),
    ("정답은 B입니다. A는 아닙니다.", "B", "A"),
]
as_described = True
for answer, stated, described in cases:
    read = rule.extract_mcq_answer(answer, choices=["A", "B", "C", "D"])
    print(f"{answer!r}: states {stated}, read {read!r}")
    as_described &= read == described
sys.exit(0 if as_described else 1)
END
