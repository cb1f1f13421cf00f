"""Reader of captions: an image and its text, in the column `caption` or `text`, without a question."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lit_vlm.data.readers.dialects import SYSTEM, check_record
from lit_vlm.data.readers.place import Place
from lit_vlm.data.readers.record import make_sample
from lit_vlm.types import Fault, ImageSlot, Message, Role, Sample


def read_caption(row: Mapping[str, Any], place: Place) -> Sample:
    """Read a caption record as one turn: the caption is the answer.

    The images alone are the question, unless the source has `prompts`.
    """
    key = "caption" if row.get("caption") is not None else "text"
    if row.get(key) is None:
        place.need(row, "caption")
    check_record(row, place, ("id", "image", "images", key, *SYSTEM))
    images = place.images(row)
    if not images:
        raise place.fault(f"{key!r} has no image beside it", Fault.placeholders)
    question = Message(Role.user, tuple(ImageSlot(index) for index in range(len(images))))
    answer = Message(Role.assistant, place.pieces(place.text(row[key], key)))
    return make_sample(row, (question, answer), images, place)
