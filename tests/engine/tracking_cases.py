"""Runs of W&B's own client in this process: a server or what stands in for one, a run folder, a logger on it."""

import json
import socket
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from lit_vlm.config.schema import LoggerConfig
from lit_vlm.engine.run_folder import RunFolder
from lit_vlm.engine.tracking import facts
from lit_vlm.engine.tracking.wandb_run import WandbRun

CONFIG = {"seed": 3, "stage": {"learning_rate": 1e-3}, "logger": {"tags": ["ghp_abcdefghijklmnopqrstuvwx"]}}
BOX = {"layer": "reference", "label": "고양이", "box": [0.75, 0.1, 0.25, 0.5]}


def run_folder(
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


def known_of(folder: RunFolder, settings: LoggerConfig) -> dict:
    """As a start does: the run's id and group go into the manifest."""
    known = facts.get_run_record(folder, settings, "tiny/2_sft")
    folder.update(tracking={"wandb": known})
    return known


def started(folder: RunFolder, said: list[str], *, before: bool = False, **settings) -> WandbRun:
    """A logger whose run has begun."""
    logger = LoggerConfig(wandb=True, **settings)
    tracker = WandbRun(logger, folder.path, said.append)
    known = known_of(folder, logger)
    tracker.verify_login(has_earlier_run=before)
    folder.update(tracking={"wandb": tracker.open(folder, known)})
    return tracker


def row(step: int) -> dict:
    """What a step logs. The held-out loss comes in a call of its own."""
    return {"epoch": 0, "train/loss": 1.0 / (step + 3), "step": step}


def log(tracker: WandbRun, steps) -> None:
    for step in steps:
        values = row(step)
        tracker.log_metrics({"train/loss": values["train/loss"], "epoch": 0}, step=step)
        if step % 2:
            tracker.log_metrics({"val/loss": 2.0 / (step + 3)}, step=step)


def kept(steps) -> list[dict]:
    """The rows of the table that a start finds."""
    rows = []
    for step in steps:
        rows.append(row(step))
        if step % 2:
            rows.append({"val/loss": 2.0 / (step + 3), "step": step})
    return rows


def samples(folder: Path, phase: str = "before") -> list[dict]:
    """Two rows of samples.jsonl: one with boxes on its picture, one with two pictures."""
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


def history(run) -> list[dict]:
    """Rows as they were logged, with their steps and without the client's clocks."""
    return [{key: value for key, value in row.items() if key not in ("_runtime", "_timestamp")} for row in run.history]


@contextmanager
def port_that_hangs():
    """Takes connections and says nothing."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(64)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


@contextmanager
def port_that_refuses():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"
