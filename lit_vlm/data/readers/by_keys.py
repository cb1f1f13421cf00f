"""Registry of record formats, and detection of a record's format by its keys."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lit_vlm.data.images import format_untrusted
from lit_vlm.data.readers.caption import read_caption
from lit_vlm.data.readers.llava import read_llava
from lit_vlm.data.readers.messages import read_messages
from lit_vlm.data.readers.place import RecordContext
from lit_vlm.data.readers.preference import read_preference
from lit_vlm.types import Record

RecordReader = Callable[[Mapping[str, Any], RecordContext], Record]

FORMATS: dict[str, RecordReader] = {
    "llava": read_llava,  # ShareGPT's too
    "messages": read_messages,
    "preference": read_preference,
    "caption": read_caption,
}
NEEDED_KEYS = (
    "Needed: 'conversations' (llava, sharegpt), 'messages' (messages), 'chosen' and 'rejected' (preference), "
    "or 'caption' or 'text' beside an image"
)


def detect_record_format(row: Mapping[str, Any]) -> str | None:
    """Return the record's format as a key of FORMATS, or None if its keys fit none.

    In columnar files a missing key is a null.
    """
    keys = {key for key, value in row.items() if value is not None}
    if {"chosen", "rejected"} <= keys:
        return "preference"
    if "conversations" in keys:
        return "llava"
    if "messages" in keys:
        return "messages"
    return "caption" if keys & {"caption", "text"} and keys & {"image", "images"} else None


def format_keys(row: Mapping[str, Any]) -> str:
    """Format the row's first 12 keys for an error message."""
    return ", ".join(format_untrusted(key, 40) for key in list(row)[:12])


def read_any_format(row: Mapping[str, Any], context: RecordContext) -> Record:
    """Read a record in the format that its keys show. Used for archives, whose records may differ in format."""
    record_format = detect_record_format(row)
    if record_format is None:
        raise context.make_error(f"cannot tell the format from the keys {format_keys(row)}. {NEEDED_KEYS}")
    return FORMATS[record_format](row, context)
