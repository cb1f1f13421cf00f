"""Message and CPU seconds of the commonest mistakes of a first hour, each as a command of its own.

    python benchmarks/mistakes.py              prints a table
    python benchmarks/mistakes.py adapter      only those whose name contains this word

A mistake is answered well if its message says what to write, in at most 2 CPU seconds where no data are read and 5 otherwise.
"""

from __future__ import annotations

import json
import os
import re
import resource
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MINE = "experiment=tiny/2_sft init_from=null data=llava_json data.sources.mine.path=mine.json data.global_batch_size=4"
MAX_MESSAGE_CHARS = 400


@dataclass(frozen=True, slots=True)
class Mistake:
    """A command with a mistake, and the words that its message must contain."""

    name: str
    command: str  # arguments of run.py
    remedy: str  # what the message must say
    reads_data: bool = False

    @property
    def max_seconds(self) -> float:
        return 5.0 if self.reads_data else 2.0


MISTAKES = (
    Mistake("a word alone", "train", "task=train"),
    Mistake("a flag", "--experiment tiny/2_sft", "without dashes: experiment=tiny/2_sft"),
    Mistake(
        "flags of another program",
        "--learning_rate 1e-4 --num_train_epochs 3",
        "stage.learning_rate=1e-4 trainer.max_epochs=3",
    ),
    Mistake("spaces around =", "experiment = tiny/2_sft", "write experiment=tiny/2_sft"),
    Mistake("lr", "experiment=tiny/2_sft lr=1e-4", "stage.learning_rate"),
    Mistake("batch of a device", "experiment=tiny/2_sft per_device_train_batch_size=2", "data.global_batch_size="),
    Mistake("use_lora", "experiment=tiny/2_sft use_lora=true", "stage.parts.language_model.lora.rank="),
    Mistake("bf16", "experiment=tiny/2_sft bf16=true", "trainer.precision=bf16-mixed"),
    Mistake("a config file", "--config my.yaml", "--config-dir mine experiment="),
    Mistake("another model class", "experiment=tiny/2_sft model=qwen2_5_vl", "the LLaVA family"),
    Mistake("a file as data", "experiment=tiny/2_sft data=mine.json", "data.sources.mine.path=mine.json"),
    Mistake("stage=finetune", "experiment=tiny/2_sft stage=finetune", "Did you mean sft?"),
    Mistake("devices", "experiment=tiny/2_sft trainer.devices=auto", "CUDA_VISIBLE_DEVICES"),
    Mistake(
        "a run's folder as model",
        "experiment=tiny/2_sft init_from=runs/tiny/1_align",
        "Did you mean init_from=runs/tiny/1_align/hf?",
    ),
    Mistake(
        "a misspelt model folder",
        "experiment=tiny/2_sft init_from=runs/tny/1_align/hf",
        "Did you mean init_from=runs/tiny/1_align/hf?",
    ),
    Mistake("an adapter as model", "experiment=tiny/2_sft init_from=adapter", "model.adapter_base="),
    Mistake("a nested sweep parameter", "task=sweep sweep=nested.yaml", "parameters:"),
    Mistake("a misspelt data file", f"{MINE} data.sources.mine.path=mime.json", "Did you mean mine.json?"),
    Mistake("a wrong image_root", MINE, "data.sources.mine.image_root=", reads_data=True),
    Mistake(
        "a wrong image_root in preflight", f"task=preflight {MINE}", "data.sources.mine.image_root=", reads_data=True
    ),
)


def write_first_folder(folder: Path) -> None:
    """Write what a new user has: a LLaVA JSON with its images elsewhere, a finished run, an adapter and a sweep file."""
    from PIL import Image

    records = []
    (folder / "photos" / "day").mkdir(parents=True)
    for number in range(12):
        Image.new("RGB", (40, 30), (number, 99, 9)).save(folder / "photos" / "day" / f"{number}.png")
        turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": f"answer {number}"}]
        records.append({"id": str(number), "image": f"day/{number}.png", "conversations": turns})
    (folder / "mine.json").write_text(json.dumps(records), encoding="utf-8")
    model = folder / "runs" / "tiny" / "1_align" / "hf"
    model.mkdir(parents=True)
    (model / "config.json").write_text(json.dumps({"model_type": "llava_onevision"}), encoding="utf-8")
    (model.parent / "manifest.json").write_text(json.dumps({"status": "finished"}), encoding="utf-8")
    (folder / "adapter").mkdir()
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "models/base"}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(adapter), encoding="utf-8")
    sweep = "method: grid\nmetric: {name: val/loss}\nparameters:\n  experiment: {value: tiny/1_align}\n"
    (folder / "nested.yaml").write_text(
        f"{sweep}  stage:\n    learning_rate: {{values: [1.0e-3, 1.0e-4]}}\n", encoding="utf-8"
    )


def run_mistake(mistake: Mistake, folder: Path) -> tuple[str, float]:
    """Run the command of a mistake; return its message and the CPU seconds of its processes."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, str(ROOT / "run.py"), *shlex.split(mistake.command)],
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "10000"},
        capture_output=True,
        text=True,
        check=False,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    message = (done.stdout if mistake.name.endswith("preflight") else done.stderr).strip()
    seconds = (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime)
    return (message if done.returncode == 1 else f"exit status {done.returncode}: {message}"), seconds


def measure_mistakes(word: str = "") -> Iterator[tuple[Mistake, str, float]]:
    """Run the mistakes whose name contains a word; yield each with its message and its CPU seconds."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        write_first_folder(folder)
        for mistake in MISTAKES:
            if word in mistake.name:
                message, seconds = run_mistake(mistake, folder)
                yield mistake, message.replace(f"{folder}/", ""), seconds


def format_row(mistake: Mistake, message: str, seconds: float) -> str:
    """Format a row of the table in Markdown."""
    if match := re.search(r"^failure: .*$", message, re.MULTILINE):
        message = match[0]
    text = " ".join(message.split()).replace("|", "\\|")
    shown = text if len(text) <= MAX_MESSAGE_CHARS else f"{text[:MAX_MESSAGE_CHARS]} ..."
    verdict = "" if mistake.remedy in text and seconds <= mistake.max_seconds else " (!)"
    return f"| `{mistake.command}` | {shown} | {seconds:.1f}{verdict} |"


def main() -> None:
    print("| `python run.py` with | message | CPU s |\n|---|---|---:|")
    for mistake, message, seconds in measure_mistakes(*sys.argv[1:2]):
        print(format_row(mistake, message, seconds), flush=True)


if __name__ == "__main__":
    main()
