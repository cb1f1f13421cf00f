"""Runs of W&B's client in this process: a server or a substitute for one, a run folder, and a logger on it."""

import json
import socket
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from lit_vlm.config.schema import LoggerConfig
from lit_vlm.loggers import run_metadata
from lit_vlm.loggers.wandb_logger import WandbRun
from lit_vlm.runs.run_folder import RunFolder

CONFIG = {"seed": 3, "stage": {"learning_rate": 1e-3}, "logger": {"tags": ["ghp_abcdefghijklmnopqrstuvwx"]}}
BOX = {"layer": "reference", "label": "고양이", "box": [0.75, 0.1, 0.25, 0.5]}


def make_run_folder(
    path: Path, name: str = "tiny/2_sft", parent: str | None = None, tracking: dict | None = None
) -> RunFolder:
    manifest = {
        "status": "running",
        "name": name,
        "stage": "sft",
        "command": "python run.py experiment=tiny/2_sft",
        "git": {"commit": "0" * 40, "dirty": False},
        "versions": {"python": "3.11"},
        "config": CONFIG,
        "data": {"digest": "d" * 64, "mixture": [1, 2]},
        "parent": {"path": parent, "digest": "p"} if parent else None,
        "plan": {"steps": 6, "k": 1, "world_size": 1},
        "tracking": tracking or {},
    }
    return RunFolder(path, manifest)


def write_run_record(folder: RunFolder, settings: LoggerConfig) -> dict:
    """Write the run's id and group into the manifest, as a start does."""
    known = run_metadata.get_run_record(folder, settings, "tiny/2_sft")
    folder.update(tracking={"wandb": known})
    return known


def start_run(folder: RunFolder, messages: list[str], *, has_earlier_run: bool = False, **settings) -> WandbRun:
    """Return a logger whose run has started."""
    logger = LoggerConfig(wandb=True, **settings)
    tracker = WandbRun(logger, folder.path, messages.append)
    known = write_run_record(folder, logger)
    tracker.verify_login(has_earlier_run=has_earlier_run)
    folder.update(tracking={"wandb": tracker.open(folder, known)})
    return tracker


def make_row(step: int) -> dict:
    """Return the values that a step logs. The held-out loss is logged in a separate call."""
    return {"epoch": 0, "train/loss": 1.0 / (step + 3), "step": step}


def log_steps(tracker: WandbRun, steps) -> None:
    for step in steps:
        values = make_row(step)
        tracker.log_metrics({"train/loss": values["train/loss"], "epoch": 0}, step=step)
        if step % 2:
            tracker.log_metrics({"val/loss": 2.0 / (step + 3)}, step=step)


def make_saved_rows(steps) -> list[dict]:
    """Return the rows of the table that a start finds."""
    rows = []
    for step in steps:
        rows.append(make_row(step))
        if step % 2:
            rows.append({"val/loss": 2.0 / (step + 3), "step": step})
    return rows


def write_samples(folder: Path, phase: str = "before") -> list[dict]:
    """Write two rows of samples.jsonl: one with boxes on its picture, one with two pictures."""
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    for name in ("a_before", "a_plain", "b_0", "b_1"):
        Image.new("RGB", (32, 24), "white").save(folder / "samples" / f"{name}.png")
    text = {
        "source": "s",
        "language": "ko",
        "prompt": "무엇?",
        "reference": "고양이",
        "prediction": "개",
        "phase": phase,
    }
    one = {"id": "a", "kind": "grounding", "score": 0.5, "images": ["samples/a_before.png"]}
    one |= {"plain": "samples/a_plain.png", "boxes": [BOX, {"layer": "prediction", "label": "", "box": [0, 0, 1, 1]}]}
    two = {"id": "b", "kind": "multi_image", "score": 1.0, "images": ["samples/b_0.png", "samples/b_1.png"]}
    rows = [text | one, text | two]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "samples.jsonl").write_text(lines, encoding="utf-8")
    return rows


def get_history(run) -> list[dict]:
    """Return the rows as they were logged, with their steps and without the client's timestamps."""
    return [{key: value for key, value in row.items() if key not in ("_runtime", "_timestamp")} for row in run.history]


@contextmanager
def open_hanging_port():
    """Accept connections and never answer."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(64)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


@contextmanager
def open_refusing_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # but does not listen
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"
