"""Pictures and means that all tasks of the pack need."""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Iterable
from typing import Any

from PIL import Image


def load_picture(value: Any) -> Image.Image:
    """Load a picture of a row as RGB: a PIL image, base64 text with or without a `data:` header, or `{"bytes": ...}`.

    Raises:
        ValueError: it is none of these, or its bytes are no picture.
    """
    if isinstance(value, Image.Image):
        return value.convert("RGB")
    if isinstance(value, dict) and value.get("bytes"):
        content = value["bytes"]
    elif isinstance(value, str):
        try:
            content = base64.b64decode("".join(value.rpartition(",")[2].split()), validate=True)
        except binascii.Error as error:
            raise ValueError(f"the picture is no valid base64: {error}") from None
    else:
        raise ValueError(f"a picture is needed as image, base64 text or bytes, found {type(value).__name__}")
    try:
        return Image.open(io.BytesIO(content)).convert("RGB")
    except OSError as error:
        raise ValueError(f"the picture cannot be read: {error}") from None


def load_pictures(doc: dict[str, Any]) -> list[Image.Image]:
    """Load the one picture of a row from its column `image`."""
    return [load_picture(doc["image"])]


def aggregate_mean(scores: Iterable[float | None]) -> float:
    """Compute the mean of the scores that are there; NaN if there is none."""
    present = [score for score in scores if score is not None]
    return sum(present) / len(present) if present else float("nan")


def aggregate_percent(scores: Iterable[float | None]) -> float:
    """Compute the mean of the scores that are there, in percent."""
    return 100 * aggregate_mean(scores)


def aggregate_sum(counts: Iterable[float | None]) -> float:
    """Compute the sum of the counts that are there."""
    return sum(count for count in counts if count is not None)
