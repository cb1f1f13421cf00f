"""Scripts that stand in for Slurm's commands and record how they were called."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

PRINTS = f"""#!{sys.executable}
import json, os, pathlib, sys
here = pathlib.Path(__file__).parent
with open(here / "calls.jsonl", "a", encoding="utf-8") as log:
    log.write(json.dumps([pathlib.Path(sys.argv[0]).name, *sys.argv[1:]], ensure_ascii=False) + "\\n")
"""
ANSWERS = {
    "sbatch": "print(100 + sum(1 for line in open(here / 'calls.jsonl') if '\"sbatch\"' in line))",
    "srun": "json.dump(dict(os.environ), open(here / 'environment.json', 'w'))",
    "scontrol": "",
    "squeue": "sys.exit(1)",
}


def make_fake_slurm(folder: Path, **answers: str) -> Path:
    """Write the scripts into a folder for PATH and return it.

    Args:
        answers: lines of Python by command, instead of the usual answer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, answer in {**ANSWERS, **answers}.items():
        (folder / name).write_text(f"{PRINTS}{answer}\n", encoding="utf-8")
        (folder / name).chmod(0o755)
    return folder


def read_calls(folder: Path, name: str) -> list[list[str]]:
    """Return the arguments of each call of a command."""
    log = folder / "calls.jsonl"
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []
    return [row[1:] for row in rows if row[0] == name]


def get_path_with(folder: Path) -> str:
    return f"{folder}{os.pathsep}{os.environ['PATH']}"
