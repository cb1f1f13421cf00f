"""Handwritten digits with planted wrong labels, and small towers, for the benchmark of curate.method=labels."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from transformers import AutoConfig, AutoModel

from lit_vlm.config import parse
from lit_vlm.data.synthetic.digits import DigitsSource
from lit_vlm.data.synthetic.scenes import load_font
from lit_vlm.model.tiny import make_vision_tower
from lit_vlm.tasks.curate import curate
from lit_vlm.types import Language

SIDE, LOW_SIDE = 56, 8  # pixels of a picture, and of the drawing that it enlarges, as scikit-learn's digits
NUM_LABELS = 10
LIMITS = {"suspected": 1.0, "below 0.02": 0.02}  # of the quality of suspects
STEPS, BATCH = 1500, 64  # of the tower that learns printed digits


def draw_printed_digit(rng: np.random.Generator, digit: int) -> Image.Image:
    """Draw a printed digit, leaning and stretched at random, as coarse as scikit-learn's handwritten ones."""
    size = int(rng.integers(40, 58))
    font = load_font(size) if rng.random() < 0.5 else ImageFont.load_default(size)
    image = Image.new("L", (64, 64))
    pen = ImageDraw.Draw(image)
    pen.text((32, 32), str(digit), fill=255, font=font, anchor="mm", stroke_width=int(rng.integers(0, 4)))
    angle, lean, (x, y) = rng.normal(0, 0.15), rng.normal(0, 0.2), rng.uniform(0.75, 1.15, 2)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) @ [[x, lean], [0, y]]
    shift = np.array([32, 32]) - turn @ (np.array([32, 32]) + rng.normal(0, 2, 2))
    matrix = (turn[0, 0], turn[0, 1], shift[0], turn[1, 0], turn[1, 1], shift[1])
    turned = image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    small = turned.resize((LOW_SIDE, LOW_SIDE), Image.Resampling.BOX)
    return small.resize((SIDE, SIDE), Image.Resampling.BICUBIC).convert("RGB")


def make_towers(folder: Path) -> dict[str, Path]:
    """Make a tower with random weights, and one that has learnt printed digits and has seen no handwritten one."""
    towers = {"random weights": folder / "random", "learnt printed digits": folder / "printed"}
    for path in towers.values():
        make_vision_tower(path, vision_use_head=True)
    torch.manual_seed(0)
    path, rng = towers["learnt printed digits"], np.random.default_rng(0)
    tower = AutoModel.from_pretrained(path, config=AutoConfig.from_pretrained(path), dtype=torch.float32)
    head = torch.nn.Linear(tower.config.hidden_size, NUM_LABELS)
    parameters = [*tower.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.05)
    for _ in range(STEPS):
        labels = rng.integers(0, NUM_LABELS, BATCH)
        pixels = np.stack([np.asarray(draw_printed_digit(rng, digit), np.float32) for digit in labels.tolist()])
        inputs = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1
        loss = F.cross_entropy(head(tower(pixel_values=inputs).pooler_output), torch.from_numpy(labels))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    tower.save_pretrained(path)
    return towers


def plant_labels(folder: Path, share: float, seed: int) -> set[int]:
    """Write the 1,500 digits that training reads, a share of them with another label. Returns the positions of these."""
    source, rng, rows = DigitsSource("digits", Language.en), np.random.default_rng(seed), list[dict[str, Any]]()
    wrong = set(rng.choice(len(source), round(share * len(source)), replace=False).tolist())
    (folder / "images").mkdir(parents=True)
    for position in range(len(source)):
        record = source[position]
        label = int(record.messages[1].text)
        if position in wrong:
            label = (label + int(rng.integers(1, NUM_LABELS))) % NUM_LABELS
        record.images[0].load().save(folder / "images" / f"{position}.png")
        turns = [{"from": "human", "value": "<image>\nWhat digit is this?"}, {"from": "gpt", "value": str(label)}]
        rows.append({"id": str(position), "image": f"{position}.png", "conversations": turns})
    (folder / "rows.json").write_text(json.dumps(rows))
    return wrong


def check_planted(folder: Path, tower: Path, wrong: set[int], seed: int) -> dict[str, Any]:
    """Check planted labels with task=curate: precision and recall of the suspects, and of those whose label has a low probability."""
    settings = ["task=curate", "data=llava_json", "curate.method=labels", f"curate.model={tower}", f"seed={seed}"]
    settings += [f"data.sources.mine.path={folder / 'rows.json'}", f"data.sources.mine.image_root={folder / 'images'}"]
    settings += [
        f"run_dir={folder / 'runs'}",
        f"run_name={tower.name}",
        "data.index_workers=1",
        "data.validation.fraction=0",
    ]
    job = parse(settings)
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
        curate(job)
    output = job.dir / "labels"
    lines = [json.loads(line) for line in (output / "left_out.jsonl").read_text().splitlines()]
    found = {name: {line["position"] for line in lines if line["quality"] < limit} for name, limit in LIMITS.items()}
    return {
        "wrong": len(wrong),
        "accuracy": json.loads((output / "summary.json").read_text())["tables"]["Classes"][0]["accuracy"],
        **{
            name: {
                "records": len(some),
                "precision": len(some & wrong) / len(some),
                "recall": len(some & wrong) / len(wrong),
            }
            for name, some in found.items()
        },
    }
