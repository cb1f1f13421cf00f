"""Retrieval on the report page: recalls of a stage of image-text pairs, by step and at its end."""

from __future__ import annotations

from typing import Any

from lit_vlm.config.pair_stages import RECALL_CUTOFFS
from lit_vlm.messages import tell
from lit_vlm.reports.run_record import RunRecord

DIRECTIONS = {"image_to_text": "image to text", "text_to_image": "text to image"}


def collect_retrieval(record: RunRecord) -> dict[str, Any]:
    """Collect the recalls at the end: one row for each direction, by features and re-ranked; no rows for other stages."""
    rows = []
    for direction, title in DIRECTIONS.items():
        for prefix, how in (("", "by features"), ("reranked_", "re-ranked by matching")):
            values = [record.figures.get(f"val/{prefix}{direction}_r{cutoff}") for cutoff in RECALL_CUTOFFS]
            cells = [f"{100 * value:.1f} %" for value in values if value is not None]
            if len(cells) == len(RECALL_CUTOFFS):
                rows.append({"direction": tell(title), "how": tell(how), "cells": cells})
    return {"titles": [f"R@{cutoff}" for cutoff in RECALL_CUTOFFS], "rows": rows}


def format_best_recalls(record: RunRecord) -> list[str]:
    """Format recall at 1 in both directions, re-ranked if it was, for the summary; [] for other stages."""
    lines = []
    for direction, title in DIRECTIONS.items():
        value = record.figures.get(f"val/reranked_{direction}_r1", record.figures.get(f"val/{direction}_r1"))
        if value is not None:
            lines.append(f"{tell(title)} R@1 {value:.2f}")
    return lines


def list_recall_curves(record: RunRecord) -> list[tuple[str, list[tuple[int, float]]]]:
    """List the curves of recall at 1 by features: name and points by step."""
    return [
        (tell("{direction}, R@1", direction=tell(title)), points)
        for direction, title in DIRECTIONS.items()
        if (points := record.metrics.get(f"val/{direction}_r1", []))
    ]
