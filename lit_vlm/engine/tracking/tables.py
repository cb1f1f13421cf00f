"""W&B tables of held-out samples: question, reference, the model's answer, and the image with its boxes."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

COLUMNS = ("id", "source", "kind", "language", "prompt", "reference", "prediction", "score")
MAX_IMAGES = 4  # image columns; further images of a sample are in samples.jsonl only


def read_samples(run_dir: Path, phase: str) -> list[dict[str, Any]]:
    """Read the rows of one phase from `samples.jsonl`. Incomplete lines are skipped, as in the code that writes them."""
    file, rows = run_dir / "samples.jsonl", []
    # not splitlines(): answers may hold U+2028
    for line in file.read_text(encoding="utf-8", errors="replace").split("\n") if file.is_file() else []:
        with suppress(ValueError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict) and row.get("phase") == phase]


def build_table(run_dir: Path, rows: list[dict[str, Any]]) -> Any:
    """Build a `wandb.Table` with one row for each sample."""
    import wandb

    num_images = min(MAX_IMAGES, max((len(row["images"]) for row in rows), default=0))
    names = [f"picture{f'_{number + 1}' if number else ''}" for number in range(num_images)]
    cells = [[row[name] for name in COLUMNS] + _make_image_cells(run_dir, row, num_images) for row in rows]
    return wandb.Table(columns=[*COLUMNS, *names], data=cells)


def encode_table(run: Any, name: str, table: Any, step: int) -> Any:
    """Encode a table as the value of a history row. This copies its files to the run folder and starts their upload."""
    from wandb.sdk.data_types.utils import val_to_json

    return val_to_json(run, name, table, namespace=step)


def list_sample_images(run_dir: Path) -> list[str]:
    """List the image files of the tables, relative to the run folder, without duplicates."""
    rows = [row for phase in ("before", "after") for row in read_samples(run_dir, phase)]
    return list(dict.fromkeys(path for row in rows for path in _get_image_paths(row)[:MAX_IMAGES]))


def _get_image_paths(row: dict[str, Any]) -> list[str]:
    """Return the image paths of a sample. If it has boxes, use the image without them: W&B draws boxes that can be switched off."""
    return [row["plain"]] if row.get("plain") else list(row["images"])


def _make_image_cells(run_dir: Path, row: dict[str, Any], num_columns: int) -> list[Any]:
    """Make the image cells of one row, one for each image column."""
    import wandb

    found = [
        str(run_dir / path) if (run_dir / path).is_file() else None for path in _get_image_paths(row)[:num_columns]
    ]
    overlay = build_box_overlays(row.get("boxes") or [])
    images = [wandb.Image(path, boxes=overlay or None) if path else None for path in found]
    return images + [None] * (num_columns - len(images))


def build_box_overlays(boxes: list[dict[str, Any]]) -> dict[str, Any]:
    """Build the box overlays of a `wandb.Image`, one layer each for asked, reference and prediction.

    Args:
        boxes: rows of `layer`, `label` and `box`, (x1, y1, x2, y2) as fractions of the image's sides.
    """
    labels = {label: number for number, label in enumerate(dict.fromkeys(box["label"] or "text" for box in boxes))}
    layers: dict[str, Any] = {}
    for box in boxes:
        layer = layers.setdefault(
            box["layer"], {"box_data": [], "class_labels": {number: label for label, number in labels.items()}}
        )
        x1, y1, x2, y2 = box["box"]
        layer["box_data"].append(
            {
                "position": {"minX": min(x1, x2), "minY": min(y1, y2), "maxX": max(x1, x2), "maxY": max(y1, y2)},
                "class_id": labels[box["label"] or "text"],
                "box_caption": box["label"] or "text",
            }
        )
    return layers
