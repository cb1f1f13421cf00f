"""Reader of captions: an image and its text, in the column `caption` or `text`, without a question."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lit_vlm.data.readers.dialects import SYSTEM_KEYS, check_record
from lit_vlm.data.readers.place import RecordContext
from lit_vlm.data.readers.record import make_sample
from lit_vlm.types import Fault, ImagePlaceholder, Message, Role, Sample


def read_caption(row: Mapping[str, Any], context: RecordContext) -> Sample:
    """Read a caption record as one turn: the caption is the answer.

    The images alone are the question, unless the source has `prompts`.
    """
    key = "caption" if row.get("caption") is not None else "text"
    if row.get(key) is None:
        context.require_keys(row, "caption")
    check_record(row, context, ("id", "image", "images", key, *SYSTEM_KEYS))
    images = context.collect_images(row)
    if not images:
        raise context.make_error(f"{key!r} has no image beside it", Fault.placeholders)
    question = Message(Role.user, tuple(ImagePlaceholder(index) for index in range(len(images))))
    answer = Message(Role.assistant, context.parse_text(context.require_text(row[key], key)))
    return make_sample(row, (question, answer), images, context)
